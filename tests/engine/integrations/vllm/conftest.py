"""A stand-in for vLLM: the few names of 0.33.0 that the plug-in imports, with the signatures they have there."""

import sys
from abc import ABC, abstractmethod
from enum import Enum, StrEnum
from types import ModuleType, SimpleNamespace
from typing import Generic, TypeVar

import pytest

BACKEND = "anabranch.integrations.vllm.backend"
M = TypeVar("M")


class AttentionBackend(ABC):
    supported_kv_cache_dtypes = ("auto", "float16", "bfloat16")
    forward_includes_kv_cache_update = True

    @staticmethod
    @abstractmethod
    def get_name(): ...

    @staticmethod
    @abstractmethod
    def get_impl_cls(): ...

    @staticmethod
    @abstractmethod
    def get_builder_cls(): ...


class AttentionImpl(ABC, Generic[M]):
    @abstractmethod
    def __init__(self, num_heads, head_size, scale, num_kv_heads=None): ...

    @abstractmethod
    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output): ...


class AttentionMetadataBuilder(ABC, Generic[M]):
    @abstractmethod
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.kv_cache_spec, self.layer_names, self.vllm_config, self.device = (
            kv_cache_spec,
            layer_names,
            vllm_config,
            device,
        )

    @abstractmethod
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False): ...


class AttentionType(StrEnum):
    DECODER = "decoder"
    ENCODER = "encoder"


class KVCacheLayout(Enum):
    """Physical order of layers, blocks, heads, tokens (N) and content."""

    LBHNC = (0, 1, 2, 3, 4)
    LBNHC = (0, 1, 3, 2, 4)
    LHBNC = (0, 2, 1, 3, 4)
    BLHNC = (1, 0, 2, 3, 4)

    @property
    def is_block_compact(self):
        return set(self.value[:2]) == {0, 1}


class AttentionBackendEnum(Enum):
    FLASH_ATTN = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
    CUSTOM = None


@pytest.fixture
def vllm(monkeypatch):
    """What was registered, by member; the modules are gone after the test, and so is the back-end built on them."""
    registered = {}
    modules = {
        "vllm": {},
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.attention.backend": {
            "AttentionBackend": AttentionBackend,
            "AttentionImpl": AttentionImpl,
            "AttentionMetadataBuilder": AttentionMetadataBuilder,
            "AttentionType": AttentionType,
            "CommonAttentionMetadata": SimpleNamespace,
        },
        "vllm.v1.attention.backends": {},
        "vllm.v1.attention.backends.registry": {
            "AttentionBackendEnum": AttentionBackendEnum,
            "register_backend": registered.__setitem__,
        },
        "vllm.v1.kv_cache_interface": {"KVCacheLayout": KVCacheLayout},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, BACKEND, raising=False)
    yield registered
    sys.modules.pop(BACKEND, None)
