// The values of each coordinate in order, and the rules that follow from that, for any instruction set S (simd_*.h).
//
// A tile is some columns of all rows, converted to float32 and copied side by side, since N rows that lie far apart are
// more pages and streams than the hardware follows. Its columns are sorted by networks, one vector of them at a time:
// what fits the registers within them, the rest of the way in the first cache. Meanwhile the next tile is asked for
// into the second one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "coordinate_rules.h"
#include "gram_kernel.h"

namespace anabranch {

template <class S>
class CoordinateKernel {
  using F = typename S::F;
  static constexpr int W = S::W;
  static constexpr int kMost = 512;      // columns of a tile
  static constexpr int kTile = 1 << 15;  // floats of a tile, or as many as two vectors of columns need
  static constexpr int kPad = 16;        // floats between rows of a tile: neighbours do not share a cache set
  // Brings vectors of values into order: sort<n> all of them, median_of<n> to the middle, whose mean it stores.
  using Sort = void (*)(const float* from, int64_t stride, float* to, int64_t to_stride_or_odd);

 public:
  explicit CoordinateKernel(const CoordinateCall& call) : c_(call) {
    while ((call.N + parts_ - 1) / parts_ > S::registers) parts_ *= 2;
    rows_ = (call.N + 4 * parts_ - 1) / (4 * parts_) * 4;
    first_ = parts_ == 1 ? (rows_ - call.N) / 2 : 0;
    width_ = std::clamp(kTile / (rows_ * parts_) / (2 * W) * (2 * W), 2 * W, kMost);
    stride_ = width_ + kPad;
  }

  CoordinatePlan plan() const { return {parts_, W, int64_t{rows_} * parts_ * (stride_ + W) + kMost}; }

  // Columns [begin, end) of problem b. False if there is a NaN among them.
  bool run(int b, int64_t begin, int64_t end, const Exchange* exchanges, int64_t count, float* scratch) {
    exchanges_ = exchanges, count_ = count;
    const int64_t rows = int64_t{rows_} * parts_;
    tile_ = scratch, sorted_ = tile_ + rows * stride_;
    float* results = sorted_ + rows * W;
    constexpr float high = std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < rows; ++i)  // what fills up the registers: as many low values as high ones, or one less
      if (i < first_ || i >= first_ + c_.N) std::fill_n(tile_ + i * stride_, width_, i < first_ ? -high : high);
    bool numbers = true;
    with_type(c_.type, [&](auto* type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      if constexpr (sizeof(T) > 1) {
        const T* points = static_cast<const T*>(c_.points) + b * c_.batch;
        T* out = static_cast<T*>(c_.out) + b * c_.D;
        for (int64_t at = begin; at < end; at += width_) {
          const int count = static_cast<int>(std::min<int64_t>(width_, end - at));
          int nans = 0;
          for (int64_t i = 0; i < c_.N; ++i) nans |= copy(points + i * c_.row + at, count, tile_ + (first_ + i) * stride_);
          numbers &= nans == 0;
          reduce(count, reinterpret_cast<const char*>(points + at + count), c_.row * static_cast<int64_t>(sizeof(T)),
                 count * static_cast<int>(sizeof(T)), results);
          narrow(results, count, out + at);
        }
      }
    });
    return numbers;
  }

 private:
  // Copies a piece of a row, zeros all positive; not 0 if there is a NaN in it.
  template <class T>
  static int copy(const T* from, int count, float* to) {
    int nans = 0, k = 0;
    for (; k + 2 * W <= count; k += 2 * W) {
      const F a = S::widen(from + k), b = S::widen(from + k + W);
      S::store(to + k, S::add(a, S::zero()));
      S::store(to + k + W, S::add(b, S::zero()));
      nans |= S::nans(a, b);
    }
    RowPiece<S>::each(from + k, count - k, [&](int j, F x) {
      S::store(to + k + j, S::add(x, S::zero()));
      nans |= S::nans(x, x);
    });
    return nans;
  }

  template <class T>
  static void narrow(const float* from, int count, T* to) {
    int k = 0;
    for (; k + W <= count; k += W) S::narrow(S::load(from + k), to + k);
    for (; k < count; ++k) from_float(from[k], to + k);
  }

  // Results of a tile's columns. Meanwhile pieces of `bytes` of the rows from `ahead` on are asked for.
  void reduce(int count, const char* ahead, int64_t row_bytes, int bytes, float* results) const {
    const bool majority = c_.rule == Rule::sign_majority, in_registers = parts_ == 1 && c_.rule == Rule::median;
    const Sort sort = in_registers ? sort_of<4, true>() : sort_of<4, false>();
    const int steps = (count + W - 1) / W;
    int64_t asked = 0;
    for (int s = 0; s < steps; ++s) {
      for (const int64_t until = int64_t{c_.N} * (s + 1) / steps; asked < until; ++asked)
        for (int byte = 0; byte < bytes; byte += 64) S::prefetch_second(ahead + asked * row_bytes + byte);
      const float* column = tile_ + s * W;
      float* to = results + s * W;
      if (majority) {
        S::store(to, majority_of(column));
      } else if (in_registers) {
        sort(column, stride_, to, c_.N % 2);
      } else {
        for (int part = 0; part < parts_; ++part)
          sort(column + part * int64_t{stride_}, int64_t{parts_} * stride_, sorted_ + part * W, int64_t{parts_} * W);
        exchange_in_cache();
        S::store(to, finish());
      }
    }
  }

