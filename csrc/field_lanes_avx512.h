// Eight 64-bit lanes of AVX-512, or sixteen of 32 bits. Include only where the compiler may use avx512f, bw, dq and vl.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "scalar.h"

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

  // Writes the lanes of 32 or 64 bits that are below p, side by side; returns where the next ones go.
  static uint32_t* keep_below(V a, uint32_t p, uint32_t* to) {
    const __mmask16 below = _mm512_cmplt_epu32_mask(a, set_half(p));
    store(to, _mm512_maskz_compress_epi32(below, a));
    return to + __builtin_popcount(below);
  }
  static uint64_t* keep_below(V a, uint64_t p, uint64_t* to) {
    const __mmask8 below = _mm512_cmplt_epu64_mask(a, set(p));
    store(to, _mm512_maskz_compress_epi64(below, a));
    return to + __builtin_popcount(below);
  }
};

// Eight float64 numbers.
struct Reals512 {
  static constexpr int W = 8;
  using R = __m512d;
  using V = __m512i;

  static R set(double x) { return _mm512_set1_pd(x); }
  static R load(const double* p) { return _mm512_loadu_pd(p); }
  static R load(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  static R load(const bfloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
  }
  static R load(const float16* p) {
    return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void store(double* p, R a) { _mm512_storeu_pd(p, a); }
  static R mul(R a, R b) { return _mm512_mul_pd(a, b); }
  static R add(R a, R b) { return _mm512_add_pd(a, b); }
  static R div(R a, R b) { return _mm512_div_pd(a, b); }
  static R magnitude(R a) { return _mm512_abs_pd(a); }
  static R clamp(R a, R limit) { return _mm512_max_pd(_mm512_min_pd(a, limit), _mm512_sub_pd(_mm512_setzero_pd(), limit)); }
  static R nearest(R a) { return _mm512_roundscale_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static R floor(R a) { return _mm512_roundscale_pd(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static int64_t count_above(R a, R b) { return __builtin_popcount(_mm512_cmp_pd_mask(a, b, _CMP_GT_OQ)); }
  static int64_t count_not_below(R a, R b) { return __builtin_popcount(_mm512_cmp_pd_mask(a, b, _CMP_NLT_UQ)); }
  // Whole numbers to elements and back; negative ones stand above.
  static void store_element(R a, uint32_t p, uint32_t* to) {
    const __m256i v = _mm512_cvtpd_epi32(a);
    const __m256i wrap = _mm256_and_si256(_mm256_srai_epi32(v, 31), _mm256_set1_epi32(static_cast<int>(p)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_add_epi32(v, wrap));
  }
  static void store_element(R a, uint64_t p, uint64_t* to) {
    const V v = _mm512_cvtpd_epi64(a);
    Lanes512::store(to, _mm512_mask_add_epi64(v, _mm512_movepi64_mask(v), v, Lanes512::set(p)));
  }
  static R load_element(const uint32_t* from, uint32_t p) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i above = _mm256_cmpgt_epi32(v, _mm256_set1_epi32(static_cast<int>(p / 2)));
    return _mm512_cvtepi32_pd(_mm256_sub_epi32(v, _mm256_and_si256(above, _mm256_set1_epi32(static_cast<int>(p)))));
  }
  static R load_element(const uint64_t* from, uint64_t p) {
    const V v = Lanes512::load(from);
    const __mmask8 above = _mm512_cmpgt_epu64_mask(v, Lanes512::set(p / 2));
    return _mm512_cvtepi64_pd(_mm512_mask_sub_epi64(v, above, v, Lanes512::set(p)));
  }
};

}  // namespace
}  // namespace anabranch
