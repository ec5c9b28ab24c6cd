"""The attention of this package inside Hugging Face transformers, under the name "anabranch".

    from anabranch.integrations.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="anabranch")

Any model that goes through transformers' AttentionInterface takes it; Llama, Qwen2, Qwen3 and Mistral are tested. K and
V may differ in number and width of heads, which no attention function of transformers allows.

Which op runs (transformers decides what is seen, this module by whom):
  no mask, or one that consists of causal pieces        `attention`, differentiable, a call for each kind of piece
  the same on a CPU, for few queries, without gradients `paged_attention`, which reads transformers' cache where it lies
  any other mask, and every mask under torch.compile    torch's scaled_dot_product_attention with that mask
Asked for what none of them does (dropout, soft caps, sinks, weights of the attention) it raises ValueError.

Rows that see no key (padding) come out as zeros. transformers cannot forget a name; an unused one costs nothing.
"""

from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.integrations.causal_runs import Run, causal_runs
from anabranch_kernels.attention.op import attention
from anabranch_kernels.paged_attention.op import QUERY_DTYPES, paged_attention

NAME = "anabranch"
FEW = 8  # queries up to which paged_attention, one pass over K and V for all heads that share them, is the faster op


def register() -> None:
    """Make `attn_implementation="anabranch"` known to transformers. Calling it again changes nothing.

    Raises ImportError if transformers is missing or builds its masks from other arguments than those known here.
    """
    from inspect import signature

    try:
        from transformers import AttentionInterface, AttentionMaskInterface, __version__
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            "anabranch.integrations.transformers needs transformers>=5 (pip install transformers)"
        ) from error
    if "q_length" not in signature(sdpa_mask).parameters:
        raise ImportError(f"need a transformers whose masks are made from q_length, as in 5.24; got {__version__}")
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)


