// Matrix products over a field, for any sums A (field_sums*.h).
//
// Lanes are columns of x: register blocks of A::kRows rows of the matrix, whose elements are broadcast, by a vector of
// columns. What is in a vector of columns is cut in limbs once and kept while all rows of the matrix pass by. If a block
// holds all rows anyway, nothing is kept: x streams by once. Few columns with a long way to sum are the other case: lanes
// are then places of the sum, and it is the few columns that are prepared and kept while all rows of the matrix stream by.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "field_coding.h"
#include "field_sums.h"

namespace anabranch {
namespace {

template <class A>
class ProductKernel {
  using Element = typename A::Element;
  using X = typename A::X;
  using Sum = typename A::Sum;
  using Factor = typename A::Factor;
  static constexpr int W = A::W, kRows = A::kRows;
  static constexpr int64_t kKeptWords = 8192;  // of columns of x at a time: they share the first caches with the factors
  // Of the other case: columns and rows of a register block, vectors of the columns kept, rows that pass by them.
  static constexpr int kColumns = 4, kSomeRows = kRows / 2, kVectors = 64, kPanel = 64;

 public:
  ProductKernel(const FieldProduct& call, const A& arithmetic) : c_(call), a_(arithmetic) {}

  // ------------------------------------------------------------------------------------------- lanes are columns

  // Words of the whole matrix as factors: slab after slab of U, block after block of rows, [u][row][limb].
  int64_t factor_words() const { return padded_rows() * c_.U * A::kLimbs; }

  void prepare(uint64_t* factors) const {
    each_slab([&](int64_t u0, int64_t u1) {
      each_block([&](int64_t row, int rows) {
        for (int64_t u = u0; u < u1; ++u)
          for (int r = 0; r < rows; ++r, factors += A::kLimbs) a_.prepare(at(row + r, u), factors);
      });
    });
  }

  int64_t scratch_words() const { return vectors_kept() * std::min<int64_t>(c_.U, A::kTerms) * A::kWords + 8; }

  void columns(const uint64_t* factors, int64_t begin, int64_t end, uint64_t* scratch) const {
    each_slab([&](int64_t u0, int64_t u1) {
      const uint64_t* of_slab = factors + padded_rows() * u0 * A::kLimbs;
      const int64_t whole = begin + (end - begin) / (W * kRows) * (W * kRows);
      if (c_.M <= kRows) {
        stream(of_slab, begin, whole, u0, u1);
        keep(of_slab, whole, end, u0, u1, scratch);
      } else {
        keep(of_slab, begin, end, u0, u1, scratch);
      }
    });
  }

  // -------------------------------------------------------------------------------- lanes are places of the sum

  int64_t across_words() const { return kColumns * kVectors * A::kOtherWords + 8 + kPanel * kColumns * kSumWords; }

  // Adds the products of places [begin, end) to sums [M, L]. Rows of the matrix and columns of x must be contiguous.
  void across(int64_t begin, int64_t end, uint64_t* scratch, void* sums) const {
    for (int64_t column = 0; column < c_.L; column += kColumns)
      for (int64_t row = 0; row < c_.M; row += kPanel)
        for (int64_t u = begin; u < end; u += kSlab) 
          across_panel(row, column, u, std::min(u + kSlab, end), scratch, static_cast<Element*>(sums));
  }

 private:
  static constexpr int64_t kSumWords = (sizeof(Sum) + 7) / 8, kSlab = int64_t{A::kTerms} / A::kAcross * W;

  void across_panel(int64_t row, int64_t column, int64_t begin, int64_t end, uint64_t* scratch, Element* sums) const {
    const int rows = static_cast<int>(std::min<int64_t>(kPanel, c_.M - row));
    const int columns = static_cast<int>(std::min<int64_t>(kColumns, c_.L - column));
    uint64_t* totals = scratch;
    uint64_t* factors = scratch + kPanel * kColumns * kSumWords;
    for (int i = 0; i < kPanel * kColumns; ++i) put(A::zero(), totals + i * kSumWords);
    for (int64_t u = begin; u < end; u += kVectors * W) {
      const int64_t width = std::min<int64_t>(kVectors * W, end - u), vectors = (width + W - 1) / W;
      for (int c = 0; c < kColumns; ++c) {
        const Element* x = static_cast<const Element*>(c_.x) + (column + std::min(c, columns - 1)) * c_.x_column + u;
        for (int64_t v = 0; v < vectors; ++v)
          A::keep_other(a_.other(Piece(x + v * W, width - v * W).from), factors + (v * kColumns + c) * A::kOtherWords);
      }
      for (int r = 0; r < rows; r += kSomeRows) across_block(row + r, u, width, factors, totals + r * kColumns * kSumWords);
    }
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < columns; ++c) {
        Element lanes[W];
        A::store(lanes, a_.reduce(get(totals + (r * kColumns + c) * kSumWords)));
        Element total = lanes[0];
        for (int k = 1; k < W; ++k) total = a_.scalar.add(total, lanes[k]);
        Element& sum = sums[(row + r) * c_.L + column + c];
        sum = a_.scalar.add(sum, a_.finish(total));
      }
  }

