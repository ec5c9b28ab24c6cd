// The prime fields of field_coding, one element at a time, without a branch that depends on an element.
#pragma once

#include <cstdint>

namespace anabranch {

enum class Field : int { babybear = 0, koalabear = 1, m31 = 2, goldilocks = 3, f50 = 4 };

// A prime below 2^31. `mul` takes one factor in Montgomery form (times 2^32), and so do the vector kernels: matrices and
// twiddles are brought to it once, data never is.
struct Prime31 {
  using Element = uint32_t;
  static constexpr int bits = 31;
  uint32_t p;
  uint32_t inverse;  // of p, modulo 2^32
  uint32_t generator;
  uint32_t power_32, power_52, power_64;  // of two, modulo p

  constexpr Prime31(uint32_t prime, uint32_t root)
      : p(prime), inverse(prime), generator(root), power_32(power(32)), power_52(power(52)), power_64(power(64)) {
    for (int i = 0; i < 4; ++i) inverse *= 2u - prime * inverse;  // Newton: 3 bits of p * p = 1, then 6, 12, 24, 48
  }
  // s / 2^32 for s < p * 2^32
  uint32_t reduce(uint64_t s) const {
    const uint32_t m = static_cast<uint32_t>(s) * inverse;
    const uint32_t t = static_cast<uint32_t>(s >> 32) - static_cast<uint32_t>((uint64_t{m} * p) >> 32);
    return t + (p & (0u - (t >> 31)));  // both are below 2^31, so the sign tells which was larger
  }
  uint32_t mul(uint32_t a, uint32_t montgomery) const { return reduce(uint64_t{a} * montgomery); }
  uint32_t to_factor(uint32_t a) const { return mul(a, power_64); }
  uint32_t add(uint32_t a, uint32_t b) const { return smaller(a + b, a + b - p); }
  uint32_t sub(uint32_t a, uint32_t b) const { return smaller(a - b, a - b + p); }

 private:
  constexpr uint32_t power(int exponent) const {
    uint64_t result = 1;
    for (int i = 0; i < exponent; ++i) result = result * 2 % p;
    return static_cast<uint32_t>(result);
  }
  static uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
};

// 2^50 - 27
struct Prime50 {
  using Element = uint64_t;
  static constexpr int bits = 50;
  static constexpr uint64_t p = (uint64_t{1} << 50) - 27;
  static uint64_t add(uint64_t a, uint64_t b) { return a + b < a + b - p ? a + b : a + b - p; }
  static uint64_t reduce(unsigned __int128 s) {  // for s < 2^120
    for (int i = 0; i < 2; ++i) s = static_cast<uint64_t>(s & mask) + (s >> 50) * 27;
    return add(static_cast<uint64_t>(s & mask), static_cast<uint64_t>(s >> 50) * 27);
  }

 private:
  static constexpr uint64_t mask = (uint64_t{1} << 50) - 1;
};

// 2^64 - 2^32 + 1: 2^64 = epsilon, 2^96 = -1
struct Prime64 {
  using Element = uint64_t;
  static constexpr int bits = 64;
  static constexpr uint64_t epsilon = 0xffffffffu, p = 0u - epsilon;
  static constexpr uint64_t generator = 7;

  static uint64_t canonical(uint64_t a) { return a < a + epsilon ? a : a + epsilon; }
  static uint64_t add(uint64_t a, uint64_t b) {  // of canonical ones
    const uint64_t s = a + b;
    return canonical(s + (epsilon & (0u - uint64_t{s < a})));
  }
  static uint64_t sub(uint64_t a, uint64_t b) { return a - b - (epsilon & (0u - uint64_t{a < b})); }
  static uint64_t reduce(uint64_t high, uint64_t low) {
    const uint64_t t = sub(canonical(low), high >> 32);
    const uint64_t h = high & epsilon;
    return add(t, (h << 32) - h);
  }
  static uint64_t mul(uint64_t a, uint64_t b) {
    const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return reduce(static_cast<uint64_t>(product >> 64), static_cast<uint64_t>(product));
  }
  static uint64_t to_factor(uint64_t a) { return a; }
};

inline const Prime31& prime31(Field field) {
  static constexpr Prime31 babybear(2013265921u, 31), koalabear(2130706433u, 3), m31(2147483647u, 7);
  return field == Field::babybear ? babybear : field == Field::koalabear ? koalabear : m31;
}

// Calls body with the arithmetic of one element of `field`.
template <class Body>
auto with_field(Field field, Body&& body) {
  if (field == Field::goldilocks) return body(Prime64());
  if (field == Field::f50) return body(Prime50());
  return body(prime31(field));
}

inline int64_t size_of(Field field) {
  return with_field(field, [](auto f) { return static_cast<int64_t>(sizeof(typename decltype(f)::Element)); });
}

}  // namespace anabranch
