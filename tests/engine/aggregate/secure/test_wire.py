"""Bytes from outside: they are a message that encodes to the same bytes, or they are refused and leave no trace."""

import subprocess
import sys
from pathlib import Path

import cbor2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.aggregate.secure import local
from anabranch.aggregate.secure import messages as m
from anabranch.aggregate.secure.errors import ProtocolError
from anabranch.aggregate.secure.filtration import Filtration, Hash
from anabranch.aggregate.secure.wire import SIGNATURE, read, to_bytes, to_elements, write
from anabranch_kernels.field_coding.op import BABYBEAR, FIELDS, GOLDILOCKS


@pytest.fixture(scope="module")
def recorded(session):
    """One message of each kind, as a round in mask mode with V1's tags and one with V2's proof send them."""
    found = {}
    for number, changes in enumerate(({"proof": "V2", "mode": "mask"}, {"proof": "V2"}, {"proof": "V1"}), start=1):
        made = session(met=False, length=5, **changes)

        def wire(client, to_server, message, made=made):
            found.setdefault((made.parameters.digest, type(made.message(message))), (made.parameters, bytes(message)))
            return message

        for client in made.clients.values():
            made.server.receive(wire(0, True, client.hello()))
        for i, roster in made.server.advance().items():
            made.clients[i].receive(wire(0, False, roster))
        made.check(made.round(number, wire))
        server, clients = made.filters(Filtration(classes=3, bits=5), number)
        hashed = Hash(torch.ones(3, 5, dtype=torch.bool), torch.ones(3, dtype=torch.bool))
        local.run_filter(server, clients, dict.fromkeys(clients, hashed), wire)
    assert {kind for _, kind in found} == set(m.KINDS)
    return list(found.values())


@st.composite
def edits(draw):
    """A change to a byte string, as a function of it."""
    kind = draw(st.sampled_from(["flip", "cut", "extend", "insert", "delete", "swap", "length"]))
    at, length = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 40))
    junk = draw(st.binary(min_size=length, max_size=length))
    bit = draw(st.integers(0, 7))

    def edit(data):
        k = int(at * len(data))
        if kind == "flip":
            return data[:k] + bytes([data[k] ^ 1 << bit]) + data[k + 1 :]
        if kind == "cut":
            return data[:k]
        if kind == "extend":
            return data + junk
        if kind == "insert":
            return data[:k] + junk + data[k:]
        if kind == "delete":
            return data[:k] + data[k + length :]
        if kind == "length":
            return junk[:4].ljust(4, b"\0") + data[4:]
        return data[:k] + data[k + length : k + 2 * length] + data[k : k + length] + data[k + 2 * length :]

    return edit


def decodes_to_itself_or_not_at_all(data, parameters):
    try:
        frame = read(data, parameters)
    except m.Malformed:
        return
    assert frame.encode() == data
    assert frame.header.encode(parameters) == frame.signed


@given(st.data())
def test_edited_messages_decode_to_themselves_or_not_at_all(recorded, data):
    parameters, message = recorded[data.draw(st.integers(0, len(recorded) - 1))]
    for edit in data.draw(st.lists(edits(), min_size=1, max_size=3)):
        message = edit(message) or b"\0"
    decodes_to_itself_or_not_at_all(message, parameters)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=40) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=10) | st.dictionaries(st.integers(0, 3), inner, max_size=3),
    max_leaves=20,
)


@given(st.data())
def test_headers_of_other_things_decode_to_themselves_or_not_at_all(recorded, data):
    """Any one item of a good header is replaced by any CBOR."""
    parameters, message = recorded[data.draw(st.integers(0, len(recorded) - 1))]
    frame = read(message, parameters)
    header = cbor2.loads(frame.signed)
    path = header
    for _ in range(data.draw(st.integers(0, 2))):
        inner = [one for one in path if isinstance(one, list) and one]
        path = data.draw(st.sampled_from(inner)) if inner else path
    path[data.draw(st.integers(0, len(path) - 1))] = data.draw(plain)
    signed = cbor2.dumps(header, canonical=data.draw(st.booleans()))
    rest = message[4 + len(frame.signed) :]
    decodes_to_itself_or_not_at_all(len(signed).to_bytes(4, "little") + signed + rest, parameters)


@given(st.binary(max_size=300))
def test_noise_is_no_message(recorded, data):
    for parameters, _ in recorded[:1]:
        with pytest.raises(m.Malformed):
            read(data, parameters)


def differs_where_a_recipient_looks(bad, message, parameters):
    """Only in sealed shares, which are not the server's to open."""
    try:
        one, other = read(bad, parameters), read(message, parameters)
    except m.Malformed:
        return False
    rest = set(range(len(one.parts))) - set(one.header.message.vouched())
    return (one.signed, one.signature, [one.parts[k] for k in rest]) == (
        other.signed, other.signature, [other.parts[k] for k in rest],
    )  # fmt: skip


@settings(max_examples=25)  # of whole rounds
@given(st.data())
def test_bad_messages_leave_no_trace(session, data):
    """Before each message of a round its recipient gets an edited one."""
    made = session(N=6, length=5, blocks=1, dropouts=1)
    edit = data.draw(edits())
    number = data.draw(st.integers(0, 60))
    count = 0

    def wire(client, to_server, message):
        nonlocal count
        count += 1
        if count == number or number == 0:
            bad = edit(bytes(message))
            if bad != message and not differs_where_a_recipient_looks(bad, message, made.parameters):
                with pytest.raises(ProtocolError):
                    (made.server if to_server else made.clients[client]).receive(bad)
        return message

    made.check(made.round(1, wire))
    assert len(made.finished()) == 6


