// Dot products with rows that a token has picked, and sums of such rows, for any instruction set S (simd_*.h).
//
// Rows are read where they lie. Four stream beside each other, and those that several tokens share meet them in
// registers. Dot products go column block by column block, so that a block of the tokens stays in the first cache while
// the rows pass, and the rows in the second while more tokens do; where S multiplies pairs of bfloat16, those are used
// as they lie, by tiles where there are any. Sums go so too, with a block of all ranks in the first cache while the
// tokens of a task pass.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "products.h"
#include "rank_lora.h"

namespace anabranch {

template <class S>
class RankLoraKernel {
  using F = typename S::F;
  static constexpr int W = S::W;
  static constexpr int kRows = 4, kTokens = W == 16 ? 4 : 2;  // of a block of sums in registers
  static constexpr int kVectors = W == 16 ? 8 : 4;            // of a sum of rows
  static constexpr int kBlock = 512;                          // floats of a token, or pairs, that are summed at once
  static constexpr int kPass = 16;                            // tokens, most
  static constexpr int kTileRows = 64;                        // of a table that meet tiles of tokens at once
  static constexpr int kNear = kPass * kBlock;                // floats of tokens in the first cache

 public:
  // to[m * to_row + j] = <x row token[m], row index[m * index_row + j]>, m < tokens; rows first + j if index is null.
  static void dots(const RowTable& table, const int32_t* index, int64_t index_row, int first, int count,
                   const RowTable& x, const int* token, int tokens, float* to, int64_t to_row) {
    with_row_type(table, [&](auto* data) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
      constexpr bool pairs = S::pairs && std::is_same<T, bfloat16>::value;
      constexpr int step = pairs ? 2 * W : W, each = kBlock * step / W;  // elements of a vector, of a block
      if constexpr (S::tiles && pairs) {
        if (index == nullptr && count % 16 == 0 && table.row % 2 == 0 && table.width % 32 == 0) {
          for (int j = 0; j < count; j += kTileRows)
            dots_by_tiles(data + (first + j) * table.row, table, std::min(kTileRows, count - j), x, token, tokens,
                          to + j, to_row);
          return;
        }
      }
      alignas(64) float near[kNear];
      const int64_t x_row = int64_t{kNear} / std::min(kPass, tokens) / kBlock * kBlock;
      const int depth = static_cast<int>(x_row) * step / W;
      for (int k = 0; k < table.width; k += depth) {
        const int width = std::min(depth, table.width - k);
        for (int from = 0; from < tokens; from += kPass) {
          const int M = std::min(kPass, tokens - from);
          for (int m = 0; m < M; ++m)
            bring<pairs>(static_cast<const T*>(x.data) + token[from + m] * x.row + k, width, near + m * x_row);
          // Tokens [begin, end) of the pass times the rows of one list.
          const auto multiply = [&](const int32_t* list, int begin, int end) {
            for (int j = 0; j < count; j += kRows) {
              const T* rows[kRows];
              for (int r = 0; r < kRows; ++r) {
                const int place = std::min(j + r, count - 1);
                rows[r] = data + (list == nullptr ? first + place : list[place]) * table.row + k;
              }
              // Sums of one block each, whatever passes at a time: a token's result does not depend on the others.
              for (int at = 0; at < width; at += each) {
                const Part part{std::min(each, width - at), std::min(kRows, count - j), k + at > 0};
                const float* there = near + at / step * W;
                float* sums = to + from * to_row + j;
                int m = begin;
                for (; m + kTokens <= end; m += kTokens)
                  block<kTokens, pairs>(rows, there + m * x_row, x_row, sums + m * to_row, to_row, part);
                for (; m < end; ++m)
                  block<1, pairs>(rows, there + m * x_row, x_row, sums + m * to_row, to_row, part);
                for (int r = 0; r < kRows; ++r) rows[r] += each;
              }
            }
          };
          if (index_row == 0) multiply(index, 0, M);
          for (int m = 0; m < M && index_row != 0; ++m) multiply(index + (from + m) * index_row, m, m + 1);
        }
      }
    });
  }