  template <int n, bool median>
  Sort sort_of() const {
    if constexpr (n <= S::registers) return rows_ == n ? (median ? &median_of<n> : &sort<n>) : sort_of<n + 4, median>();
    return nullptr;  // not reached: rows_ is one of these
  }

  template <int low, int high, int n>
  [[gnu::always_inline]] static inline void exchange(F (&value)[n]) {
    const F lower = S::min(value[low], value[high]);
    value[high] = S::max(value[low], value[high]);
    value[low] = lower;
  }

  template <int n, size_t... each>
  [[gnu::always_inline]] static inline void exchange_all(F (&value)[n], std::index_sequence<each...>) {
    constexpr auto list = SortingNetwork<n>::exchanges;
    (exchange<list[each].low, list[each].high>(value), ...);
  }

  template <int n>
  [[gnu::always_inline]] static inline void load_sorted(const float* from, int64_t stride, F (&value)[n]) {
#pragma GCC unroll 64
    for (int i = 0; i < n; ++i) value[i] = S::load(from + i * stride);
    exchange_all(value, std::make_index_sequence<SortingNetwork<n>::count()>());
  }

  template <int n>
  static void sort(const float* from, int64_t stride, float* to, int64_t to_stride) {
    F value[n];
    load_sorted(from, stride, value);
#pragma GCC unroll 64
    for (int i = 0; i < n; ++i) S::store(to + i * to_stride, value[i]);
  }

  // Exchanges that the middle values do not need are dead code, which the compiler leaves out.
  template <int n>
  static void median_of(const float* from, int64_t stride, float* to, int64_t odd) {
    F value[n];
    load_sorted(from, stride, value);
    S::store(to, middle(value[n / 2 - 1], odd ? value[n / 2 - 1] : value[n / 2]));
  }

  void exchange_in_cache() const {
    float* const values = sorted_;
    for (const Exchange *e = exchanges_, *end = e + count_; e != end; ++e) {
      const F low = S::load(values + e->low), high = S::load(values + e->high);
      S::store(values + e->low, S::min(low, high));
      S::store(values + e->high, S::max(low, high));
    }
  }

  F majority_of(const float* column) const {
    F sum = S::zero();
    for (int64_t i = 0; i < c_.N; ++i) sum = S::add(sum, sign(S::load(column + (first_ + i) * stride_)));
    return sign(sum);
  }

  static F sign(F x) {
    return S::where_greater(x, S::zero(), S::set1(1.0f), S::where_greater(S::zero(), x, S::set1(-1.0f), S::zero()));
  }

  F value(int64_t i) const { return S::load(sorted_ + (first_ + i) * W); }
  F median() const { return middle(value((c_.N - 1) / 2), value(c_.N / 2)); }

  F finish() const {
    if (c_.rule == Rule::median) return median();
    if (c_.rule == Rule::trimmed_mean) return trimmed_mean();
    return mean_around(c_.rule == Rule::phocas ? trimmed_mean() : median());
  }

  // (a + b) / 2, rounded once.
  static F middle(F a, F b) {
    const F half = S::set1(0.5f), sum = S::add(a, b);
    return where_finite(sum, S::mul(sum, half), S::add(S::mul(a, half), S::mul(b, half)));
  }

  F trimmed_mean() const {
    typename S::Sum sum = S::no_sum();
    for (int i = c_.f; i < c_.N - c_.f; ++i) S::add_to(sum, value(i));
    return S::mean(sum, c_.N - 2 * c_.f);
  }

  // Mean of the m = N - f values nearest to the centre. They stand side by side, so of those m apart only one is taken:
  // the window moves up by one place as long as the value it loses is farther away than the one it gains.
  F mean_around(F centre) const {
    const F minus = S::set1(-1.0f), away = S::mul(centre, minus);
    const int m = c_.N - c_.f;
    typename S::Sum sum = S::no_sum();
    for (int r = 0; r < m; ++r) {
      F taken = value(r);
      for (int i = r; i + m < c_.N; i += m) {
        const F gained = value(i + m), below = S::add(centre, S::mul(value(i), minus));
        taken = S::where_greater(below, S::add(gained, away), gained, taken);
      }
      S::add_to(sum, taken);
    }
    return where_finite(centre, S::mean(sum, m), centre);
  }

  static F where_finite(F x, F then, F otherwise) {
    const F magnitude = S::max(x, S::mul(x, S::set1(-1.0f)));
    return S::where_greater(S::set1(std::numeric_limits<float>::infinity()), magnitude, then, otherwise);
  }

  const CoordinateCall& c_;
  int parts_ = 1;  // sequences of values, each parts_ places apart, that are sorted within the registers
  int rows_ = 0;   // values of such a sequence
  int first_ = 0;  // place of the first value, behind low ones that fill up
  int width_ = 0, stride_ = 0;  // of a tile
  const Exchange* exchanges_ = nullptr;
  int64_t count_ = 0;
  float *tile_ = nullptr, *sorted_ = nullptr;
};

}  // namespace anabranch
