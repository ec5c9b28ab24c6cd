// Sixteen lanes of AVX-512, plain and with dot products of bfloat16 pairs. Include only where the compiler may use
// avx512f, bw, dq and vl (and avx512bf16 where ANABRANCH_NATIVE_BF16 is defined).
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace anabranch {
namespace {  // internal linkage: no other file may end up with this one's instructions

struct Avx512 {
  static constexpr int W = 16, registers = 32;
  static constexpr bool pairs = false, tiles = false;
  using F = __m512;

  static F set1(float x) { return _mm512_set1_ps(x); }
  static F zero() { return _mm512_setzero_ps(); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  // x where a > b, elsewhere y.
  static F where_greater(F a, F b, F x, F y) {
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), x);
  }
  // Not 0 if there is a NaN in a or b.
  static int nans(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
  // Sums in float64, lane by lane, and their mean.
  struct Sum {
    __m512d low, high;
  };
  static Sum no_sum() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  static void add_to(Sum& sum, F a) {
    sum.low = _mm512_add_pd(sum.low, _mm512_cvtps_pd(_mm512_castps512_ps256(a)));
    sum.high = _mm512_add_pd(sum.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)));
  }
  static F mean(const Sum& sum, double count) {
    const __m512d divisor = _mm512_set1_pd(count);
    const __m256 low = _mm512_cvtpd_ps(_mm512_div_pd(sum.low, divisor));
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), _mm512_cvtpd_ps(_mm512_div_pd(sum.high, divisor)), 1);
  }

  // 2^x with relative error below 2e-7; exactly 0 for -inf, so that masked scores vanish.
  static F exp2(F x) {
    x = _mm512_max_ps(set1(-200.0f), x);  // in this order NaN passes through
    const F whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F f = _mm512_sub_ps(x, whole);
    F p = set1(1.535336188319500e-4f);
    p = fma(p, f, set1(1.339887440266574e-3f));
    p = fma(p, f, set1(9.618437357674640e-3f));
    p = fma(p, f, set1(5.550332471162809e-2f));
    p = fma(p, f, set1(2.402264791363012e-1f));
    p = fma(p, f, set1(6.931472028550421e-1f));
    p = fma(p, f, set1(1.0f));
    return _mm512_scalef_ps(p, whole);
  }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static float highest(F a) { return _mm512_reduce_max_ps(a); }
  static void sums(F a, F b, F c, F d, float* to) {
    const F ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const F cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const F all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
  static F widen(const float* p) { return load(p); }
  static F widen(const bfloat16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static F widen(const float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F widen(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  // Sixteen values, rounded to the nearest, ties to even.
  static void narrow(F a, float* to) { store(to, a); }
  static void narrow(F a, float16* to) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(a, nearest));
  }
  static void narrow(F a, bfloat16* to) {
    const __m512i bits = _mm512_srli_epi32(rounded(a), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i results = _mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(results));
  }
  // To bfloat16 of numbers: the wanted bits are left in each lane's upper half.
  static __m512i rounded(F x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  }
  // Lanes hold pairs of bfloat16, the first in the lower half.
  static F first_of_pairs(F a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), 16)); }
  static F second_of_pairs(F a) {
    return _mm512_and_ps(a, _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  // a0 b0 a1 b1 … in two vectors, and back.
  static void interleave(F& a, F& b) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
    const F first = _mm512_permutex2var_ps(a, low, b);
    b = _mm512_permutex2var_ps(a, high, b);
    a = first;
  }
  static void separate(F& a, F& b) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const F first = _mm512_permutex2var_ps(a, even, b);
    b = _mm512_permutex2var_ps(a, _mm512_or_si512(even, _mm512_set1_epi32(1)), b);
    a = first;
  }
  [[gnu::always_inline]] static inline void transpose(F (&r)[W]) {
    F t[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 4) {
      r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {  // r[4g + i] holds columns i, i+4, i+8, i+12 of rows 4g..4g+3, one per 128 bits
      const F a = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
      const F c = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd), d = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
      t[i] = _mm512_shuffle_f32x4(a, b, 0x88);
      t[8 + i] = _mm512_shuffle_f32x4(a, b, 0xdd);
      t[4 + i] = _mm512_shuffle_f32x4(c, d, 0x88);
      t[12 + i] = _mm512_shuffle_f32x4(c, d, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) r[i] = t[i];
  }
  static void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T0); }
  // Into the second cache. Spelt out: GCC leaves out calls of functions that do nothing but prefetch.
  static void prefetch_second(const char* p) { asm volatile("prefetcht1 %0" ::"m"(*p)); }
};

// Lanes of an F hold pairs of bfloat16; dot2 adds both products to a float32 lane. Native or spelt out.
template <bool native>
struct Avx512Pairs : Avx512 {
  static constexpr bool pairs = true;

  static F dot2(F a, F b, F c) {
#if defined(ANABRANCH_NATIVE_BF16)
    if constexpr (native) return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#endif
    c = fma(first_of_pairs(a), first_of_pairs(b), c);
    return fma(second_of_pairs(a), second_of_pairs(b), c);
  }
  // Thirty-two floats to pairs (x0, x1), (x2, x3), …; rounds to the nearest, ties to even.
  static F round_to_pairs(F low, F high) {
#if defined(ANABRANCH_NATIVE_BF16)
    if constexpr (native) return (F)_mm512_cvtne2ps_pbh(high, low);
#endif
    return upper_halves(rounded(low), rounded(high));
  }
  static F widen_to_pairs(const int8_t* p) {  // no int8 needs more than the upper half of a float
    const F low = widen(p), high = widen(p + W);
    return upper_halves(_mm512_castps_si512(low), _mm512_castps_si512(high));
  }
  // Thirty-two bfloat16 of each of two rows to pairs across the rows.
  static void pair_rows(F first, F second, F& low, F& high) {
    const __m512i a = _mm512_castps_si512(first), b = _mm512_castps_si512(second);
    const F even = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
    const F odd = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
    const __m512i first_half = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second_half = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    low = _mm512_permutex2var_ps(even, first_half, odd);
    high = _mm512_permutex2var_ps(even, second_half, odd);
  }

 private:
  static F upper_halves(__m512i low, __m512i high) {
    const __m512i index = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                                           25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_castsi512_ps(_mm512_permutex2var_epi16(low, index, high));
  }
};

}  // namespace
}  // namespace anabranch
