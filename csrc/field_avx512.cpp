// Field kernels for AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "field_coding.h"
#include "scalar.h"

// What is not ours alone comes first: only templates whose types name the instruction set may be compiled for it.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")
#endif

#include "field_lanes_avx512.h"
#include "field_kernels_of.h"

namespace anabranch {
namespace {

struct Level {
  using Lanes = Lanes512;
  using Reals = Reals512;
  using Of31 = Sums31<Lanes512>;
  using Of50 = Sums50<Lanes512>;
  using Of64 = Sums64<Lanes512>;
  using Roots31 = anabranch::Roots31<Lanes512>;
  using Roots64 = anabranch::Roots64<Lanes512>;
};

}  // namespace

const FieldKernels& field_avx512_kernels() {
  static constexpr FieldKernels kernels = field_kernels_of<Level>();
  return kernels;
}

}  // namespace anabranch

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