def make_mask(*, q_length: int, kv_length: int, allow_is_causal_skip: bool = True, **options: Any) -> Tensor | None:
    """transformers' own boolean mask [B, 1, T, S]; None where T = S or T = 1 and plain causality says it all.

    transformers also leaves it out before an empty static cache (T < S, where the last keys are empty). `attend` would
    have to guess which keys are meant, so that one is made.
    """
    from transformers.masking_utils import sdpa_mask

    skip = allow_is_causal_skip and (q_length in (1, kv_length))
    mask: Tensor | None = sdpa_mask(q_length=q_length, kv_length=kv_length, allow_is_causal_skip=skip, **options)
    return mask


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it, for K and V of their own numbers and widths of heads.

    module          of whom `is_causal` is read when the argument is None; True if it has none
    query           [B, Hq, T, Dk]  float64, float32, bfloat16 or float16
    key             [B, Hk, S, Dk]  Hk and Hv divide Hq
    value           [B, Hv, S, Dv]
    attention_mask  [B or 1, Hq or 1, T, S] booleans (true: seen) or numbers to add to the scores; None: causal if
                    T = S, every key if T = 1
    scaling         of the scores; 1 / sqrt(Dk) if None
    sliding_window  a query sees the last so many keys; with a mask the mask says it
    returns         [B, T, Hq, Dv] in query's dtype, and None for the weights, which are never formed

    Raises ValueError for shapes that do not fit and for options that this attention does not have.
    """
    _refuse(options, dropout)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scale = 1 / sqrt(q.shape[3]) if scaling is None else scaling
    if attention_mask is not None:
        return _masked(q, k, v, _checked(attention_mask, q, k), scale), None
    T, S = q.shape[1], k.shape[1]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if options.get("cu_seq_lens_q") is not None and len(options["cu_seq_lens_q"]) > 2:
        raise ValueError(
            "sequences packed into one row need position_ids (then transformers makes their mask), got none"
        )
    if causal and T not in (1, S):
        raise ValueError(f"which of the keys are seen is unclear without a mask: got T={T} queries, S={S} keys")
    if not causal and T > 1 and sliding_window is not None and sliding_window < S:
        raise ValueError(f"a window that looks both ways needs a mask, got {sliding_window=} and S={S} keys")
    window = sliding_window if causal or T == 1 else None
    return _plain(q, k, v, causal or T == 1, window, scale), None


def _refuse(options: dict[str, Any], dropout: float) -> None:
    if dropout:
        raise ValueError(f"this attention has no dropout, got dropout={dropout}; set attention_dropout=0 in the config")
    for name in ("softcap", "s_aux", "sinks", "position_bias", "head_mask", "indices", "block_indices"):
        if options.get(name) is not None:
            raise ValueError(f"this attention has no {name}; use attn_implementation='eager' for this model")
    if options.get("output_attentions"):
        raise ValueError(
            "this attention never forms its weights; use attn_implementation='eager' for output_attentions"
        )


def _checked(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    B, T, Hq, _ = q.shape
    wanted = f"[{B} or 1, {Hq} or 1, {T}, {k.shape[1]}] of booleans or floats"
    if not isinstance(mask, Tensor):
        raise ValueError(f"attention_mask must be a tensor {wanted}, got {type(mask).__name__}")
    fits = mask.ndim == 4 and mask.shape[0] in (1, B) and mask.shape[1] in (1, Hq) and mask.shape[2:] == (T, k.shape[1])
    if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(f"attention_mask must be {wanted}, got {list(mask.shape)} {mask.dtype}")
    return mask


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[B, T, Hq, Dk], [B, S, Hk, Dk], [B, S, Hv, Dv] -> [B, T, Hq, Dv]: piece by piece if the mask allows."""
    readable = mask.dtype == torch.bool and mask.numel() > 0 and not torch.compiler.is_compiling()
    runs = _known_runs(mask) if readable else None
    if runs is None:
        Hq = q.shape[2]
        wide_k, wide_v = (x.repeat_interleave(Hq // x.shape[2], 2).transpose(1, 2) for x in (k, v))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), wide_k, wide_v, attn_mask=mask, scale=scale)
        return out.transpose(1, 2).contiguous()
    everyone = mask.shape[0] == 1  # one mask for all sequences
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for run in runs:
        b = slice(None) if everyone else slice(run.b0, run.b1)
        t, s = slice(run.t0, run.t1), slice(run.lo, run.hi)
        piece = _plain(q[b, t], k[b, s], v[b, s], True, run.window, scale)
        if piece.shape == out.shape:
            return piece
        out[b, t] = piece
    return out


def _known_runs(mask: Tensor) -> list[Run] | None:
    """causal_runs(mask), kept on the mask while that stays unchanged: all layers of a pass are handed the same one."""
    if mask.is_inference():  # such tensors do not tell whether they were written to
        return causal_runs(mask)
    known: tuple[int, list[Run] | None] | None = getattr(mask, "_anabranch_runs", None)
    if known is None or known[0] != mask._version:
        known = mask._version, causal_runs(mask)
        mask._anabranch_runs = known  # type: ignore[attr-defined]
    return known[1]


def _plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float) -> Tensor:
    """[B, T, Hq, Dk], [B, S, Hk, Dk], [B, S, Hv, Dv] -> [B, T, Hq, Dv]; causal: the last query sees all S keys."""
    B, T, Hq, _ = q.shape
    S = k.shape[1]
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    shares = Hq > min(k.shape[2], v.shape[2])
    decodes = 0 < T <= FEW and shares and causal and q.device.type == "cpu" and q.dtype in QUERY_DTYPES
    if trains or not decodes:
        return attention(q, k, v, causal=causal, scale=scale, window=window)
    # transformers' cache [B, H, S, D] is a paged one: sequence b has the one page b, of S tokens.
    k_pages, v_pages = (x.transpose(1, 2) if x.stride(3) == 1 else x.transpose(1, 2).contiguous() for x in (k, v))
    cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32)
    page_table = torch.arange(B, dtype=torch.int32)[:, None]
    seq_lens = torch.full((B,), S, dtype=torch.int32)
    rows = q.reshape(B * T, Hq, q.shape[3])
    out = paged_attention(rows, k_pages, v_pages, page_table, seq_lens, cu_seqlens, scale=scale, window=window)
    assert isinstance(out, Tensor)
    return out.view(B, T, Hq, v.shape[3])