  // y[begin..end) = (add ? y : 0) + sum of factors[j] * row index[j] there; rows first + j if index is null.
  template <class Y>
  static void sums(const RowTable& table, const int32_t* index, int first, const float* factors, int count, int begin,
                   int end, Y* y, bool add) {
    with_row_type(table, [&](auto* data) {
      const auto row_of = [&](int j) { return data + (index == nullptr ? first + j : index[j]) * table.row; };
      int at = begin;
      for (; at + kVectors * W <= end; at += kVectors * W) {
        F sum[kVectors];
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) sum[i] = add ? S::widen(y + at + i * W) : S::zero();
        for (int j = 0; j < count; ++j) {
          const auto* row = row_of(j) + at;
          const F factor = S::set1(factors[j]);
#pragma GCC unroll 8
          for (int i = 0; i < kVectors; ++i) sum[i] = S::fma(factor, S::widen(row + i * W), sum[i]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) S::narrow(sum[i], y + at + i * W);
      }
      for (; at < end; at += W) {
        const int left = std::min(W, end - at);
        F sum = add ? tail(y + at, left) : S::zero();
        for (int j = 0; j < count; ++j) {
          const auto* row = row_of(j) + at;
          sum = S::fma(S::set1(factors[j]), left == W ? S::widen(row) : tail(row, left), sum);
        }
        Y some[W];
        S::narrow(sum, some);
        std::memcpy(y + at, some, left * sizeof(Y));
      }
    });
  }

  // Picks blocks by their scores [rows], rising, and their gates. `scores` are logits and are overwritten.
  static void route(float* scores, const float* bias, const AdapterPlace& place, int32_t* picked, float* gates) {
    constexpr float smallest = 0x1p-20f;  // of a biased score: gates are positive whatever the bias
    const Gate gate = static_cast<Gate>(place.gate);
    if (gate != Gate::softmax_topk)
      for (int g = 0; g < place.rows; ++g) scores[g] = 1.0f / (1.0f + std::exp(-scores[g]));
    // `gates` keeps the best so far in falling order; few of the later scores come in.
    for (int g = 0, kept = 0; g < place.rows; ++g) {
      const float score = scores[g] + bias[g];
      if (kept == place.chosen && !(score > gates[kept - 1])) continue;
      int c = kept < place.chosen ? kept++ : kept - 1;
      for (; c > 0 && score > gates[c - 1]; --c) gates[c] = gates[c - 1], picked[c] = picked[c - 1];
      gates[c] = score, picked[c] = g;
    }
    std::sort(picked, picked + place.chosen);
    float highest = -INFINITY, sum = 0.0f;
    for (int c = 0; c < place.chosen; ++c) {
      const int g = picked[c];
      gates[c] = gate == Gate::sigmoid_renorm_unbiased ? scores[g] : scores[g] + bias[g];
      highest = std::max(highest, gates[c]);
    }
    for (int c = 0; c < place.chosen; ++c) {
      if (gate == Gate::softmax_topk) gates[c] = std::exp(gates[c] - highest);
      if (gate == Gate::sigmoid_renorm) gates[c] = std::max(gates[c], smallest);
      sum += gates[c];
    }
    for (int c = 0; c < place.chosen; ++c) gates[c] /= sum;
  }

 private:
  template <class Body>
  static void with_row_type(const RowTable& table, Body&& body) {
    with_type(table.type, [&](auto* type) {
      if constexpr (sizeof(*type) > 1) body(static_cast<decltype(type)>(table.data));
    });
  }

  template <class T>
  static F tail(const T* from, int count) {
    T some[W] = {};
    std::memcpy(some, from, count * sizeof(T));
    return S::widen(some);
  }

