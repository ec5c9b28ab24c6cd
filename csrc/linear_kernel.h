// Rows of a skinny linear layer, for any instruction set S (simd_*.h).
//
// x is converted once and padded with zeros to whole vectors. Eight or four rows of the weight stream beside each other
// and meet up to eight rows of x at a time, so that each weight vector is loaded and widened once for all of them;
// more rows pass again while those of the weight are in the first cache. The work goes block by block along the inputs,
// as much of x at a time as that cache holds beside the weight. Where S multiplies pairs of bfloat16, bfloat16 weights
// are used as they lie.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention_kernel.h"
#include "skinny_linear.h"

namespace anabranch {

// W sums for output `row` and those behind it, of which `rows` exist, to row m of y: scaled, shifted, rounded.
template <class S>
void write_results(const LinearCall& call, typename S::F sums, int64_t row, int rows, int64_t m) {
  const auto some = [&](const auto* from) {  // of the scales or the bias
    if (rows == S::W) return S::widen(from + row);
    std::remove_const_t<std::remove_pointer_t<decltype(from)>> values[S::W] = {};
    std::memcpy(values, from + row, rows * sizeof *from);
    return S::widen(values);
  };
  with_type(call.x_type, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    if constexpr (sizeof(T) != 1) {
      if (call.scales != nullptr) sums = S::mul(sums, some(call.scales));
      if (call.bias != nullptr) sums = S::add(sums, some(static_cast<const T*>(call.bias)));
      T* to = static_cast<T*>(call.y) + m * call.out + row;
      if (rows == S::W) return S::narrow(sums, to);
      T results[S::W];
      S::narrow(sums, results);
      std::memcpy(to, results, rows * sizeof(T));
    }
  });
}

template <class S>
class LinearKernel {
  using F = typename S::F;
  static constexpr int W = S::W;
  static constexpr int kColumns = W == 16 ? 8 : 4;         // rows of x at a time, most
  static constexpr int kBlockRows = 16;                    // whose sums are kept
  static constexpr int kNear = 512;                        // bytes from a line to the one to prefetch
  static constexpr int kBlockVectors = 16 * 1024 / 4 / W;  // of x in a block: a third of the first cache

 public:
  explicit LinearKernel(const LinearCall& call)
      : c_(call), pairs_(S::pairs && call.x_type == Type::bf16 && call.weight_type == Type::bf16),
        width_(pairs_ ? padded(call.in, 2 * W) / 2 : padded(call.in, W)) {}

  int64_t packed_floats() const { return (int64_t{c_.M} + kColumns - 1) * width_; }

  // Rows of x that pass together lie vector by vector beside each other, so that no two are a multiple of 4 KiB apart.
  void pack(float* packed, int group) const {
    const int first = group * kGroupRows, rows = std::min(kGroupRows, c_.M - first), columns = padded_columns(rows);
    with_type(c_.x_type, [&](auto* type) {
      for (int m = 0; m < columns; ++m) {
        const auto* from = static_cast<decltype(type)>(c_.x) + (first + m) * c_.x_row;
        const int pass = m / kColumns * kColumns, C = std::min(kColumns, columns - pass);
        float* to = packed + int64_t{first + pass} * width_ + (m - pass) * W;
        for (int k = 0; k < width_ / W; ++k, to += C * W) S::store(to, m < rows ? vector_of(from, k) : S::zero());
      }
    });
  }

  void rows(const float* packed, int64_t begin, int64_t end) const {
    for (int first = 0; first < c_.M; first += kGroupRows) {
      const float* x = packed + int64_t{first} * width_;
      if constexpr (S::pairs) {
        if (pairs_) {
          all_rows<bfloat16, true>(x, first, begin, end);
          continue;
        }
      }
      with_type(c_.weight_type, [&](auto* type) {
        all_rows<std::remove_const_t<std::remove_pointer_t<decltype(type)>>, false>(x, first, begin, end);
      });
    }
  }

 private:
  // Vector k of a row of x, 0 where the row has ended.
  template <class T>
  F vector_of(const T* x, int k) const {
    const int step = pairs_ ? 2 * W : W;
    T some[2 * W] = {};
    std::memcpy(some, x + k * step, std::min(step, c_.in - k * step) * sizeof(T));
    if constexpr (S::pairs && std::is_same<T, bfloat16>::value) {
      if (pairs_) return S::load(reinterpret_cast<const float*>(some));
    }
    return S::widen(some);
  }

  // Rows of the weight that are read beside each other. Eight streams are the fastest where registers hold their sums.
  static constexpr int streams(int columns) { return W == 16 && columns <= 2 ? 8 : 4; }

  // Rows of x are multiplied by ones, twos, fours or eights; what is missing is 0.
  static int padded_columns(int rows) {
    const int last = (rows - 1) % kColumns + 1;
    return rows - last + (last > 4 ? 8 : last > 2 ? 4 : last);
  }