  [[gnu::noinline]] void across_block(int64_t row, int64_t u, int64_t width, const uint64_t* f, uint64_t* totals) const {
    Sum sum[kSomeRows][kColumns];
    const Element* from[kSomeRows];
#pragma GCC unroll 8
    for (int r = 0; r < kSomeRows; ++r) {
      from[r] = static_cast<const Element*>(c_.matrix) + std::min(row + r, c_.M - 1) * c_.matrix_row + u;
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) sum[r][c] = get(totals + (r * kColumns + c) * kSumWords);
    }
    constexpr int step = (A::kStep + A::kAcross - 1) / A::kAcross;  // vectors before a fold
    int unfolded = 0;
    for (int64_t k = 0; k < width; k += W, f += kColumns * A::kOtherWords) {
      X x[kSomeRows];
#pragma GCC unroll 8
      for (int r = 0; r < kSomeRows; ++r) x[r] = a_.load(Piece(from[r] + k, width - k).from);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        const Factor factor = A::kept_other(f + c * A::kOtherWords);
#pragma GCC unroll 8
        for (int r = 0; r < kSomeRows; ++r) A::add_across(sum[r][c], x[r], factor);
      }
      if (++unfolded < step && k + W < width) continue;
      unfolded = 0;
#pragma GCC unroll 8
      for (int r = 0; r < kSomeRows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) A::fold(sum[r][c]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kSomeRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) put(sum[r][c], totals + (r * kColumns + c) * kSumWords);
  }

  // W elements: those at `p`, or if they are fewer, these and zeros.
  struct Piece {
    const Element* from;
    Element some[W];
    [[gnu::always_inline]] Piece(const Element* p, int64_t count) : from(p) {
      if (__builtin_expect(count >= W, 1)) return;
      for (int64_t k = 0; k < W; ++k) some[k] = k < count ? p[k] : 0;
      from = some;
    }
  };

  static Sum get(const uint64_t* from) {
    Sum sum;
    std::memcpy(&sum, from, sizeof(Sum));
    return sum;
  }
  static void put(const Sum& sum, uint64_t* to) { std::memcpy(to, &sum, sizeof(Sum)); }

