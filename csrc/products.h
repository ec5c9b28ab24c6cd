// Products of small matrices of floats, or of pairs of bfloat16 along the summed dimension, for any instruction set S
// (simd_*.h). A row of a result never depends on the other rows.
#pragma once

#include <cstdint>
#include <type_traits>

#include "scalar.h"

namespace anabranch {

inline int padded(int n, int to) { return (n + to - 1) / to * to; }

struct Matrix {
  float* data;
  int64_t row;  // stride
};

// c[R][C * W] = (add ? c : 0) + a[R][K] · b[K][C * W]; a and b hold floats, or pairs of bfloat16 when `pairs`.
template <class S, bool pairs, int R, int C>
[[gnu::noinline]] void multiply_block(Matrix a, Matrix b, Matrix c, int K, bool add) {
  using F = typename S::F;
  F sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < C; ++i) sum[r][i] = add ? S::load(c.data + r * c.row + i * S::W) : S::zero();
  for (int k = 0; k < K; ++k) {
    F column[C];
#pragma GCC unroll 16
    for (int i = 0; i < C; ++i) column[i] = S::load(b.data + k * b.row + i * S::W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const F factor = S::set1(a.data[r * a.row + k]);
#pragma GCC unroll 16
      for (int i = 0; i < C; ++i) {
        if constexpr (pairs)
          sum[r][i] = S::dot2(factor, column[i], sum[r][i]);
        else
          sum[r][i] = S::fma(factor, column[i], sum[r][i]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < C; ++i) S::store(c.data + r * c.row + i * S::W, sum[r][i]);
}

template <class S, bool pairs, int R, int C>
inline void multiply_rows(int& rows, Matrix& a, Matrix b, Matrix& c, int K, bool add) {
  for (; rows >= R; rows -= R, a.data += R * a.row, c.data += R * c.row)
    multiply_block<S, pairs, R, C>(a, b, c, K, add);
}

template <class S, bool pairs, int C>
inline void multiply_columns(int rows, Matrix a, Matrix b, Matrix c, int K, bool add) {
  // R * C sums, C columns and one factor fit the vector registers: 32 of AVX-512, 16 of the others.
  if constexpr (S::W == 16 && C <= 2) multiply_rows<S, pairs, 8, C>(rows, a, b, c, K, add);
  if constexpr (S::W == 16 || C <= 2) multiply_rows<S, pairs, 4, C>(rows, a, b, c, K, add);
  multiply_rows<S, pairs, 2, C>(rows, a, b, c, K, add);
  multiply_rows<S, pairs, 1, C>(rows, a, b, c, K, add);
}

// c[R * 16][C * 16] = (add ? c : 0) + a · b by AMX: K is a multiple of 16 pairs. R and C are 1 or 2.
template <class S, int R, int C>
inline void multiply_tiles_block(Matrix a, Matrix b, Matrix c, int K, bool add) {
  const auto tile = [](Matrix m, int r, int i) { return m.data + int64_t{16} * r * m.row + 16 * i; };
  const auto start = [&](auto t, int r, int i) {
    if (add)
      S::template tile_load<t>(tile(c, r, i), c.row * 4);
    else
      S::template tile_zero<t>();
  };
  using std::integral_constant;
  start(integral_constant<int, 0>(), 0, 0);
  if constexpr (C == 2) start(integral_constant<int, 1>(), 0, 1);
  if constexpr (R == 2) start(integral_constant<int, 2>(), 1, 0);
  if constexpr (R == 2 && C == 2) start(integral_constant<int, 3>(), 1, 1);
  for (int k = 0; k < K; k += 16) {
    S::template tile_load<4>(a.data + k, a.row * 4);
    S::template tile_load<6>(b.data + k * b.row, b.row * 4);
    S::template tile_dot<0, 4, 6>();
    if constexpr (C == 2) {
      S::template tile_load<7>(b.data + k * b.row + 16, b.row * 4);
      S::template tile_dot<1, 4, 7>();
    }
    if constexpr (R == 2) {
      S::template tile_load<5>(tile(a, 1, 0) + k, a.row * 4);
      S::template tile_dot<2, 5, 6>();
    }
    if constexpr (R == 2 && C == 2) S::template tile_dot<3, 5, 7>();
  }
  S::template tile_store<0>(tile(c, 0, 0), c.row * 4);
  if constexpr (C == 2) S::template tile_store<1>(tile(c, 0, 1), c.row * 4);
  if constexpr (R == 2) S::template tile_store<2>(tile(c, 1, 0), c.row * 4);
  if constexpr (R == 2 && C == 2) S::template tile_store<3>(tile(c, 1, 1), c.row * 4);
}

template <class S, int R>
inline void multiply_tiles_columns(int n, Matrix a, Matrix b, Matrix c, int K, bool add) {
  for (; n >= 32; n -= 32, b.data += 32, c.data += 32) multiply_tiles_block<S, R, 2>(a, b, c, K, add);
  if (n > 0) multiply_tiles_block<S, R, 1>(a, b, c, K, add);
}

// By tiles, for any number of rows: the last ones go through a copy when they do not fill a tile. Reads up to fifteen
// rows of a behind the last one, whose products nobody sees.
template <class S>
inline void multiply_tiles(int rows, int n, Matrix a, Matrix b, Matrix c, int K, bool add) {
  for (; rows >= 32; rows -= 32, a.data += 32 * a.row, c.data += 32 * c.row)
    multiply_tiles_columns<S, 2>(n, a, b, c, K, add);
  for (; rows >= 16; rows -= 16, a.data += 16 * a.row, c.data += 16 * c.row)
    multiply_tiles_columns<S, 1>(n, a, b, c, K, add);
  if (rows == 0) return;
  alignas(64) float some[16 * 32];
  const auto copy = [&](Matrix from, Matrix to, int width) {
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < width; i += S::W) S::store(to.data + r * to.row + i, S::load(from.data + r * from.row + i));
  };
  for (; n > 0; n -= 32, b.data += 32, c.data += 32) {
    const int width = n < 32 ? n : 32;
    if (add) copy(c, {some, 32}, width);
    multiply_tiles_columns<S, 1>(width, a, b, {some, 32}, K, add);
    copy({some, 32}, c, width);
  }
}

// c[rows][n] = (add ? c : 0) + a[rows][K] · b[K][n]; n is a multiple of W. With tiles, pairs of a and b go on with zeros
// in b (or in a, over numbers in b) up to a multiple of 16.
template <class S, bool pairs>
inline void multiply(int rows, int n, Matrix a, Matrix b, Matrix c, int K, bool add) {
  if constexpr (S::tiles && pairs) return multiply_tiles<S>(rows, n, a, b, c, padded(K, 16), add);
  // Few rows need more columns: below eight sums at a time each waits for the one before.
  for (; rows < 8 && n >= 4 * S::W; n -= 4 * S::W, b.data += 4 * S::W, c.data += 4 * S::W)
    multiply_columns<S, pairs, 4>(rows, a, b, c, K, add);
  for (; n >= 2 * S::W; n -= 2 * S::W, b.data += 2 * S::W, c.data += 2 * S::W)
    multiply_columns<S, pairs, 2>(rows, a, b, c, K, add);
  if (n > 0) multiply_columns<S, pairs, 1>(rows, a, b, c, K, add);
}

}  // namespace anabranch
