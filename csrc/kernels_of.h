// The table of kernels for one instruction set; each kernels_*.cpp compiles it once under its own target options.
#pragma once

#include "attention_kernel.h"
#include "linear_kernel.h"

namespace anabranch {

template <class S>
uint64_t read_all(const void* data, int64_t bytes) {
  const auto* words = static_cast<const uint64_t*>(data);
  uint64_t sum[8] = {};
  for (int64_t i = 0; i + 8 <= bytes / 8; i += 8) {
    S::prefetch(reinterpret_cast<const char*>(words + i) + 4096);
    for (int j = 0; j < 8; ++j) sum[j] ^= words[i + j];
  }
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ sum[4] ^ sum[5] ^ sum[6] ^ sum[7];
}

template <class S>
constexpr Kernels kernels_of() {
  return {
      [](const AttentionCall& call, int tokens) { return AttentionKernel<S>::scratch_floats(call, tokens); },
      [](const AttentionCall& call, const AttentionItem& item, float* scratch) {
        AttentionKernel<S>(call, item, scratch).attend();
      },
      [](const AttentionCall& call, const AttentionItem& item, float* scratch, float* scores, int64_t stride) {
        AttentionKernel<S>(call, item, scratch).score(scores, stride);
      },
      [](const LinearCall& call) { return LinearKernel<S>(call).scratch_floats(); },
      [](const LinearCall& call, float* packed) { LinearKernel<S>(call).pack(packed); },
      [](const LinearCall& call, const float* packed, int64_t begin, int64_t end) {
        LinearKernel<S>(call).rows(packed, begin, end);
      },
      read_all<S>,
  };
}

}  // namespace anabranch