  // A block of R rows by C vectors.
  template <int R, int C, class LoadX>
  [[gnu::always_inline]] void block(const uint64_t* f, int64_t terms, const LoadX& load, int64_t row, int64_t column,
                                    int64_t width, bool first) const {
    Sum sum[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) sum[r][v] = A::zero();
    int64_t u = 0;
    const auto step = [&](int64_t at) __attribute__((always_inline)) {
      X x[C];
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) x[v] = load(at, v);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r, f += A::kLimbs) {
        const Factor factor = A::broadcast(f);
#pragma GCC unroll 8
        for (int v = 0; v < C; ++v) A::add(sum[r][v], x[v], factor);
      }
    };
    const auto fold = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < C; ++v) A::fold(sum[r][v]);
    };
    for (; u + A::kStep <= terms; u += A::kStep) {
#pragma GCC unroll 4
      for (int k = 0; k < A::kStep; ++k) step(u + k);
      fold();
    }
    if constexpr (A::kStep > 1) {
      for (; u < terms; ++u) step(u);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v)
        if (row + r < c_.M) write(a_.reduce(sum[r][v]), row + r, column + v * W, width - v * W, first);
  }

  void write(const typename A::Y& y, int64_t row, int64_t column, int64_t width, bool first) const {
    Element* to = static_cast<Element*>(c_.out) + row * c_.L + column;
    ask_to_write(to + W);  // where the next vector goes
    if (width >= W) return A::store(to, first ? y : a_.plus(A::again(to), y));
    if (width <= 0) return;
    Element some[W] = {};
    if (!first) std::memcpy(some, to, width * sizeof(Element));
    A::store(some, first ? y : a_.plus(A::again(some), y));
    std::memcpy(to, some, width * sizeof(Element));
  }

  // All rows at once, x straight from memory; the next columns are asked for on the way.
  void stream(const uint64_t* f, int64_t begin, int64_t end, int64_t u0, int64_t u1) const {
    if (c_.M == 1) return stream_rows<1>(f, begin, end, u0, u1);
    if (c_.M == 2) return stream_rows<2>(f, begin, end, u0, u1);
    if constexpr (kRows == 4) stream_rows<4>(f, begin, end, u0, u1);
  }

  template <int R>
  [[gnu::noinline]] void stream_rows(const uint64_t* f, int64_t begin, int64_t end, int64_t u0, int64_t u1) const {
    constexpr int C = kRows / R;
    const Element* x = static_cast<const Element*>(c_.x) + u0 * c_.x_row;
    for (int64_t column = begin; column < end; column += C * W) {
      const auto load = [&](int64_t u, int v) __attribute__((always_inline)) {
        const Element* from = x + u * c_.x_row + column + v * W;
        ask_for(from + C * W);
        return a_.load(from);
      };
      block<R, C>(f, u1 - u0, load, 0, column, C * W, u0 == 0);
    }
  }

  void keep(const uint64_t* f, int64_t begin, int64_t end, int64_t u0, int64_t u1, uint64_t* scratch) const {
    const int64_t step = vectors_kept() * W, terms = u1 - u0;
    for (int64_t tile = begin; tile < end; tile += step) {
      const int64_t width = std::min(step, end - tile), vectors = (width + W - 1) / W;
      const int64_t whole_rows = c_.M / kRows * kRows;
      for (int64_t u = 0; u < terms; ++u) keep_row(u0 + u, tile, width, scratch + u * A::kWords, terms * A::kWords);
      for (int64_t v = 0; v < vectors; ++v)  // its limbs stay in the first cache while the factors come from the second
        for (int64_t row = 0; row < whole_rows; row += kRows)
          kept_block(kRows, f + row * terms * A::kLimbs, terms, scratch + v * terms * A::kWords, row, tile + v * W,
                     width - v * W, 1, u0 == 0);
      if (whole_rows == c_.M) continue;
      for (int64_t v = 0; v < vectors;)
        v += kept_block(static_cast<int>(padded_rows() - whole_rows), f + whole_rows * terms * A::kLimbs, terms,
                        scratch + v * terms * A::kWords, whole_rows, tile + v * W, width - v * W, vectors - v, u0 == 0);
    }
  }

  void keep_row(int64_t u, int64_t column, int64_t width, uint64_t* to, int64_t vector_words) const {
    const Element* row = static_cast<const Element*>(c_.x) + u * c_.x_row + column;
    int64_t k = 0;
    for (; k + W <= width; k += W, to += vector_words) {
      ask_for(row + k + width);  // the next columns
      A::keep(a_.load(row + k), to);
    }
    if (k == width) return;
    Element some[W] = {};
    std::memcpy(some, row + k, (width - k) * sizeof(Element));
    A::keep(a_.load(some), to);
  }

  // Returns how many vectors it took.
  int kept_block(int rows, const uint64_t* f, int64_t terms, const uint64_t* x, int64_t row, int64_t column,
                 int64_t width, int64_t vectors, bool first) const {
    if (rows == 1) return kept_rows<1>(f, terms, x, row, column, width, vectors, first);
    if (rows == 2) return kept_rows<2>(f, terms, x, row, column, width, vectors, first);
    if constexpr (kRows == 4) return kept_rows<4>(f, terms, x, row, column, width, vectors, first);
    return 1;
  }

  template <int R>
  [[gnu::noinline]] int kept_rows(const uint64_t* f, int64_t terms, const uint64_t* x, int64_t row, int64_t column,
                                  int64_t width, int64_t vectors, bool first) const {
    constexpr int C = kRows / R;
    const int64_t stride = terms * A::kWords;
    if (C > 1 && vectors >= C) {
      const auto load = [&](int64_t u, int v)
                            __attribute__((always_inline)) { return A::kept(x + v * stride + u * A::kWords); };
      block<R, C>(f, terms, load, row, column, width, first);
      return C;
    }
    const auto load = [&](int64_t u, int) __attribute__((always_inline)) { return A::kept(x + u * A::kWords); };
    block<R, 1>(f, terms, load, row, column, width, first);
    return 1;
  }

  Element at(int64_t row, int64_t u) const {
    if (row >= c_.M) return 0;
    return static_cast<const Element*>(c_.matrix)[row * c_.matrix_row + u * c_.matrix_column];
  }

  // Blocks of kRows rows; what is left in one block of 1, 2 or 4.
  template <class Body>
  void each_block(Body&& body) const {
    int64_t row = 0;
    for (; row + kRows <= c_.M; row += kRows) body(row, kRows);
    if (row < c_.M) body(row, static_cast<int>(padded_rows() - row));
  }

  int64_t padded_rows() const {
    const int64_t left = c_.M % kRows;
    return c_.M + (left == 3);
  }

  template <class Body>
  void each_slab(Body&& body) const {
    int64_t u = 0;
    do {  // once for U = 0: the sums are zero
      const int64_t next = std::min<int64_t>(u + A::kTerms, c_.U);
      body(u, next);
      u = next;
    } while (u < c_.U);
  }

  int64_t vectors_kept() const {
    const int64_t words = std::max<int64_t>(1, std::min<int64_t>(c_.U, A::kTerms)) * A::kWords;
    return std::clamp<int64_t>(kKeptWords / words, 1, 32);
  }

  const FieldProduct& c_;
  const A a_;
};

}  // namespace
}  // namespace anabranch
