from .reference import paged_attention, store_kv
