// Four 64-bit lanes of AVX2, or eight of 32 bits. Include only where the compiler may use avx2.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "scalar.h"

namespace anabranch {
namespace {  // internal linkage: no other file may end up with this one's instructions

struct Lanes256 {
  static constexpr int W = 4;      // lanes of 64 bits
  static constexpr int kRows = 2;  // of a register block
  using V = __m256i;

  static V load(const void* p) { return _mm256_loadu_si256(static_cast<const V*>(p)); }
  static void store(void* p, V a) { _mm256_storeu_si256(static_cast<V*>(p), a); }
  static V zero() { return _mm256_setzero_si256(); }
  static V set(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
  static V set_half(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static V add(V a, V b) { return _mm256_add_epi64(a, b); }
  static V sub(V a, V b) { return _mm256_sub_epi64(a, b); }
  static V both(V a, V b) { return _mm256_and_si256(a, b); }
  template <int n>
  static V right(V a) { return _mm256_srli_epi64(a, n); }
  template <int n>
  static V left(V a) { return _mm256_slli_epi64(a, n); }
  static V mul(V a, V b) { return _mm256_mul_epu32(a, b); }  // of the lower halves
  static V smaller(V a, V b) { return _mm256_blendv_epi8(b, a, less(a, b)); }
  static V where_less(V a, V b, V x) { return both(less(a, b), x); }

  static V add_halves(V a, V b) { return _mm256_add_epi32(a, b); }
  static V sub_halves(V a, V b) { return _mm256_sub_epi32(a, b); }
  static V smaller_halves(V a, V b) { return _mm256_min_epu32(a, b); }
  // The upper halves of `even` where lower ones are, beside the upper halves of `odd`.
  static V upper_halves(V even, V odd) { return _mm256_blend_epi32(right<32>(even), odd, 0xaa); }

  // Writes the lanes of 32 or 64 bits that are below p, side by side; returns where the next ones go.
  static uint32_t* keep_below(V a, uint32_t p, uint32_t* to) {
    const V sign = set_half(0x80000000u);
    const V below = _mm256_cmpgt_epi32(_mm256_xor_si256(set_half(p), sign), _mm256_xor_si256(a, sign));
    const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(below));
    store(to, chosen(a, mask));
    return to + __builtin_popcount(mask);
  }
  static uint64_t* keep_below(V a, uint64_t p, uint64_t* to) {
    const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(less(a, set(p))));  // two bits each
    store(to, chosen(a, mask));
    return to + __builtin_popcount(mask) / 2;
  }

 private:
  // The halves whose bits are set in mask, side by side.
  static V chosen(V a, int mask) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kChosen.index[mask]));
    return _mm256_permutevar8x32_epi32(a, _mm256_cvtepu8_epi32(bytes));
  }
  struct Chosen {
    uint64_t index[256];  // eight bytes each
    constexpr Chosen() : index() {
      for (int mask = 0; mask < 256; ++mask)
        for (int lane = 0, n = 0; lane < 8; ++lane)
          if (mask >> lane & 1) index[mask] |= uint64_t(lane) << 8 * n++;
    }
  };
  static const Chosen kChosen;
  static V less(V a, V b) {  // unsigned
    const V sign = set(uint64_t{1} << 63);
    return _mm256_cmpgt_epi64(_mm256_xor_si256(b, sign), _mm256_xor_si256(a, sign));
  }
};

constexpr Lanes256::Chosen Lanes256::kChosen;

// Four float64 numbers.
struct Reals256 {
  static constexpr int W = 4;
  using R = __m256d;
  using V = __m256i;

  static R set(double x) { return _mm256_set1_pd(x); }
  static R load(const double* p) { return _mm256_loadu_pd(p); }
  static R load(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  static R load(const bfloat16* p) {
    const __m128i wide = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(wide, 16)));
  }
  static R load(const float16* p) {
    return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static void store(double* p, R a) { _mm256_storeu_pd(p, a); }
  static R mul(R a, R b) { return _mm256_mul_pd(a, b); }
  static R add(R a, R b) { return _mm256_add_pd(a, b); }
  static R div(R a, R b) { return _mm256_div_pd(a, b); }
  static R magnitude(R a) { return _mm256_andnot_pd(set(-0.0), a); }
  static R clamp(R a, R limit) { return _mm256_max_pd(_mm256_min_pd(a, limit), _mm256_sub_pd(set(0.0), limit)); }
  static R nearest(R a) { return _mm256_round_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static R floor(R a) { return _mm256_round_pd(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static int64_t count_above(R a, R b) { return count(_mm256_cmp_pd(a, b, _CMP_GT_OQ)); }
  static int64_t count_not_below(R a, R b) { return count(_mm256_cmp_pd(a, b, _CMP_NLT_UQ)); }
  // Whole numbers to elements and back; negative ones stand above.
  static void store_element(R a, uint32_t p, uint32_t* to) {
    const __m128i v = _mm256_cvtpd_epi32(a);
    const __m128i wrap = _mm_and_si128(_mm_srai_epi32(v, 31), _mm_set1_epi32(static_cast<int>(p)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_add_epi32(v, wrap));
  }
  static void store_element(R a, uint64_t p, uint64_t* to) {  // below 2^63: a signed upper half and an unsigned lower one
    const R upper = floor(mul(a, set(0x1p-32))), lower = _mm256_sub_pd(a, mul(upper, set(0x1p32)));
    const V high = _mm256_slli_epi64(_mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(upper)), 32);
    const V low = Lanes256::both(_mm256_castpd_si256(add(lower, set(0x1p52))), Lanes256::set(0xffffffffu));
    const V v = Lanes256::add(high, low), negative = _mm256_cmpgt_epi64(_mm256_setzero_si256(), v);
    Lanes256::store(to, Lanes256::add(v, Lanes256::both(negative, Lanes256::set(p))));
  }
  static R load_element(const uint32_t* from, uint32_t p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m128i above = _mm_cmpgt_epi32(v, _mm_set1_epi32(static_cast<int>(p / 2)));
    return _mm256_cvtepi32_pd(_mm_sub_epi32(v, _mm_and_si128(above, _mm_set1_epi32(static_cast<int>(p)))));
  }
  static R load_element(const uint64_t* from, uint64_t p) {
    V v = Lanes256::load(from);
    v = Lanes256::sub(v, Lanes256::where_less(Lanes256::set(p / 2), v, Lanes256::set(p)));
    // 2^84 + 2^63 + the upper half, and 2^52 + the lower one, by their bits; only the last addition rounds.
    const V upper = _mm256_xor_si256(_mm256_srli_epi64(v, 32), Lanes256::set(0x4530000080000000u));
    const V lower = _mm256_blend_epi32(v, Lanes256::set(0x4330000000000000u), 0xaa);
    const R high = _mm256_sub_pd(_mm256_castsi256_pd(upper), set(0x1p84 + 0x1p63 + 0x1p52));
    return add(high, _mm256_castsi256_pd(lower));
  }

 private:
  static int64_t count(R mask) { return __builtin_popcount(_mm256_movemask_pd(mask)); }
};

}  // namespace
}  // namespace anabranch
