// Kernels for AVX-512, and the bfloat16 ones with their special instruction spelt out.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

// Standard headers come first: only our own templates, whose types name the instruction set, may be compiled for it.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "simd_avx512.h"
#include "kernels_of.h"

namespace anabranch {

const Kernels& avx512_kernels() {
  static constexpr Kernels kernels = kernels_of<Avx512>();
  return kernels;
}

const Kernels& avx512_bf16_emulated_kernels() {
  static constexpr Kernels kernels = kernels_of<Avx512Pairs<false>>();
  return kernels;
}

}  // namespace anabranch

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
