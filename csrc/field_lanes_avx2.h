// Four 64-bit lanes of AVX2, or eight of 32 bits. Include only where the compiler may use avx2.
#pragma once

#include <immintrin.h>

#include <cstdint>

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
  static void prefetch(const void* p) { asm volatile("prefetcht0 %0" ::"m"(*static_cast<const char*>(p))); }

 private:
  static V less(V a, V b) {  // unsigned
    const V sign = set(uint64_t{1} << 63);
    return _mm256_cmpgt_epi64(_mm256_xor_si256(b, sign), _mm256_xor_si256(a, sign));
  }
};

}  // namespace
}  // namespace anabranch