  template <class T, bool pairs>
  void all_rows(const float* packed, int first, int64_t begin, int64_t end) const {
    constexpr int step = pairs ? 2 * W : W;  // elements of the weight in one vector
    const int M = std::min(kGroupRows, c_.M - first), columns = padded_columns(M);
    const int passes = (M + kColumns - 1) / kColumns, whole = c_.in / step;
    const int depth = std::min(whole, std::max(1, kBlockVectors / columns));
    const int chunk = streams(columns);
    const auto columns_of = [&](int pass) { return std::min(kColumns, columns - pass * kColumns); };
    const auto x_of = [&](int pass, int at) {
      return packed + int64_t{pass} * kColumns * width_ + at * columns_of(pass) * W;
    };
    F sum[kBlockRows][kGroupRows];
    for (int64_t row = begin; row < end; row += kBlockRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kBlockRows, end - row));
      const T* weight = static_cast<const T*>(c_.weight) + row * c_.weight_row;
      for (int r = 0; r < rows; ++r)
        for (int m = 0; m < columns; ++m) sum[r][m] = S::zero();
      for (int at = 0; at < whole; at += depth) {
        // Needed next: further along these rows, or the beginning of the rows behind them.
        const T* next = at + depth < whole ? weight + (at + depth) * step : weight + kBlockRows * c_.weight_row;
        for (int r = 0; r < rows; r += chunk) {
          const T* from = weight + r * c_.weight_row + at * step;
          const T* ahead = chunk == 8          ? from + kNear / sizeof(T)
                           : r + chunk < rows ? from + chunk * c_.weight_row
                                              : next;
          for (int pass = 0; pass < passes; ++pass)
            some_columns<T, pairs>({from, ahead, x_of(pass, at), std::min(depth, whole - at), passes, pass},
                                   std::min(chunk, rows - r), &sum[r][pass * kColumns], columns_of(pass));
        }
      }
      if (whole * step < c_.in)
        for (int pass = 0; pass < passes; ++pass)
          add_rest<T, pairs>(weight + whole * step, x_of(pass, whole), rows, columns_of(pass), &sum[0][pass * kColumns]);
      for (int r = 0; r < rows; r += W)
        for (int m = 0; m < M; ++m)
          write_results<S>(c_, sums_of_lanes(&sum[r][m], std::min(W, rows - r)), row + r, std::min(W, rows - r),
                           first + m);
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
  void some_columns(Pass<T> p, int rows, F* sum, int C) const {
    switch (C) {
      case 8:
        if constexpr (kColumns == 8) return some_rows<T, pairs, 8>(p, rows, sum);
      case 4: return some_rows<T, pairs, 4>(p, rows, sum);
      case 2: return some_rows<T, pairs, 2>(p, rows, sum);
      default: return some_rows<T, pairs, 1>(p, rows, sum);
    }
  }

  template <class T, bool pairs, int C>
  void some_rows(Pass<T> p, int rows, F* sum) const {
    const auto next = [&](int n) {
      p.weight += n * c_.weight_row, p.ahead += n * c_.weight_row, sum += n * kGroupRows, rows -= n;
    };
    constexpr int R = C > 4 ? 2 : streams(C);  // as many as registers hold sums
    for (; rows >= R; next(R)) dot<T, pairs, R, C>(p, sum);
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
      for (int c = 0; c < C; ++c) sum[r][c] = to[r * kGroupRows + c];
    for (; p.steps > 0; --p.steps, p.weight += step, p.ahead += step, p.x += C * W) {
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
      for (int c = 0; c < C; ++c) to[r * kGroupRows + c] = sum[r][c];
  }

  // The inputs that fill no whole vector.
  template <class T, bool pairs>
  void add_rest(const T* weight, const float* x, int rows, int C, F* sum) const {
    constexpr int step = pairs ? 2 * W : W;
    for (int r = 0; r < rows; ++r) {
      T some[step] = {};
      std::memcpy(some, weight + r * c_.weight_row, c_.in % step * sizeof(T));
      for (int c = 0; c < C; ++c) multiply_add<pairs, 1>(vector<pairs>(some), x + c * W, sum + r * kGroupRows + c);
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
  static void multiply_add(F w, const float* x, F* sum) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      const F factor = S::load(x + c * W);
      if constexpr (pairs)
        sum[c] = S::dot2(w, factor, sum[c]);
      else
        sum[c] = S::fma(w, factor, sum[c]);
    }
  }

  // Lane r: the sum over the lanes of sum[r * kGroupRows], the rows of one column; 0 from `rows` on.
  static F sums_of_lanes(const F* sum, int rows) {
    F lanes[W];
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) lanes[r] = r < rows ? sum[r * kGroupRows] : S::zero();
    S::transpose(lanes);
#pragma GCC unroll 16
    for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 16
      for (int i = 0; i < half; ++i) lanes[i] = S::add(lanes[i], lanes[i + half]);
    return lanes[0];
  }

  const LinearCall& c_;
  const bool pairs_;
  const int width_;
};

}  // namespace anabranch
