"""The pool of cache blocks: who holds which, and which full blocks can be found again by their tokens.

A block holds the keys and values of `block_size` consecutive tokens in every layer. It is in one of three states:

    held     one or more sequences read it (`refs` counts them)
    cached   nobody holds it, but its content is known by hash and can be found again
    blank    nobody holds it and nothing is known of its content

Blank blocks are handed out first, then cached ones, least recently used first. Content never changes while its hash is
registered: only full blocks are registered, and only a block that was handed out anew is written to.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import sha256


def root_hash(salt: str = "", adapter: int | None = None) -> bytes:
    """Parent of a sequence's first block. Sequences with different salts or adapters never share a block.

    adapter   its number: keys and values depend on it
    """
    prefix = b"" if adapter is None else b"\xff" + adapter.to_bytes(8, "little")  # no salt in UTF-8 has a byte 255
    return sha256(prefix + salt.encode()).digest()


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Name of a full block: its tokens and, through the parent, all before it. SHA-256: nobody can forge one."""
    return sha256(parent + array("q", tokens).tobytes()).digest()


class BlockPool:
    """Reference counts and prefix cache over blocks 0 .. num_blocks - 1. Knows no tokens and no tensors."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.refs = [0] * num_blocks
        self.hashes: list[bytes | None] = [None] * num_blocks
        self.by_hash: dict[bytes, int] = {}
        self.blank = list(range(num_blocks - 1, -1, -1))
        self.cached: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def num_blocks(self) -> int:
        return len(self.refs)

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out: blank and cached ones."""
        return len(self.blank) + len(self.cached)

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` blocks with unknown content, each held once. The caller has looked at `num_free`."""
        assert count <= self.num_free
        blocks = []
        for _ in range(count):
            if self.blank:
                block = self.blank.pop()
            else:
                block, _ = self.cached.popitem(last=False)
                self._unname(block)
            self.refs[block] = 1
            blocks.append(block)
        return blocks

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known run at the start of `hashes`. They are not held yet."""
        blocks = []
        for digest in hashes:
            block = self.by_hash.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """One more reader for each block, held or cached."""
        for block in blocks:
            if self.refs[block] == 0:
                del self.cached[block]
            self.refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reader less for each block of a sequence. Tails age first, so a prefix outlives what hangs on it."""
        for block in reversed(blocks):
            assert self.refs[block] > 0
            self.refs[block] -= 1
            if self.refs[block] == 0:
                if self.hashes[block] is None:
                    self.blank.append(block)
                else:
                    self.cached[block] = None

    def register(self, block: int, digest: bytes) -> None:
        """Name a held, full block. If another block already has this content, that one stays the one to be found."""
        assert self.refs[block] > 0
        if digest not in self.by_hash:
            self.by_hash[digest] = block
            self.hashes[block] = digest

    def forget(self, blocks: Iterable[int]) -> None:
        """Content of these blocks is not to be trusted or kept: nobody finds them from now on."""
        for block in blocks:
            if self.hashes[block] is not None:
                self._unname(block)
                if self.refs[block] == 0:
                    del self.cached[block]
                    self.blank.append(block)

    def _unname(self, block: int) -> None:
        digest = self.hashes[block]
        assert digest is not None
        del self.by_hash[digest]
        self.hashes[block] = None
