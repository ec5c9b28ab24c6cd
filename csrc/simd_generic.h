// Eight lanes in plain C++: what runs on any CPU, and what the vector versions are compared with.
#pragma once

#include <cmath>

#include "scalar.h"

namespace anabranch {
namespace {  // internal linkage: no other file may end up with this one's instructions

struct Generic {
  static constexpr int W = 8, registers = 4;
  static constexpr bool pairs = false, tiles = false;
  struct F {
    float lane[W];
  };

  static F set1(float x) {
    F r;
    for (int i = 0; i < W; ++i) r.lane[i] = x;
    return r;
  }
  static F zero() { return set1(0.0f); }
  static F load(const float* p) {
    F r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  static void store(float* p, F a) { std::memcpy(p, &a, sizeof a); }
  static F add(F a, F b) {
    for (int i = 0; i < W; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static F mul(F a, F b) {
    for (int i = 0; i < W; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  static F fma(F a, F b, F c) {
    for (int i = 0; i < W; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  static F max(F a, F b) {
    for (int i = 0; i < W; ++i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
  }
  static F min(F a, F b) {
    for (int i = 0; i < W; ++i) a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
  }
  // x where a > b, elsewhere y.
  static F where_greater(F a, F b, F x, F y) {
    for (int i = 0; i < W; ++i) y.lane[i] = a.lane[i] > b.lane[i] ? x.lane[i] : y.lane[i];
    return y;
  }
  // Not 0 if there is a NaN in a or b.
  static int nans(F a, F b) {
    int found = 0;
    for (int i = 0; i < W; ++i) found |= (a.lane[i] != a.lane[i]) | (b.lane[i] != b.lane[i]);
    return found;
  }
  // Sums in float64, lane by lane, and their mean.
  struct Sum {
    double lane[W];
  };
  static Sum no_sum() { return {}; }
  static void add_to(Sum& sum, F a) {
    for (int i = 0; i < W; ++i) sum.lane[i] += a.lane[i];
  }
  static F mean(const Sum& sum, double count) {
    F r;
    for (int i = 0; i < W; ++i) r.lane[i] = static_cast<float>(sum.lane[i] / count);
    return r;
  }
  static F exp2(F a) {
    for (int i = 0; i < W; ++i) a.lane[i] = std::exp2(a.lane[i]);
    return a;
  }
  static float sum(F a) {
    return ((a.lane[0] + a.lane[4]) + (a.lane[2] + a.lane[6])) + ((a.lane[1] + a.lane[5]) + (a.lane[3] + a.lane[7]));
  }
  static float highest(F a) {
    float m = a.lane[0];
    for (int i = 1; i < W; ++i) m = a.lane[i] > m ? a.lane[i] : m;
    return m;
  }
  static void sums(F a, F b, F c, F d, float* to) { to[0] = sum(a), to[1] = sum(b), to[2] = sum(c), to[3] = sum(d); }
  template <class T>
  static F widen(const T* p) {
    F r;
    for (int i = 0; i < W; ++i) r.lane[i] = to_float(p[i]);
    return r;
  }
  // a0 b0 a1 b1 … in two vectors, and back.
  static void interleave(F& a, F& b) {
    F mixed[2];
    for (int i = 0; i < W; ++i) mixed[2 * i / W].lane[2 * i % W] = a.lane[i], mixed[2 * i / W].lane[2 * i % W + 1] = b.lane[i];
    a = mixed[0], b = mixed[1];
  }
  static void separate(F& a, F& b) {
    const F mixed[2] = {a, b};
    for (int i = 0; i < W; ++i) a.lane[i] = mixed[2 * i / W].lane[2 * i % W], b.lane[i] = mixed[2 * i / W].lane[2 * i % W + 1];
  }
  template <class T>
  static void narrow(F a, T* to) {
    for (int i = 0; i < W; ++i) from_float(a.lane[i], to + i);
  }
  // Lanes hold pairs of bfloat16, the first in the lower half.
  static F first_of_pairs(F a) {
    for (int i = 0; i < W; ++i) a.lane[i] = bits_to_float(float_to_bits(a.lane[i]) << 16);
    return a;
  }
  static F second_of_pairs(F a) {
    for (int i = 0; i < W; ++i) a.lane[i] = bits_to_float(float_to_bits(a.lane[i]) & 0xffff0000u);
    return a;
  }
  static void transpose(F (&rows)[W]) {
    for (int i = 0; i < W; ++i)
      for (int j = 0; j < i; ++j) {
        const float t = rows[i].lane[j];
        rows[i].lane[j] = rows[j].lane[i];
        rows[j].lane[i] = t;
      }
  }
  static void prefetch(const char* p) { __builtin_prefetch(p); }
  static void prefetch_second(const char* p) { __builtin_prefetch(p, 0, 2); }  // into the second cache
};

}  // namespace
}  // namespace anabranch
