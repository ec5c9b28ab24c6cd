"""The attention back-end that vLLM loads for CUSTOM: paged attention over vLLM's own blocks.

EXPERIMENTAL, see plugin.py. Written against vLLM 0.33.0: vllm/v1/attention/backend.py and its back-ends named DIFFKV.

An ordinary model needs nothing but the choice of the back-end. A model with fewer K than V heads builds its layers as

    Attention(num_heads=Hq, head_size=Dk, num_kv_heads=Hk, head_size_v=wide_v(Hk, Hv, Dv), num_value_heads=Hv, ...)

hands `value` over as [T, Hv * Dv] and takes `own_columns(out.view(T, Hq, r * Dv), Hk, Hv)` of the result; the other
columns are left as they were. Without `num_value_heads` all columns are computed, as by vLLM's DIFFKV back-ends. All
numbers of heads are those of one rank: tensor parallelism must divide Hk.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from anabranch.integrations.vllm.pages import own_columns, page_views
from anabranch_kernels.paged_attention.op import paged_attention, store_kv

try:
    from vllm.v1.attention.backend import (
        AttentionBackend,
        AttentionImpl,
        AttentionMetadataBuilder,
        AttentionType,
        CommonAttentionMetadata,
    )
    from vllm.v1.kv_cache_interface import KVCacheLayout
except ImportError as error:
    raise ImportError(
        f"anabranch's attention back-end is for vLLM 0.33.0, whose base classes were not found: {error}"
    ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class AnabranchMetadata:
    """One step's batch, without padding, as `paged_attention` takes it."""

    tokens: int
    block_table: Tensor  # [B, max_pages] int32
    seq_lens: Tensor  # [B] int32
    query_start_loc: Tensor  # [B + 1] int32


class AnabranchBuilder(AttentionMetadataBuilder[AnabranchMetadata]):
    """Takes from vLLM's batch what the op needs. No CUDA graphs around it: nobody has captured one yet."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AnabranchMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise ValueError(f"this back-end attends causally only, got causal={common.causal}")
        B = common.num_reqs
        return AnabranchMetadata(
            tokens=int(common.query_start_loc_cpu[B]),
            block_table=common.block_table_tensor[:B],
            seq_lens=common.seq_lens[:B],
            query_start_loc=common.query_start_loc[: B + 1],
        )


class AnabranchImpl(AttentionImpl[AnabranchMetadata]):
    """One layer's attention; vLLM calls `do_kv_cache_update` and then `forward`."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        *,
        num_value_heads: int | None = None,
    ) -> None:
        if alibi_slopes is not None or logits_soft_cap:
            raise ValueError(f"this back-end has no ALiBi and no soft cap, got {alibi_slopes=}, {logits_soft_cap=}")
        if attn_type != AttentionType.DECODER:
            raise ValueError(f"this back-end is for decoders, got {attn_type=}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.num_value_heads = self.num_kv_heads if num_value_heads is None else num_value_heads
        if num_heads % self.num_value_heads or self.num_value_heads % self.num_kv_heads:
            raise ValueError(
                "V heads must divide query heads and be a multiple of K heads, got "
                f"{num_heads=}, {self.num_kv_heads=}, {self.num_value_heads=}"
            )
        self.sliding_window, self.kv_cache_dtype = sliding_window, kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write new tokens into their pages.

        key           [T, Hk, Dk]
        value         [T, Hk, r Dv]  that is [T, Hv, Dv]
        kv_cache      [P, Hk, page, Dk + r Dv]
        slot_mapping  [<= T] int64; -1 for padding
        """
        T = slot_mapping.shape[0]
        k_pages, v_pages = page_views(kv_cache, self.head_size, self.num_value_heads)
        store_kv(key[:T], value[:T].reshape(T, v_pages.shape[1], v_pages.shape[3]), k_pages, v_pages, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: AnabranchMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of the new tokens over their pages.

        query   [T or more, Hq, Dk]
        output  [T or more, Hq, r Dv], written in each head's own columns; returned
        """
        if output_scale is not None or output_block_scale is not None:
            raise ValueError("this back-end does not quantise its output, got an output scale")
        if attn_metadata is None:  # vLLM measures its memory
            return output.fill_(0)
        T, Hk, Hv = attn_metadata.tokens, self.num_kv_heads, self.num_value_heads
        k_pages, v_pages = page_views(kv_cache, self.head_size, Hv)
        out = paged_attention(
            query[:T],
            k_pages,
            v_pages,
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.query_start_loc,
            scale=self.scale,
            window=self.sliding_window,
        )
        assert isinstance(out, Tensor)
        own = own_columns(output[:T], Hk, Hv)
        own.copy_(out.view(own.shape))
        return output


class AnabranchBackend(AttentionBackend):
    """What vLLM asks about the back-end before it builds one."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[AnabranchImpl]:
        return AnabranchImpl

    @staticmethod
    def get_builder_cls() -> type[AnabranchBuilder]:
        return AnabranchBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Connectors between ranks may cut pages by head, in vLLM's order of elements, which is not ours."""
        return False

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Those that keep a page's bytes in one piece; see pages.py."""
        return tuple(layout for layout in KVCacheLayout if layout.is_block_compact)
