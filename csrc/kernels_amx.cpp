// Kernels for AVX-512 with dot products of bfloat16 pairs, and tiles.
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
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif
#define ANABRANCH_NATIVE_BF16
#include "simd_amx.h"
#include "kernels_of.h"

namespace anabranch {

const Kernels& amx_kernels() {
  static constexpr Kernels kernels = kernels_of<Amx>();
  return kernels;
}

}  // namespace anabranch

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