  // The same by tiles, sixteen tokens at a time, for rows that fill them; a tile's tokens do not know of each other.
  static void dots_by_tiles(const bfloat16* rows, const RowTable& table, int count, const RowTable& x, const int* token,
                            int tokens, float* to, int64_t to_row) {
    const typename S::Tiles tiles;
    alignas(64) float across[kBlock * 16], result[kTileRows * 16];  // pairs of tokens [pair][token]; [row][token]
    const int width = table.width / 2;
    const Matrix a{const_cast<float*>(reinterpret_cast<const float*>(rows)), table.row / 2};
    for (int from = 0; from < tokens; from += 16) {
      const int M = std::min(16, tokens - from);
      for (int k = 0; k < width; k += kBlock) {
        const int part = std::min(kBlock, width - k);
        for (int i = 0; i < part; i += 16) {
          F column[16];
#pragma GCC unroll 16
          for (int m = 0; m < 16; ++m) {
            const auto* row = static_cast<const bfloat16*>(x.data) + token[from + std::min(m, M - 1)] * x.row;
            column[m] = m < M ? S::load(reinterpret_cast<const float*>(row) + k + i) : S::zero();
          }
          S::transpose(column);
#pragma GCC unroll 16
          for (int m = 0; m < 16; ++m) S::store(across + (i + m) * 16, column[m]);
        }
        multiply_tiles<S>(count, 16, {a.data + k, a.row}, {across, 16}, {result, 16}, part, k > 0);
      }
      for (int m = 0; m < M; ++m)
        for (int j = 0; j < count; ++j) to[(from + m) * to_row + j] = result[j * 16 + m];
    }
  }

  // A piece of a token as floats, or as pairs, with zeros up to a whole vector.
  template <bool pairs, class T>
  static void bring(const T* from, int width, float* to) {
    constexpr int step = pairs ? 2 * W : W;
    if constexpr (pairs) {
      std::memcpy(to, from, width * sizeof(T));
      if (const int rest = width % step; rest > 0)
        std::memset(reinterpret_cast<T*>(to) + width, 0, (step - rest) * sizeof(T));
    } else {
      int k = 0;
      for (; k + W <= width; k += W) S::store(to + k, S::widen(from + k));
      if (k < width) S::store(to + k, tail(from + k, width - k));
    }
  }

  template <bool pairs, class T>
  static F vector(const T* from) {
    if constexpr (pairs)
      return S::load(reinterpret_cast<const float*>(from));
    else
      return S::widen(from);
  }

  struct Part {
    int width, wanted;  // elements; rows whose results are wanted
    bool more;          // adds to what is there
  };

  template <int M, bool pairs, class T>
  static void block(const T* const (&rows)[kRows], const float* x, int64_t x_row, float* to, int64_t to_row,
                    Part part) {
    constexpr int step = pairs ? 2 * W : W;
    F sum[M][kRows];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[m][r] = S::zero();
    const auto add = [&](const F (&row)[kRows], const float* there) {
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const F factor = S::load(there + m * x_row);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          if constexpr (pairs)
            sum[m][r] = S::dot2(row[r], factor, sum[m][r]);
          else
            sum[m][r] = S::fma(row[r], factor, sum[m][r]);
        }
      }
    };
    int k = 0;
    for (; k + step <= part.width; k += step) {
      const F row[kRows] = {vector<pairs>(rows[0] + k), vector<pairs>(rows[1] + k), vector<pairs>(rows[2] + k),
                            vector<pairs>(rows[3] + k)};
      add(row, x + k / step * W);
    }
    if (k < part.width) {
      F row[kRows];
      for (int r = 0; r < kRows; ++r) {
        T some[step] = {};
        std::memcpy(some, rows[r] + k, (part.width - k) * sizeof(T));
        row[r] = vector<pairs>(some);
      }
      add(row, x + k / step * W);
    }
    for (int m = 0; m < M; ++m) {
      float four[4];
      S::sums(sum[m][0], sum[m][1], sum[m][2], sum[m][3], four);
      float* result = to + m * to_row;
      for (int r = 0; r < part.wanted; ++r) result[r] = part.more ? result[r] + four[r] : four[r];
    }
  }
};

}  // namespace anabranch
