"""Settings that cannot be are named."""

import pytest

from anabranch.serve.http.settings import ServerSettings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 65536), ("port", -1), ("api_key", ""), ("model_names", ()), ("model_names", ("",)),
        ("max_concurrency", 0), ("max_queue", -1), ("max_body_bytes", 10), ("max_logprobs", -1),
        ("drain_timeout_s", -1.0), ("client_timeout_s", 0.0), ("client_timeout_s", float("nan")),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        ServerSettings(**{"model_names": ("m",), name: value})


def test_a_key_is_not_shown():
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is the point
        ServerSettings(model_names=("m",), api_key="")
    assert "secret" not in str(error.value)
    assert "secret" not in repr(ServerSettings(model_names=("m",), api_key="secret"))