def change_header(message, parameters, change):
    frame = read(message, parameters)
    header = cbor2.loads(frame.signed)
    change(header)
    signed = cbor2.dumps(header, canonical=True)
    return len(signed).to_bytes(4, "little") + signed + message[4 + len(frame.signed) :]


@pytest.mark.parametrize(
    ("item", "value", "match"),
    [
        (0, 1, "another session, or to other parameters"),
        (2, 2**31 - 1, "another session, or to other parameters"),
        (3, bytes(32), "another session, or to other parameters"),
        (1, 99, "integer of 0 to 15"),
        (4, 2**32, "integer of 0 to 4294967295"),
        (5, -1, "integer of 0 to 9"),
        (5, True, "integer of 0 to 9"),
        (8, [], "needs a list of 1"),
        (0, 2.0, "not canonical"),
        (2, float(BABYBEAR.p), "not canonical"),
    ],
)
def test_headers_that_do_not_belong_here(recorded, item, value, match):
    parameters, message = next(one for one in recorded if type(read(one[1], one[0]).header.message) is m.Sum)
    with pytest.raises(m.Malformed, match=match):
        read(change_header(message, parameters, lambda header: header.__setitem__(item, value)), parameters)


def test_cbor_that_is_not_canonical(recorded):
    parameters, message = recorded[0]
    frame = read(message, parameters)
    assert frame.signed[0] == 0x89  # a list of nine
    for longer in (b"\x98\x09" + frame.signed[1:], b"\x9f" + frame.signed[1:] + b"\xff"):
        data = len(longer).to_bytes(4, "little") + longer + message[4 + len(frame.signed) :]
        with pytest.raises(m.Malformed, match="CBOR"):
            read(data, parameters)


def test_a_header_too_long_is_not_looked_at(recorded):
    parameters, _ = recorded[0]
    with pytest.raises(m.Malformed, match="longer than the message or than allowed"):
        read((1 << 20).to_bytes(4, "little") + bytes(1 << 20) + bytes(SIGNATURE), parameters)


def test_what_the_signature_and_the_digests_are_for(session):
    made = session()
    hello = session(met=False).clients[0]
    share = bytearray(made.clients[0].share(1, made.vectors[0]))
    made.server.begin(1)
    end = 4 + int.from_bytes(share[:4], "little")
    share[end] ^= 1
    with pytest.raises(ProtocolError, match="unknown sender: not signed by client 0"):
        made.server.receive(bytes(share))
    share[end] ^= 1
    made.server.receive(bytes(share))
    with pytest.raises(ProtocolError, match="client 0: sent Shares twice"):
        made.server.receive(bytes(share))
    with pytest.raises(ProtocolError, match="client 0: sent Hello of round 0; Shares of round 1 is due"):
        made.server.receive(hello.hello())


@pytest.mark.parametrize("settings", [{"mode": "mask"}, {"proof": "V1"}])
def test_parts_are_those_of_the_header(session, settings):
    """But for sealed shares, which their recipients compare: a changed one is a dispute between two clients."""
    made = session(**settings)
    share = bytearray(made.clients[0].share(1, made.vectors[0]))
    made.server.begin(1)
    share[-1] ^= 1
    with pytest.raises(ProtocolError, match="client 0: a part differs from its digest"):
        made.server.receive(bytes(share))
    share[-1] ^= 1
    made.server.receive(bytes(share))


def test_a_share_that_changes_on_its_way_is_refused_by_its_recipient(session):
    made = session()

    def wire(client, to_server, message):
        if client == 0 and to_server and isinstance(made.message(message), m.Shares):
            changed = bytearray(message)
            changed[-1] ^= 1  # of the share for client 8
            return bytes(changed)
        return message

    outcome = made.round(wire=wire)
    made.check(outcome)
    assert outcome.wrong == (8,)  # one of two is to blame, as if client 0 had sealed nonsense


def test_one_client_cannot_speak_for_another(session):
    made = session()
    made.server.begin(1)
    frame = read(made.clients[0].share(1, made.vectors[0]), made.parameters)
    forged = write(
        frame.header.message, frame.parts, parameters=made.parameters, identity=made.identities[0], number=1, sender=1,
        recipient=9,
    )  # fmt: skip
    with pytest.raises(ProtocolError, match="not signed by client 1"):
        made.server.receive(forged.encode())
    with pytest.raises(ProtocolError, match="from server to client 3, not for here"):
        made.server.receive(made.forge(made.run_to(m.Delivery, 2)[3], lambda message, parts: message))


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_elements_are_little_endian_and_canonical(field):
    values = [0, 1, 258, field.p - 1]
    data = b"".join(value.to_bytes(field.bytes, "little") for value in values)
    elements = to_elements(data, field)
    assert [x % 2**64 if x < 0 else x for x in elements.tolist()] == values
    assert bytes(to_bytes(elements)) == data
    for bad in (field.p, 2 ** (8 * field.bytes) - 1):
        assert to_elements(data + bad.to_bytes(field.bytes, "little"), field) is None


def test_elements_are_copied(session):
    """Whoever owns the buffer may change it later."""
    data = bytearray(8)
    elements = to_elements(data, BABYBEAR)
    data[:] = b"\1" * 8
    assert torch.equal(elements, torch.zeros(2, dtype=torch.int32))
    assert to_elements(b"", GOLDILOCKS).shape == (0,)


@pytest.mark.slow
def test_the_fuzzer_finds_nothing_in_a_moment():
    pytest.importorskip("atheris", reason="atheris is not installed")
    script = Path(__file__).with_name("fuzz_wire.py")
    command = [sys.executable, str(script), "-runs=20000", "-seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
