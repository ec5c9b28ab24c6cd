// Tiles of the Gram matrix of centred rows, and of a sum of centred rows, for any instruction set S (simd_*.h).
//
// A tile is some columns of all rows: centred, converted and copied side by side, since N rows that lie far apart are
// more pages and streams than the hardware follows. Products of a tile are summed in float32 and then added to float64
// sums. Blocks of rows meet in registers; while they do, the next tile is asked for into the second cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "geometric_median.h"

namespace anabranch {

// What both kernels do with a piece of a row.
template <class S>
struct RowPiece {
  using F = typename S::F;
  static constexpr int W = S::W;

  // body(k, x) for vectors of `count` elements from k = 0 on; the last one is filled up with zeros.
  template <class T, class Body>
  static void each(const T* row, int count, Body&& body) {
    int k = 0;
#pragma GCC unroll 2
    for (; k + W <= count; k += W) body(k, S::widen(row + k));
    if (k == count) return;
    T some[W] = {};
    std::memcpy(some, row + k, (count - k) * sizeof(T));
    body(k, S::widen(some));
  }

  // -centre, with zeros where it is not finite, and behind it up to a whole vector.
  template <class T>
  static void negate_centre(const T* centre, int count, float* to) {
    if (centre == nullptr) return std::fill(to, to + (count + W - 1) / W * W, 0.0f);
    F wrong = S::zero();  // 0 * x: NaN once something is not finite
    each(centre, count, [&](int k, F x) {
      S::store(to + k, S::mul(x, S::set1(-1.0f)));
      wrong = S::fma(x, S::zero(), wrong);
    });
    if (S::sum(wrong) == 0.0f) return;
    for (int k = 0; k < count; ++k)
      if (!std::isfinite(to[k])) to[k] = 0.0f;
  }

  // Rows whose squares add up to this meet each other without overflow, and no product that matters underflows.
  static constexpr float kSmallest = 1e-20f, kLargest = 1e30f;

  // Copies a piece of a row, centred, over 2^e; returns 2^e. It is 1 unless squares would leave float32's range.
  template <class T>
  static double copy(const T* row, int count, const float* centre, float* to) {
    F squares[2] = {S::zero(), S::zero()};  // two, since each addition waits for the one before
    each(row, count, [&](int k, F x) {
      const F difference = S::add(x, S::load(centre + k));
      S::store(to + k, difference);
      F& sum = squares[k / W & 1];
      sum = S::fma(difference, difference, sum);
    });
    const float square = S::sum(S::add(squares[0], squares[1]));
    return square >= kSmallest && square <= kLargest ? 1.0 : scale(to, count);
  }

  [[gnu::noinline]] static double scale(float* row, int count) {
    F largest = S::zero();
    for (int k = 0; k < count; k += W) {
      const F x = S::load(row + k);
      largest = S::max(largest, S::max(x, S::mul(x, S::set1(-1.0f))));
    }
    const float magnitude = S::highest(largest);
    if (magnitude == 0.0f || !std::isfinite(magnitude)) return 1.0;
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    exponent = std::max(exponent, -100);  // 2^100 can be multiplied with in float32, and suffices
    const F factor = S::set1(std::ldexp(1.0f, -exponent));
    for (int k = 0; k < count; k += W) S::store(row + k, S::mul(S::load(row + k), factor));
    return std::ldexp(1.0, exponent);
  }
};

template <class S>
class GramKernel {
  using F = typename S::F;
  static constexpr int W = S::W;
  static constexpr int kRows = 4, kColumns = S::W == 16 ? 4 : 2;  // of a register block
  static constexpr int kBlock = kRows * kColumns;
  static constexpr int kGroup = 2 * kRows;  // rows that stay in the first cache while all others pass

 public:
  explicit GramKernel(const GramCall& call)
      : c_(call), rows_((call.N + kRows - 1) / kRows * kRows), tile_(tile_columns(call.N)), stride_(tile_ + 16) {
    each_block([&](int, int) { ++blocks_; });
  }

  // A tile and the next one stay within the second cache, a group of its rows within the first.
  static int tile_columns(int N) { return N <= 256 ? 512 : 256; }

  int64_t scratch_floats() const { return int64_t{rows_ + 1} * stride_ + 2 * (blocks_ * kBlock + rows_); }

  // Adds the products of columns [begin, end) of problem b to sums [N, N], above and on the diagonal.
  void add(int b, int64_t begin, int64_t end, float* scratch, double* sums) const {
    float* centre = scratch + int64_t{rows_} * stride_;
    double* totals = reinterpret_cast<double*>(centre + stride_);  // block after block, unlike sums
    double* factors = totals + blocks_ * kBlock;
    std::fill(scratch, centre, 0.0f);
    std::fill(totals, factors + rows_, 0.0);
    with_type(c_.type, [&](auto* type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      if constexpr (sizeof(T) > 1) {
        const T* points = static_cast<const T*>(c_.points) + b * c_.batch;
        const T* zero = c_.centre == nullptr ? nullptr : static_cast<const T*>(c_.centre) + b * c_.centre_batch;
        for (int64_t at = begin; at < end; at += tile_) {
          const int count = static_cast<int>(std::min<int64_t>(tile_, end - at));
          RowPiece<S>::negate_centre(zero == nullptr ? zero : zero + at, count, centre);
          bool scaled = false;
          for (int i = 0; i < c_.N; ++i) {
            factors[i] = RowPiece<S>::copy(points + i * c_.row + at, count, centre, scratch + int64_t{i} * stride_);
            scaled |= factors[i] != 1.0;
          }
          add_tile(scratch, scaled ? factors : nullptr, (count + W - 1) / W,
                   reinterpret_cast<const char*>(points + at + count), c_.row * static_cast<int64_t>(sizeof(T)),
                   count * static_cast<int>(sizeof(T)), totals);
        }
      }
    });
    each_block([&](int i, int j) {
      for (int c = 0; c < kColumns; ++c)
        for (int r = 0; r < kRows; ++r, ++totals)
          if (i + r < c_.N && j + c < c_.N) sums[int64_t{i + r} * c_.N + j + c] += *totals;
    });
  }

