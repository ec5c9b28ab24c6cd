// Rows of a skinny linear layer, for any instruction set S (simd_*.h).
//
// x is converted once and padded with zeros to whole vectors. Four rows of the weight meet four rows of x at a time:
// each weight vector is loaded and widened once for four products; more rows of x pass over the same four weight rows
// while these are in the cache. Where S multiplies pairs of bfloat16, bfloat16 weights are used as they lie.
#pragma once

#include <type_traits>

#include "attention_kernel.h"
#include "skinny_linear.h"

namespace anabranch {

template <class S>
class LinearKernel {
  using F = typename S::F;
  static constexpr int W = S::W;
  static constexpr int kRows = 4, kColumns = 4;

 public:
  explicit LinearKernel(const LinearCall& call)
      : c_(call), pairs_(S::pairs && call.x_type == Type::bf16 && call.weight_type == Type::bf16),
        width_(pairs_ ? padded(call.in, 2 * W) / 2 : padded(call.in, W)) {}

  int64_t scratch_floats() const { return int64_t{c_.M} * width_; }

  void pack(float* packed) const {
    with_type(c_.x_type, [&](auto* type) {
      for (int m = 0; m < c_.M; ++m) {
        const auto* from = static_cast<decltype(type)>(c_.x) + m * c_.x_row;
        float* to = packed + int64_t{m} * width_;
        const int whole = pairs_ ? c_.in / 2 : c_.in;
        for (int k = whole; k < width_; ++k) to[k] = 0.0f;
        if (pairs_)
          std::memcpy(to, from, c_.in * 2);
        else
          for (int k = 0; k < c_.in; ++k) to[k] = to_float(from[k]);
      }
    });
  }

  void rows(const float* packed, int64_t begin, int64_t end) const {
    if constexpr (S::pairs) {
      if (pairs_) return all_rows<bfloat16, true>(packed, begin, end);
    }
    with_type(c_.weight_type, [&](auto* type) {
      all_rows<std::remove_const_t<std::remove_pointer_t<decltype(type)>>, false>(packed, begin, end);
    });
  }

 private:
  template <class T, bool pairs>
  void all_rows(const float* packed, int64_t begin, int64_t end) const {
    for (; begin + kRows <= end; begin += kRows) columns<T, pairs, kRows>(packed, begin);
    for (; begin < end; ++begin) columns<T, pairs, 1>(packed, begin);
  }

  template <class T, bool pairs, int R>
  void columns(const float* packed, int64_t row) const {
    int m = 0;
    for (; m + kColumns <= c_.M; m += kColumns) block<T, pairs, R, kColumns>(packed + int64_t{m} * width_, row, m);
    if (c_.M - m == 3) block<T, pairs, R, 3>(packed + int64_t{m} * width_, row, m);
    if (c_.M - m == 2) block<T, pairs, R, 2>(packed + int64_t{m} * width_, row, m);
    if (c_.M - m == 1) block<T, pairs, R, 1>(packed + int64_t{m} * width_, row, m);
  }

  template <class T, bool pairs, int R, int C>
  void block(const float* x, int64_t row, int m) const {
    constexpr int step = pairs ? 2 * W : W;  // elements of the weight in one vector
    const T* weight[R];
    for (int r = 0; r < R; ++r) weight[r] = static_cast<const T*>(c_.weight) + (row + r) * c_.weight_row;
    F sum[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sum[r][c] = S::zero();
    int k = 0;
    for (; k + step <= c_.in; k += step) {
      // The block of rows after this one begins where this one ends: ask for it while this one is multiplied.
      if (m == 0 && (k * sizeof(T)) % 64 == 0)
        for (int r = 0; r < R; ++r) S::prefetch(reinterpret_cast<const char*>(weight[r] + R * c_.weight_row + k));
      for (int r = 0; r < R; ++r) {
        F w;
        if constexpr (pairs)
          w = S::load(reinterpret_cast<const float*>(weight[r] + k));
        else
          w = S::widen(weight[r] + k);
        multiply_add<pairs, C>(w, x + k * W / step, sum[r]);
      }
    }
    if (k < c_.in)
      for (int r = 0; r < R; ++r) {
        T some[step] = {};
        std::memcpy(some, weight[r] + k, (c_.in - k) * sizeof(T));
        F w;
        if constexpr (pairs)
          w = S::load(reinterpret_cast<const float*>(some));
        else
          w = S::widen(some);
        multiply_add<pairs, C>(w, x + k * W / step, sum[r]);
      }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) write(S::sum(sum[r][c]), m + c, row + r);
  }

  template <bool pairs, int C>
  void multiply_add(F w, const float* x, F (&sum)[C]) const {
    for (int c = 0; c < C; ++c) {
      const F factor = S::load(x + int64_t{c} * width_);
      if constexpr (pairs)
        sum[c] = S::dot2(w, factor, sum[c]);
      else
        sum[c] = S::fma(w, factor, sum[c]);
    }
  }

  void write(float value, int64_t m, int64_t row) const {
    if (c_.scales != nullptr) value *= c_.scales[row];
    with_type(c_.x_type, [&](auto* type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      if constexpr (sizeof(T) != 1) {
        if (c_.bias != nullptr) value += to_float(static_cast<const T*>(c_.bias)[row]);
        from_float(value, static_cast<T*>(c_.y) + m * c_.out + row);
      }
    });
  }

  const LinearCall& c_;
  const bool pairs_;
  const int width_;
};

}  // namespace anabranch
