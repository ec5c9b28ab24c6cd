// The element types of tensors and their scalar conversions.
#pragma once

#include <cstdint>
#include <cstring>

namespace anabranch {

enum class Type : int { f32 = 0, f16 = 1, bf16 = 2, i8 = 3 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline int64_t size_of(Type type) { return type == Type::f32 ? 4 : type == Type::i8 ? 1 : 2; }

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float to_float(float value) { return value; }
inline float to_float(int8_t value) { return value; }
inline float to_float(bfloat16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(float16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = (value.bits >> 10) & 31u, mantissa = value.bits & 1023u;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));  // inf, nan
  if (exponent == 0) {                                                                // zero, subnormal: m * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// Rounds to the nearest, ties to even, as torch does.
inline void from_float(float value, float* to) { *to = value; }

inline void from_float(float value, bfloat16* to) {
  const uint32_t bits = float_to_bits(value);
  if (value != value) {
    to->bits = 0x7fc0;
  } else {
    to->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}

inline void from_float(float value, float16* to) {
  const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    to->bits = static_cast<uint16_t>(sign | 0x7e00u);  // nan
  } else if (magnitude >= 0x477ff000u) {
    to->bits = static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to inf
  } else if (magnitude < 0x38800000u) {
    // Subnormal in float16: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits of the mantissa.
    const float shifted = bits_to_float(magnitude) + 0.5f;
    to->bits = static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  } else {
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23);
    to->bits = static_cast<uint16_t>(sign | (rounded >> 13));
  }
}

// Calls body with a typed null pointer for `type`; the one place where run-time types become template arguments.
template <class Body>
void with_type(Type type, Body&& body) {
  switch (type) {
    case Type::f32: return body(static_cast<const float*>(nullptr));
    case Type::f16: return body(static_cast<const float16*>(nullptr));
    case Type::bf16: return body(static_cast<const bfloat16*>(nullptr));
    case Type::i8: return body(static_cast<const int8_t*>(nullptr));
  }
}

}  // namespace anabranch