 private:
  // All pairs of blocks of rows, a group of rows against all that follow.
  template <class Body>
  void each_block(Body&& body) const {
    for (int group = 0; group < rows_; group += kGroup)
      for (int j = group; j < rows_; j += kColumns)
        for (int i = group; i < std::min(group + kGroup, rows_) && i < j + kColumns; i += kRows) body(i, j);
  }

  // All products of one tile. The q-th of Q blocks asks for row q * N / Q of the next tile, which begins at `ahead`.
  void add_tile(const float* tile, const double* factors, int steps, const char* ahead, int64_t row_bytes, int bytes,
                double* totals) const {
    int64_t block = 0, asked = -1;
    each_block([&](int i, int j) {
      const int64_t row = block * c_.N / blocks_;
      const bool asks = row != asked;
      asked = row;
      float products[kBlock];
      double* total = totals + kBlock * block++;
      dot(tile + int64_t{i} * stride_, tile + int64_t{j} * stride_, steps, asks ? ahead + row * row_bytes : ahead,
          asks ? bytes / steps : 0, products);
      if (factors != nullptr)
        for (int e = 0; e < kBlock; ++e) total[e] += products[e] * (factors[i + e % kRows] * factors[j + e / kRows]);
      else
        for (int e = 0; e < kBlock; ++e) total[e] += products[e];
    });
  }

  // Not inlined: no call may stand in the function of the hot loop, or the compiler keeps its sums in memory.
  [[gnu::noinline]] void dot(const float* a, const float* b, int steps, const char* ahead, int ahead_step,
                             float (&products)[kBlock]) const {
    const int64_t stride = stride_;
    F sum[kRows][kColumns];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) sum[r][c] = S::zero();
    for (; steps > 0; --steps, a += W, b += W, ahead += ahead_step) {
      S::prefetch_second(ahead);
      F column[kColumns];
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) column[c] = S::load(b + c * stride);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const F row = S::load(a + r * stride);
#pragma GCC unroll 16
        for (int c = 0; c < kColumns; ++c) sum[r][c] = S::fma(row, column[c], sum[r][c]);
      }
    }
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) S::sums(sum[0][c], sum[1][c], sum[2][c], sum[3][c], products + c * kRows);
  }

  const GramCall& c_;
  const int rows_, tile_, stride_;
  int64_t blocks_ = 0;
};

template <class S>
class CombineKernel {
  using F = typename S::F;
  static constexpr int W = S::W;
  static constexpr int kRows = 4;           // added to a tile at a time
  static constexpr int kTile = 1024;        // columns
  static constexpr int kRowsAhead = 32;     // pieces of rows between one and the one asked for meanwhile

 public:
  explicit CombineKernel(const CombineCall& call) : c_(call) {}

  static int64_t scratch_floats() { return 2 * kTile; }

  // Columns [begin, end) of problem b, from the rows that take part in it.
  void add(int b, const Addend* addends, int count, int64_t begin, int64_t end, float* scratch) const {
    float *sum = scratch, *centre = scratch + kTile;
    with_type(c_.type, [&](auto* type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      if constexpr (sizeof(T) > 1) {
        const T* zero = c_.centre == nullptr ? nullptr : static_cast<const T*>(c_.centre) + b * c_.centre_batch;
        T* out = static_cast<T*>(c_.out) + b * c_.D;
        for (int64_t at = begin; at < end; at += kTile) {
          const int width = static_cast<int>(std::min<int64_t>(kTile, end - at));
          RowPiece<S>::negate_centre(zero == nullptr ? zero : zero + at, width, centre);
          std::fill(sum, sum + kTile, 0.0f);
          int i = 0;
          for (; i + kRows <= count; i += kRows) add_rows<T, kRows>(addends, count, i, at, width, centre, sum);
          for (; i < count; ++i) add_rows<T, 1>(addends, count, i, at, width, centre, sum);
          for (int k = 0; k < width; k += W)
            S::store(sum + k, S::fma(S::load(centre + k), S::set1(-1.0f), S::load(sum + k)));
          for (int k = 0; k < width; ++k) from_float(sum[k], out + at + k);
        }
      }
    });
  }

 private:
  template <class T, int R>
  [[gnu::noinline]] void add_rows(const Addend* addends, int count, int i, int64_t at, int width, const float* centre,
                                  float* sum) const {
    const T *row[R], *ahead[R];
    F factor[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int later = i + r + kRowsAhead;
      row[r] = reinterpret_cast<const T*>(addends[i + r].row) + at;
      ahead[r] = reinterpret_cast<const T*>(addends[later % count].row) + at + int64_t{later / count} * kTile;
      factor[r] = S::set1(addends[i + r].coefficient);
    }
    int k = 0;
    for (; k + W <= width; k += W) {
      const F minus = S::load(centre + k);
      F total = S::load(sum + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        S::prefetch_second(reinterpret_cast<const char*>(ahead[r] + k));
        total = S::fma(factor[r], S::add(S::widen(row[r] + k), minus), total);
      }
      S::store(sum + k, total);
    }
    for (; k < width; ++k)
      for (int r = 0; r < R; ++r) sum[k] += addends[i + r].coefficient * (to_float(row[r][k]) + centre[k]);
  }

  const CombineCall& c_;
};

}  // namespace anabranch
