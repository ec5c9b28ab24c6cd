import pytest

from anabranch.serve.blocks import BlockPool, block_hash, root_hash


def test_blank_blocks_go_first_then_the_least_recently_used_tail():
    pool = BlockPool(4)
    first, second, third = pool.allocate(3)
    for block in (first, second, third):
        pool.register(block, bytes([block]))
    pool.release([first, second])  # tails age first: second, then first
    pool.release([third])
    assert pool.num_free == 4
    blank = next(block for block in range(4) if block not in (first, second, third))
    assert pool.allocate(4) == [blank, second, first, third]


def test_no_salt_and_no_adapter_has_the_root_of_another():
    pairs = [(salt, adapter) for salt in ("", "a", "\0", "ÿ", "\0" * 8) for adapter in (None, 0, 1, 97, 255)]
    assert len({root_hash(*pair) for pair in pairs}) == len(pairs)


def test_a_cached_block_is_found_held_and_survives_until_it_is_needed():
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.register(block, b"x")
    pool.release([block])
    assert pool.find([b"x", b"y"]) == [block]
    pool.hold([block])
    pool.hold([block])
    assert (pool.refs[block], pool.num_free) == (2, 1)
    pool.release([block])
    pool.release([block])
    assert pool.find([b"x"]) == [block]
    assert len(pool.allocate(2)) == 2
    assert pool.find([b"x"]) == []


def test_find_stops_at_the_first_gap():
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for block, digest in zip(blocks, (b"a", b"b", b"c"), strict=True):
        pool.register(block, digest)
    pool.forget([blocks[1]])
    assert pool.find([b"a", b"b", b"c"]) == blocks[:1]


def test_equal_content_keeps_its_first_block():
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.register(first, b"x")
    pool.register(second, b"x")
    pool.release([second])
    assert pool.find([b"x"]) == [first]
    assert pool.blank == [second]


def test_forgotten_blocks_are_blank_whether_held_or_not():
    pool = BlockPool(2)
    held, idle = pool.allocate(2)
    pool.register(held, b"h")
    pool.register(idle, b"i")
    pool.release([idle])
    pool.forget([held, idle])
    assert pool.find([b"h"]) == pool.find([b"i"]) == []
    assert pool.blank == [idle]
    pool.release([held])
    assert sorted(pool.blank) == sorted([held, idle])
    assert not pool.cached


def test_a_hash_names_salt_history_and_tokens():
    root = root_hash()
    assert block_hash(root, [1, 2]) == block_hash(root_hash(""), (1, 2))
    different = {
        block_hash(root, [1, 2]),
        block_hash(root, [2, 1]),
        block_hash(root, [258]),  # bytes 2, 1 of one token are not two tokens
        block_hash(root_hash("tenant"), [1, 2]),
        block_hash(block_hash(root, [1, 2]), [1, 2]),
    }
    assert len(different) == 5


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        BlockPool(0)
