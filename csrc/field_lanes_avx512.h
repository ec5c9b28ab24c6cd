// Eight 64-bit lanes of AVX-512, or sixteen of 32 bits. Include only where the compiler may use avx512f, bw, dq and vl.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace anabranch {
namespace {  // internal linkage: no other file may end up with this one's instructions

struct Lanes512 {
  static constexpr int W = 8;      // lanes of 64 bits
  static constexpr int kRows = 4;  // of a register block
  using V = __m512i;

  static V load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, V a) { _mm512_storeu_si512(p, a); }
  static V zero() { return _mm512_setzero_si512(); }
  static V set(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
  static V set_half(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static V add(V a, V b) { return _mm512_add_epi64(a, b); }
  static V sub(V a, V b) { return _mm512_sub_epi64(a, b); }
  static V both(V a, V b) { return _mm512_and_si512(a, b); }
  template <int n>
  static V right(V a) { return _mm512_srli_epi64(a, n); }
  template <int n>
  static V left(V a) { return _mm512_slli_epi64(a, n); }
  static V mul(V a, V b) { return _mm512_mul_epu32(a, b); }  // of the lower halves
  static V smaller(V a, V b) { return _mm512_min_epu64(a, b); }
  static V where_less(V a, V b, V x) { return _mm512_maskz_mov_epi64(_mm512_cmplt_epu64_mask(a, b), x); }

  static V add_halves(V a, V b) { return _mm512_add_epi32(a, b); }
  static V sub_halves(V a, V b) { return _mm512_sub_epi32(a, b); }
  static V smaller_halves(V a, V b) { return _mm512_min_epu32(a, b); }
  // The upper halves of `even` where lower ones are, beside the upper halves of `odd`.
  static V upper_halves(V even, V odd) {
    return _mm512_castps_si512(
        _mm512_mask_movehdup_ps(_mm512_castsi512_ps(odd), 0x5555, _mm512_castsi512_ps(even)));
  }
  static void prefetch(const void* p) { asm volatile("prefetcht0 %0" ::"m"(*static_cast<const char*>(p))); }
};

}  // namespace
}  // namespace anabranch
