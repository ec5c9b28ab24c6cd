// Rows of a skinny linear layer, for any instruction set S (simd_*.h).
//
// x is converted once and padded with zeros to whole vectors. Four rows of the weight meet four rows of x at a time, so
// that each weight vector is loaded and widened once for four products. With more than four rows of x the work goes
// block by block along the inputs: a block of sixteen weight rows stays in the first cache while all rows of x pass.
// Where S multiplies pairs of bfloat16, bfloat16 weights are used as they lie.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention_kernel.h"
#include "skinny_linear.h"

namespace anabranch {

template <class S>
class LinearKernel {
  using F = typename S::F;
  static constexpr int W = S::W;
  static constexpr int kRows = 4, kColumns = 4;            // of a register block
  static constexpr int kBlockRows = 16, kBlockInputs = 512;  // of a cache block

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
    constexpr int step = pairs ? 2 * W : W;  // elements of the weight in one vector
    const int passes = (c_.M + kColumns - 1) / kColumns, whole = c_.in / step;
    const int depth = passes == 1 ? whole : std::min(whole, kBlockInputs / step);  // steps of a block
    F sum[kBlockRows][kMostRows];
    for (int64_t row = begin; row < end; row += kBlockRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kBlockRows, end - row));
      const T* weight = static_cast<const T*>(c_.weight) + row * c_.weight_row;
      for (int r = 0; r < rows; ++r)
        for (int m = 0; m < c_.M; ++m) sum[r][m] = S::zero();
      for (int at = 0; at < whole; at += depth) {
        const int steps = std::min(depth, whole - at);
        // What is needed after this block: further along these rows, or the beginning of the rows behind them.
        const T* ahead = passes == 1            ? weight + kRows * c_.weight_row
                         : at + depth < whole ? weight + (at + depth) * step
                                              : weight + kBlockRows * c_.weight_row;
        for (int pass = 0; pass < passes; ++pass)
          columns<T, pairs>({weight + at * step, ahead, packed + int64_t{pass} * kColumns * width_ + at * W, steps,
                             passes, pass},
                            rows, &sum[0][pass * kColumns], std::min(kColumns, c_.M - pass * kColumns));
      }
      if (whole * step < c_.in) add_rest<T, pairs>(weight + whole * step, packed + whole * W, rows, sum);
      for (int r = 0; r < rows; ++r)
        for (int m = 0; m < c_.M; ++m) write(S::sum(sum[r][m]), m, row + r);
    }
  }

  // One pass of some rows of x over a block of the weight; of `ahead` it asks for every `passes`-th cache line.
  template <class T>
  struct Pass {
    const T *weight, *ahead;
    const float* x;
    int steps, passes, pass;
  };

  template <class T, bool pairs>
  void columns(Pass<T> p, int rows, F* sum, int C) const {
    switch (C) {
      case 4: return some_rows<T, pairs, 4>(p, rows, sum);
      case 3: return some_rows<T, pairs, 3>(p, rows, sum);
      case 2: return some_rows<T, pairs, 2>(p, rows, sum);
      default: return some_rows<T, pairs, 1>(p, rows, sum);
    }
  }

  template <class T, bool pairs, int C>
  void some_rows(Pass<T> p, int rows, F* sum) const {
    const auto next = [&](int n) {
      p.weight += n * c_.weight_row, p.ahead += n * c_.weight_row, sum += n * kMostRows, rows -= n;
    };
    for (; rows >= kRows; next(kRows)) dot<T, pairs, kRows, C>(p, sum);
    for (; rows > 0; next(1)) dot<T, pairs, 1, C>(p, sum);
  }

  // Not inlined: no call may stand in the function of the hot loop, or the compiler keeps its sums in memory.
  template <class T, bool pairs, int R, int C>
  [[gnu::noinline]] void dot(Pass<T> p, F* to) const {
    constexpr int step = pairs ? 2 * W : W;
    constexpr int steps_of_line = 64 / (step * sizeof(T)) > 0 ? 64 / (step * sizeof(T)) : 1;
    const int64_t stride = c_.weight_row;
    const int every = steps_of_line * p.passes;
    int until = steps_of_line * p.pass;
    F sum[R][C];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sum[r][c] = to[r * kMostRows + c];
    for (; p.steps > 0; --p.steps, p.weight += step, p.ahead += step, p.x += W) {
      if (--until < 0) {
        until = every - 1;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) S::prefetch(reinterpret_cast<const char*>(p.ahead + r * stride));
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) multiply_add<pairs, C>(vector<pairs>(p.weight + r * stride), p.x, sum[r]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) to[r * kMostRows + c] = sum[r][c];
  }

  // The inputs that fill no whole vector.
  template <class T, bool pairs>
  void add_rest(const T* weight, const float* x, int rows, F (*sum)[kMostRows]) const {
    constexpr int step = pairs ? 2 * W : W;
    for (int r = 0; r < rows; ++r) {
      T some[step] = {};
      std::memcpy(some, weight + r * c_.weight_row, c_.in % step * sizeof(T));
      for (int m = 0; m < c_.M; ++m) multiply_add<pairs, 1>(vector<pairs>(some), x + int64_t{m} * width_, sum[r] + m);
    }
  }

  template <bool pairs, class T>
  static F vector(const T* weight) {
    if constexpr (pairs)
      return S::load(reinterpret_cast<const float*>(weight));
    else
      return S::widen(weight);
  }

  template <bool pairs, int C>
  void multiply_add(F w, const float* x, F* sum) const {
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
