"""`SecureMod`: around an ordinary train function, so that a node's arrays leave it only inside a secure sum.

    from anabranch.integrations.flower.secure_mod import SecureMod
    app = ClientApp(mods=[SecureMod(privacy=2)])
    @app.train() ...                                # as always: replies with one ArrayRecord and one MetricRecord

A round of `SecureFedAvg` is several messages of the type "train", told apart by `step` in the ConfigRecord KEY:

    train     arrays, config  ->  the node's metrics and public key; its update stays in context.state
    hello     Parameters      ->  Hello
    share     Roster          ->  Shares
    receive   any other       ->  the answer, if there is one; with the last, how many numbers were clipped

Mods listed after this one see arrays as ever, before they are shared; those before it see what is sent.

Between messages a node may move to another process (Ray's actors serve any node), so the client lives in context.state:
see aggregate/secure/resumable.py for what that asks of whoever keeps it. An update goes into one session only, or two
sums would differ by it; metrics go to the server as they are.

What it cannot help against: whoever starts a run brings the code of its ClientApp, and may leave this mod out.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anabranch.aggregate.secure.errors import ProtocolError
from anabranch.aggregate.secure.keys import Identity
from anabranch.aggregate.secure.parameters import Parameters, Proof
from anabranch.aggregate.secure.resumable import Once, ResumableClient
from anabranch.integrations.flower.arrays import Sent
from anabranch.integrations.flower.replies import read_update

try:
    from flwr.app import ConfigRecord, Context, Message, RecordDict
except ImportError as error:
    raise ImportError("SecureMod needs flwr>=1.40: pip install 'anabranch[flower,secure]'") from error

KEY = "anabranch.secure"  # of the ConfigRecord in messages, and of the one in context.state


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureMod:
    """What a node asks of a session before it takes part; a mod of `ClientApp`.

    privacy      least T: the server and any T nodes together learn no more than the sum
    proof        of the sum, exactly this; see Parameters
    most_weight  largest weight in a session: one that outweighs all others would make the sum its owner's vector
    known        public keys of all nodes there are; None to believe the server, which could then invent all but one
    identity     32 secret bytes of the node's Ed25519 key, from the node itself: read from a file that
                 context.node_config names, say. None for a key made at the first message and kept in context.state
    group_key    32 bytes that nodes know and the server does not, for proof V1
    once         folder on the node that outlasts its processes: with it no state answers twice, nor does an update go
                 into two sessions, even if context.state is brought back from a copy or two messages come at once
    """

    privacy: int = 1
    proof: Proof = "V2"
    most_weight: int = 1
    known: frozenset[bytes] | None = None
    identity: Callable[[Context], bytes] | None = None
    group_key: bytes | None = None
    once: Path | None = None

    def __call__(self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        """Answers training's messages; others, evaluation's say, go through."""
        if not message.metadata.message_type.startswith("train"):
            return call_next(message, context)
        if KEY not in message.content.config_records:
            raise ValueError(f"this node trains for secure sums only: no ConfigRecord {KEY!r}; use SecureFedAvg")
        asked = dict(message.content.config_records[KEY])
        state = dict(context.state.config_records.get(KEY, {}))
        if "identity" not in state:
            state["identity"] = secrets.token_bytes(32) if self.identity is None else self.identity(context)
        step, identity = asked.get("step"), Identity(state["identity"])
        if step == "train":
            del message.content[KEY]
            reply = self._train(asked, state, message, lambda: call_next(message, context))
            reply[KEY] = ConfigRecord({"identity": identity.public})
        else:
            steps = {"hello": self._hello, "share": self._share, "receive": self._receive}
            if step not in steps:
                raise ValueError(f"step must be one of {['train', *steps]}, got {step!r}")
            reply = RecordDict({KEY: ConfigRecord(steps[step](asked, state, identity))})
        context.state[KEY] = ConfigRecord(state)
        return Message(content=reply, reply_to=message)

    def _train(
        self, asked: dict[str, Any], state: dict[str, Any], message: Message, train: Callable[[], Message]
    ) -> RecordDict:
        """The metrics of the node's own training, whose update is kept."""
        if len(message.content.array_records) != 1:
            raise ValueError(f"one ArrayRecord is wanted, not {len(message.content.array_records)}")
        (record,) = message.content.array_records.values()
        sent = Sent({name: array.numpy() for name, array in record.items()})
        update = read_update(0, train().content, sent, str(asked.get("weighted_by")))
        row = update.row.numpy()
        for name in ("parameters", "client"):
            state.pop(name, None)
        state |= {"vector": row.tobytes(), "dtype": str(row.dtype), "update": secrets.token_bytes(16)}
        return RecordDict(dict(update.content.metric_records.items()))

    def _hello(self, asked: dict[str, Any], state: dict[str, Any], identity: Identity) -> dict[str, Any]:
        if "vector" not in state or "client" in state:
            raise ProtocolError("server", "opened a session without an update of its own to share")
        parameters = Parameters.decode(_given(asked, "parameters", bytes))
        if parameters.length * np.dtype(state["dtype"]).itemsize != len(state["vector"]):
            raise ProtocolError("server", f"its session has vectors of {parameters.length}, unlike the arrays it sent")
        self._check(parameters, identity)
        index = parameters.identities.index(identity.public)
        client = ResumableClient(parameters, index, identity, group_key=self.group_key)
        if self.once is not None:
            Once(self.once).take(state["update"])
        del state["update"]
        state |= {"parameters": parameters.encode(), "client": client.state()}
        return {"message": client.hello()}

    def _check(self, parameters: Parameters, identity: Identity) -> None:
        """Raises ProtocolError for a session that asks for more trust than this node has."""
        if identity.public not in parameters.identities:
            raise ProtocolError("server", "its session knows another key of this node")
        if self.known is not None and not set(parameters.identities) <= self.known:
            raise ProtocolError("server", "its session has nodes that are not known here")
        if parameters.privacy < self.privacy:
            raise ProtocolError("server", f"its session has T = {parameters.privacy}; here {self.privacy} is the least")
        if (most := max(parameters.all_weights)) > self.most_weight:
            raise ProtocolError("server", f"its session has weights up to {most}; here {self.most_weight} is the most")
        if parameters.proof != self.proof:
            raise ProtocolError("server", f"its session has proof {parameters.proof}; here {self.proof} is asked for")

    def _share(self, asked: dict[str, Any], state: dict[str, Any], identity: Identity) -> dict[str, Any]:
        client = self._resume(state, identity)
        if "vector" not in state:
            raise ProtocolError("server", "asked for a vector that was shared before")
        client.receive(_given(asked, "message", bytes))
        vector = torch.from_numpy(np.frombuffer(state.pop("vector"), state.pop("dtype")).copy())
        return self._keep(client, bytes(client.share(_given(asked, "round", int), vector)), state)

    def _receive(self, asked: dict[str, Any], state: dict[str, Any], identity: Identity) -> dict[str, Any]:
        client = self._resume(state, identity)
        return self._keep(client, client.receive(_given(asked, "message", bytes)), state)

    def _resume(self, state: dict[str, Any], identity: Identity) -> ResumableClient:
        if "client" not in state:
            raise ProtocolError("this node", "is in no session")
        parameters = Parameters.decode(state["parameters"])
        return ResumableClient.resume(state["client"], parameters, identity, group_key=self.group_key)

    def _keep(self, client: ResumableClient, answer: bytes | None, state: dict[str, Any]) -> dict[str, Any]:
        """The answer, once the state it was made from cannot answer again."""
        if self.once is not None:
            Once(self.once).take(state["client"])
        state["client"] = client.state()
        if client.outcome is None:
            return {} if answer is None else {"message": answer}
        del state["client"], state["parameters"]
        return {"clipped": client.outcome.clipped}


def _given(asked: dict[str, Any], name: str, kind: type) -> Any:
    if type(asked.get(name)) is not kind:
        raise ProtocolError("server", f"gave no {name} of type {kind.__name__}")
    return asked[name]
