"""For atheris: any bytes decode to a message that encodes to the same bytes, or are refused as malformed.

python fuzz_wire.py -max_total_time=60
"""

import json
import sys
from hashlib import sha256
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["anabranch.aggregate.secure"]):
    from anabranch.aggregate.secure.keys import Identity
    from anabranch.aggregate.secure.messages import Malformed
    from anabranch.aggregate.secure.parameters import Parameters
    from anabranch.aggregate.secure.wire import read

from anabranch_kernels.field_coding.op import FixedPoint

KEYS = [Identity(sha256(f"identity {i}".encode()).digest()).public for i in range(6)]
PARAMETERS = Parameters(  # those of golden.json's first case of full messages
    session=sha256(b"session").digest(), identities=tuple(KEYS[:5]), server=KEYS[5], length=4,
    fixed_point=FixedPoint(clip=1.0, fraction_bits=16), blocks=2, privacy=1, errors=1,
)  # fmt: skip
GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())["babybear direct V2"]
SEEDS = [bytes.fromhex(message) for kind, message in GOLDEN.items() if kind != "parameters"]


def one_input(data: bytes) -> None:
    """The first byte chooses a message to which the rest is added, or none."""
    if data and data[0] <= len(SEEDS):
        seed = SEEDS[data[0] - 1] if data[0] else b""
        data = (
            bytes(a ^ b for a, b in zip(seed, data[1:].ljust(len(seed), b"\0"), strict=False)) + data[1 + len(seed) :]
        )
    try:
        frame = read(data, PARAMETERS)
    except Malformed:
        return
    assert frame.encode() == data


assert PARAMETERS.digest.hex() == GOLDEN["parameters"]
atheris.Setup(sys.argv, one_input)
atheris.Fuzz()
