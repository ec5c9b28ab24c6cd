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
    const T* weight = static_cast<const T*>(c_.weight) + row * c_.weight_row;
    F sum[R][C];
    const int whole = c_.in / step;
    // The rows after these begin where these end: the first pass over these asks for them.
    if (m == 0)
      dot<T, pairs, R, C, true>(weight, x, whole, sum);
    else
      dot<T, pairs, R, C, false>(weight, x, whole, sum);
    if (whole * step < c_.in)
      for (int r = 0; r < R; ++r) {
        T some[step] = {};
        std::memcpy(some, weight + r * c_.weight_row + whole * step, (c_.in - whole * step) * sizeof(T));
        multiply_add<pairs, C>(vector<pairs>(some), x + whole * W, sum[r]);
      }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) write(S::sum(sum[r][c]), m + c, row + r);
  }

  // Not inlined: no call may stand in the function of the hot loop, or the compiler keeps its sums in memory.
  template <class T, bool pairs, int R, int C, bool ahead>
  [[gnu::noinline]] void dot(const T* weight, const float* x, int steps, F (&to)[R][C]) const {
    constexpr int step = pairs ? 2 * W : W;
    const int64_t stride = c_.weight_row;
    F sum[R][C];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sum[r][c] = S::zero();
    for (; steps > 0; --steps, weight += step, x += W)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        if constexpr (ahead) S::prefetch(reinterpret_cast<const char*>(weight + (R + r) * stride));
        multiply_add<pairs, C>(vector<pairs>(weight + r * stride), x, sum[r]);
      }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) to[r][c] = sum[r][c];
  }

  template <bool pairs, class T>
  static F vector(const T* weight) {
    if constexpr (pairs)
      return S::load(reinterpret_cast<const float*>(weight));
    else
      return S::widen(weight);
  }

  template <bool pairs, int C>
  void multiply_add(F w, const float* x, F (&sum)[C]) const {
#pragma GCC unroll 16
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
