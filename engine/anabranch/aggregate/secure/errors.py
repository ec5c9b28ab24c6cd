"""The one error of the protocol, and the libraries it cannot do without."""

from types import ModuleType

EXTRA = "secure aggregation needs cbor2 and cryptography; install them with: pip install 'anabranch[secure]'"


class ProtocolError(ValueError):
    """Somebody did not keep to the protocol: `who` ("client 3", "server"), `what` was wrong.

    Whoever raises it has not changed its state: the right message may still follow.
    """

    def __init__(self, who: str, what: str) -> None:
        super().__init__(f"{who}: {what}")
        self.who = who
        self.what = what


def cbor() -> ModuleType:
    """The module cbor2; an ImportError names the extra that brings it."""
    try:
        import cbor2
    except ImportError as error:
        raise ImportError(EXTRA) from error
    return cbor2
