// Rows of the cache on their way into products (products.h), for any instruction set S (simd_*.h): asked for ahead,
// widened, transposed, or added up where they lie.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "products.h"

namespace anabranch {

// Asks the memory for a row of the next tile. Every row of V asks for its counterpart as it is used, and the K rows are
// asked for beside the softmax: the memory stays busy through the whole tile, and nobody has to remember what was asked
// for.
template <class S, class T>
inline void ask_for(const T* row, int elements) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int byte = 0; byte < elements * static_cast<int>(sizeof(T)); byte += 64) S::prefetch_second(bytes + byte);
}

// W elements from p, of which only `valid` exist; the others are 0.
template <class S, class T>
[[gnu::noinline]] typename S::F widen_some(const T* p, int valid) {
  T some[S::W] = {};
  std::memcpy(some, p, valid * sizeof(T));
  return S::widen(some);
}

// A row of n elements as floats, times `scale` if T is int8, padded with 0 to whole vectors.
template <class S, class T>
inline void widen_row(const T* from, int n, float scale, float* to) {
  const typename S::F factor = S::set1(scale);
  const auto put = [&](typename S::F v, int d) { S::store(to + d, sizeof(T) == 1 ? S::mul(v, factor) : v); };
  int d = 0;
  for (; d + S::W <= n; d += S::W) put(S::widen(from + d), d);
  if (d < n) put(widen_some<S>(from + d, n - d), d);
}

// to[d][i] = rows[i][d] times scales[i] for W rows of n elements; a null row stands for zeros.
template <class S, class T>
inline void transpose_rows(const T* const (&rows)[S::W], const float* scales, int n, Matrix to) {
  constexpr int W = S::W;
  for (int d = 0; d < n; d += W) {
    const int depth = n - d < W ? n - d : W;
    typename S::F block[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (rows[i] == nullptr)
        block[i] = S::zero();
      else
        block[i] = depth == W ? S::widen(rows[i] + d) : widen_some<S>(rows[i] + d, depth);
      if constexpr (sizeof(T) == 1) block[i] = S::mul(block[i], S::set1(scales[i]));
    }
    S::transpose(block);
    for (int i = 0; i < depth; ++i) S::store(to.data + int64_t{d + i} * to.row, block[i]);
  }
}

// 2 * W elements as pairs of bfloat16, which hold every int8.
template <class S, class T>
inline typename S::F load_pairs(const T* p) {
  if constexpr (sizeof(T) == 1)
    return S::widen_to_pairs(p);
  else
    return S::load(reinterpret_cast<const float*>(p));
}

template <class S, class T>
[[gnu::noinline]] typename S::F load_some_pairs(const T* p, int valid) {
  T some[2 * S::W] = {};
  std::memcpy(some, p, valid * sizeof(T));
  return load_pairs<S>(some);
}

// The same for bfloat16, two elements in a lane until they are apart: half the shuffles. to[d / 2][i] takes pairs if
// `keep_pairs`, else to[d][i] takes floats. Writes up to the next multiple of 2 * W of n.
template <class S, bool keep_pairs, class T>
inline void transpose_pairs(const T* const (&rows)[S::W], int n, Matrix to) {
  constexpr int W = S::W;
  for (int d = 0; d < n; d += 2 * W) {
    typename S::F block[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (rows[i] == nullptr)
        block[i] = S::zero();
      else
        block[i] = n - d >= 2 * W ? load_pairs<S>(rows[i] + d) : load_some_pairs<S>(rows[i] + d, n - d);
    }
    S::transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if constexpr (keep_pairs) {
        S::store(to.data + int64_t{d / 2 + i} * to.row, block[i]);
      } else {
        S::store(to.data + int64_t{d + 2 * i} * to.row, S::first_of_pairs(block[i]));
        S::store(to.data + int64_t{d + 2 * i + 1} * to.row, S::second_of_pairs(block[i]));
      }
    }
  }
}

// 2 * W elements as floats; those of bfloat16 with even and odd ones apart, which needs no shuffle.
template <class S, class T>
inline void widen_two(const T* p, typename S::F& a, typename S::F& b) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const typename S::F pairs = S::load(reinterpret_cast<const float*>(p));
    a = S::first_of_pairs(pairs), b = S::second_of_pairs(pairs);
  } else {
    a = S::widen(p), b = S::widen(p + S::W);
  }
}

// Rows of one head of the cache.
template <class T>
struct Rows {
  const T* base;
  const int64_t* offset;  // of each row, in elements
  const T* operator[](int j) const { return base + offset[j]; }
};

// c[R][C * 2 * W] += a[R][n] · rows[n][C * 2 * W] times scales[n] where T is int8, straight from the cache. Unpacking rows
// into scratch memory first costs more than it saves below some ten query rows: almost every load then shares its low
// address bits with a store still in flight, and waits for it. Products of bfloat16 pairs would not pay here: Intel's
// vdpbf16ps takes four times as long as an fma for twice the work.
template <class S, class T, int R, int C>
[[gnu::noinline]] void add_rows(Rows<T> rows, Rows<T> ahead, const float* scales, int n, Matrix a, Matrix c) {
  using F = typename S::F;
  constexpr int W = S::W;
  constexpr bool apart = std::is_same_v<T, bfloat16>;
  F sum[R][2 * C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < 2 * C; i += 2) {
      sum[r][i] = S::load(c.data + r * c.row + i * W), sum[r][i + 1] = S::load(c.data + r * c.row + (i + 1) * W);
      if (apart) S::separate(sum[r][i], sum[r][i + 1]);
    }
  for (int j = 0; j < n; ++j) {
    ask_for<S>(ahead[j], C * 2 * W);
    const T* row = rows[j];
    F v[2 * C];
#pragma GCC unroll 16
    for (int i = 0; i < 2 * C; i += 2) widen_two<S>(row + i * W, v[i], v[i + 1]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float p = a.data[r * a.row + j];
      const F factor = S::set1(sizeof(T) == 1 ? p * scales[j] : p);
#pragma GCC unroll 16
      for (int i = 0; i < 2 * C; ++i) sum[r][i] = S::fma(factor, v[i], sum[r][i]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < 2 * C; i += 2) {
      if (apart) S::interleave(sum[r][i], sum[r][i + 1]);
      S::store(c.data + r * c.row + i * W, sum[r][i]), S::store(c.data + r * c.row + (i + 1) * W, sum[r][i + 1]);
    }
}

}  // namespace anabranch
