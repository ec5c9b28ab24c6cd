// Attention over a paged cache with different numbers of K and V heads. See paged_attention.cpp for the plan.
#pragma once

#include <cstdint>
#include <string>

#include "isa.h"
#include "scalar.h"

namespace anabranch {

// One call. Strides count elements; the last dimension of every tensor is contiguous.
struct AttentionCall {
  const void* q;  // [T, Hq, Dk]
  Type q_type;
  int64_t q_token, q_head;
  const void *k, *v;  // [P, Hk, page, Dk], [P, Hv, page, Dv]
  Type k_type, v_type;
  int64_t k_page, k_head, k_slot, v_page, v_head, v_slot;
  const float *k_scales, *v_scales;  // [P, H, page], contiguous; null unless int8
  const int32_t* page_table;         // [B, max_pages]
  int64_t table_row;
  const int32_t *seq_lens, *cu_seqlens_q;
  void* out;   // [T, Hq, Dv], contiguous, type of q
  float* lse;  // [T, Hq], contiguous
  int T, B, Hq, Hk, Hv, Dk, Dv, P, page, max_pages;
  float scale;
  int window;  // 0: none
  int v_top_k;  // 0: all
  bool renormalise;

  int groups() const;  // of heads that share K and V heads among themselves: gcd(Hk, Hv)
};

// What one thread does at a time: `tokens` new tokens of one sequence, the heads of some groups, tokens [begin, end) of
// the cache. Without `partial` the result goes to out and lse; with it, unnormalised, to partial_floats() floats.
struct AttentionItem {
  int sequence, first_group, groups, first_token, tokens, begin, end;
  float* partial;
};

// Runs the call, or returns what is wrong with its tables (then nothing was read or written).
std::string paged_attention(const AttentionCall& call, Isa isa, int threads);

struct StoreCall {
  const void *k, *v;  // [T, Hk, Dk], [T, Hv, Dv]
  Type k_type, v_type;
  int64_t k_token, k_head, v_token, v_head;
  void *k_cache, *v_cache;
  Type k_cache_type, v_cache_type;
  int64_t k_page, k_cache_head, k_slot, v_page, v_cache_head, v_slot;
  float *k_scales, *v_scales;
  const int64_t* slots;  // [T]
  int T, Hk, Hv, Dk, Dv, P, page;
};

std::string store_kv(const StoreCall& call, int threads);

// The same on the current CUDA device, queued on `stream` (csrc/store_kv.cu, in the extension _cuda alone). Slots past
// the last page are skipped: the device cannot tell. Returns CUDA's error, or nothing.
std::string store_kv_cuda(const StoreCall& call, void* stream);

}  // namespace anabranch
