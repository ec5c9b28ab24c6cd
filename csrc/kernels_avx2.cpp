// Kernels for AVX2 with FMA.
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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "simd_avx2.h"
#include "kernels_of.h"

namespace anabranch {

const Kernels& avx2_kernels() {
  static constexpr Kernels kernels = kernels_of<Avx2>();
  return kernels;
}

}  // namespace anabranch

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
