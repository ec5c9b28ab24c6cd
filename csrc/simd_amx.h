// Sixteen lanes of AVX-512 and, beside them, the tiles of AMX: matrices of sixteen rows of 64 bytes. Include only where
// the compiler may use amx-tile, amx-bf16, amx-int8 and what simd_avx512.h asks for.
//
// The instructions are spelt out because GCC 12's intrinsics do not tell it that loads read memory: what was stored just
// before might not be there yet.
#pragma once

#include "simd_avx512.h"

namespace anabranch {
namespace {  // internal linkage: no other file may end up with this one's instructions

struct Amx : Avx512Pairs<true> {
  static constexpr bool tiles = true;

  // Lets this thread use tiles 0 to 7, at first undefined, while it lives; no other may live on the thread. Afterwards
  // the tiles are given up, so that the system does not have to save them for threads that do other work.
  class Tiles {
   public:
    Tiles() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } const config;
      static_assert(sizeof config == 64, "as the instruction reads it");
      asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
  };

  template <int tile>
  static void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
  }
  template <int tile>
  static void tile_load(const void* rows, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(row_bytes), "i"(tile) : "memory");
  }
  template <int tile>
  static void tile_store(void* rows, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(row_bytes), "i"(tile) : "memory");
  }
  // Float32 c[16][16] += a[16][32] · b[32][16]: rows of a are bfloat16 as they lie, rows of b sixteen pairs along k.
  template <int c, int a, int b>
  static void tile_dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
  // Int32 c[16][16] += a[16][64] · b[64][16] of int8: rows of b are sixteen pieces of four along k.
  template <int c, int a, int b>
  static void tile_dot_bytes() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }

  static F finite_or_zero(F x) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(mul(x, zero()), zero(), _CMP_EQ_OQ), x);
  }
  // Cuts 32 numbers into pairs (a_i, b_i) of bfloat16 that add up to them: the first two parts are rounded, the third
  // is what remains. Were the second cut off, it would have the third's sign and products of the two would not average
  // out.
  static void cut(F a, F b, F (&part)[3]) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u)), half = _mm512_set1_epi32(0x8000);
    const auto pair = [&](__m512i x, __m512i y) __attribute__((always_inline)) {
      return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_srli_epi32(x, 16), y, upper, 0xd8));  // y in upper
    };
    const auto rest = [&](F x, __m512i taken) __attribute__((always_inline)) {
      return _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(taken, upper)));
    };
    __m512i x = _mm512_add_epi32(_mm512_castps_si512(a), half), y = _mm512_add_epi32(_mm512_castps_si512(b), half);
    part[0] = pair(x, y);
    a = rest(a, x), b = rest(b, y);
    x = _mm512_add_epi32(_mm512_castps_si512(a), half), y = _mm512_add_epi32(_mm512_castps_si512(b), half);
    part[1] = pair(x, y);
    part[2] = pair(_mm512_castps_si512(rest(a, x)), _mm512_castps_si512(rest(b, y)));
  }
  // Sixteen rows of sixteen pieces of four bytes, transposed.
  static void turn(const char* from, char* to) {
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      __m512i t[4];
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) {  // of rows m, 4 + m, 8 + m and 12 + m
        const __m128i* row = reinterpret_cast<const __m128i*>(from + m * 64 + 16 * q);
        t[m] = _mm512_inserti32x4(_mm512_castsi128_si512(_mm_load_si128(row)), _mm_load_si128(row + 16), 1);
        t[m] = _mm512_inserti32x4(t[m], _mm_load_si128(row + 32), 2);
        t[m] = _mm512_inserti32x4(t[m], _mm_load_si128(row + 48), 3);
      }
      const __m512i ab0 = _mm512_unpacklo_epi32(t[0], t[1]), ab1 = _mm512_unpackhi_epi32(t[0], t[1]);
      const __m512i cd0 = _mm512_unpacklo_epi32(t[2], t[3]), cd1 = _mm512_unpackhi_epi32(t[2], t[3]);
      __m512i* at = reinterpret_cast<__m512i*>(to + 4 * q * 64);
      _mm512_store_si512(at, _mm512_unpacklo_epi64(ab0, cd0));
      _mm512_store_si512(at + 1, _mm512_unpackhi_epi64(ab0, cd0));
      _mm512_store_si512(at + 2, _mm512_unpacklo_epi64(ab1, cd1));
      _mm512_store_si512(at + 3, _mm512_unpackhi_epi64(ab1, cd1));
    }
  }
  // n numbers, a multiple of 16, added to float64 sums.
  static void add_to(const float* numbers, int64_t n, double* sums) {
    for (int64_t i = 0; i < n; i += 8)
      _mm512_storeu_pd(sums + i, _mm512_add_pd(_mm512_loadu_pd(sums + i), _mm512_cvtps_pd(_mm256_loadu_ps(numbers + i))));
  }

  // The largest of n numbers of sixteen bits after their sign bits are cleared.
  static uint16_t largest_bits(const uint16_t* p, int n) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    __m512i most = _mm512_setzero_si512();
    for (; n >= 32; n -= 32, p += 32) most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_loadu_si512(p), magnitude));
    const __m512i last = _mm512_maskz_loadu_epi16((1u << n) - 1, p);
    most = _mm512_max_epu16(most, _mm512_and_si512(last, magnitude));
    most = _mm512_max_epu16(most, _mm512_srli_epi32(most, 16));
    return static_cast<uint16_t>(_mm512_reduce_max_epu32(_mm512_and_si512(most, _mm512_set1_epi32(0xffff))));
  }
  // Sixty-four numbers times `factor`, rounded to whole ones of at most 2^30, as four signed digits to base 256 of 64
  // bytes each, the lowest first.
  template <class X>
  static void digits(const X* numbers, float factor, F* to) {
    const __m512i half = _mm512_set1_epi32(0x808080);  // makes the lower three digits positive for a moment
    __m512i whole[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      whole[i] = _mm512_cvtps_epi32(mul(widen(numbers + i * W), set1(factor)));
      whole[i] = _mm512_xor_si512(_mm512_add_epi32(whole[i], half), half);
    }
#pragma GCC unroll 4
    for (int digit = 0; digit < 4; ++digit) {
      alignas(64) int8_t bytes[4 * W];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m128i sixteen = _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole[i], 8 * digit));
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes + i * W), sixteen);
      }
      to[digit] = load(reinterpret_cast<const float*>(bytes));
    }
  }
  // The numbers of four vectors of int32 digits.
  static F of_digits(const F* digit) {
    F number = _mm512_cvtepi32_ps(_mm512_castps_si512(digit[3]));
#pragma GCC unroll 4
    for (int i = 2; i >= 0; --i)
      number = fma(number, set1(256.0f), _mm512_cvtepi32_ps(_mm512_castps_si512(digit[i])));
    return number;
  }
};

}  // namespace
}  // namespace anabranch
