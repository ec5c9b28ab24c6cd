"""The weights that llama.cpp is given are ours under its names and in its rotary order."""

import pytest
import torch

from anabranch.bench.engine import TINY, check_agreement, save_random_model
from anabranch.bench.llama_cpp_peer import LlamaCppPeer, gguf_name, interleave_rotary, write_gguf
from anabranch.bench.transformers_peer import TransformersPeer
from anabranch.common.checkpoint import Checkpoint


def test_every_tensor_of_a_llama_has_a_name(tmp_path):
    save_random_model(TINY, tmp_path)
    names = [gguf_name(name) for name in Checkpoint(tmp_path).shapes]
    assert len(set(names)) == len(names) == 2 + 9 * TINY.layers
    assert "blk.1.attn_output.weight" in names


def test_turning_neighbours_equals_turning_halves():
    """Scores of rotated q and k do not change when both are permuted and the other pairs are turned."""
    width, heads, hidden = 8, 2, 6
    random = torch.Generator().manual_seed(0)
    wq, wk = torch.randn(2, heads * width, hidden, generator=random, dtype=torch.float64)
    x, y = torch.randn(2, hidden, generator=random, dtype=torch.float64)
    turn = torch.polar(torch.ones(width // 2, dtype=torch.float64), torch.arange(4.0, dtype=torch.float64) + 0.5)

    def by_halves(vector):
        first, second = vector.view(heads, 2, width // 2).unbind(1)
        return torch.complex(first, second)

    def by_neighbours(vector):
        return torch.view_as_complex(vector.view(heads, width // 2, 2))

    expected = (by_halves(wq @ x) * turn * by_halves(wk @ y).conj()).real.sum(-1)
    q, k = (interleave_rotary(weight, width) for weight in (wq, wk))
    got = (by_neighbours(q @ x) * turn * by_neighbours(k @ y).conj()).real.sum(-1)
    torch.testing.assert_close(got, expected)


def test_llama_cpp_predicts_what_transformers_predicts(tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is an optional peer")
    pytest.importorskip("gguf", reason="gguf is an optional peer's format")
    save_random_model(TINY, tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf")
    peer = LlamaCppPeer(tmp_path / "model.gguf", batch=2, length=600, threads=1)
    prompt = torch.randint(TINY.vocab_size, (530,), generator=torch.Generator().manual_seed(0)).tolist()
    check_agreement([TransformersPeer(tmp_path), peer], prompt)
    peer.start([prompt[:20], prompt[20:40]])
    assert peer.decode(3) > 0
    tokens = peer.tokens
    assert peer.decode(3) > 0
    assert peer.tokens == tokens  # as before
    assert peer.prefill(prompt[:30]) > 0
    peer.close()
