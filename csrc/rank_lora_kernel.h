// Dot products with rows that a token has picked, and sums of such rows, for any instruction set S (simd_*.h).
//
// Rows are read where they lie. Four stream beside each other, and those that several tokens share meet them in
// registers. Sums go column block by column block, so that a block of all ranks stays in the first cache while the tokens
// of a task pass.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "rank_lora.h"

namespace anabranch {

template <class S>
class RankLoraKernel {
  using F = typename S::F;
  static constexpr int W = S::W;
  static constexpr int kRows = 4, kTokens = W == 16 ? 4 : 2;  // of a block of sums in registers
  static constexpr int kVectors = W == 16 ? 8 : 4;            // of a sum of rows

 public:
  // A row as floats, with zeros up to a whole vector.
  static void widen_row(const RowTable& table, int64_t index, float* to) {
    with_row_type(table, [&](auto* data) {
      const auto* row = data + index * table.row;
      int k = 0;
      for (; k + W <= table.width; k += W) S::store(to + k, S::widen(row + k));
      if (k < table.width) S::store(to + k, tail(row + k, table.width - k));
    });
  }

  // to[m * to_row + j] = <x_m, row index[j]>, m < tokens; rows first + j if index is null.
  static void dots(const RowTable& table, const int32_t* index, int first, int count, const float* x, int64_t x_row,
                   int tokens, float* to, int64_t to_row) {
    with_row_type(table, [&](auto* data) {
      for (int j = 0; j < count; j += kRows) {
        decltype(data) rows[kRows];
        for (int r = 0; r < kRows; ++r) {
          const int place = std::min(j + r, count - 1);
          rows[r] = data + (index == nullptr ? first + place : index[place]) * table.row;
        }
        const int wanted = std::min(kRows, count - j);
        int m = 0;
        for (; m + kTokens <= tokens; m += kTokens)
          block<kTokens>(rows, table.width, x + m * x_row, x_row, to + m * to_row + j, to_row, wanted);
        for (; m < tokens; ++m) block<1>(rows, table.width, x + m * x_row, x_row, to + m * to_row + j, to_row, wanted);
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

  template <int M, class T>
  static void block(const T* const (&rows)[kRows], int width, const float* x, int64_t x_row, float* to, int64_t to_row,
                    int wanted) {
    F sum[M][kRows];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[m][r] = S::zero();
    const auto step = [&](const F (&row)[kRows], int k) {
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const F there = S::load(x + m * x_row + k);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sum[m][r] = S::fma(row[r], there, sum[m][r]);
      }
    };
    int k = 0;
    for (; k + W <= width; k += W) {
      const F row[kRows] = {S::widen(rows[0] + k), S::widen(rows[1] + k), S::widen(rows[2] + k), S::widen(rows[3] + k)};
      step(row, k);
    }
    if (k < width) {
      const int left = width - k;
      const F row[kRows] = {tail(rows[0] + k, left), tail(rows[1] + k, left), tail(rows[2] + k, left),
                            tail(rows[3] + k, left)};
      step(row, k);
    }
    for (int m = 0; m < M; ++m) {
      float four[4];
      S::sums(sum[m][0], sum[m][1], sum[m][2], sum[m][3], four);
      std::memcpy(to + m * to_row, four, wanted * sizeof(float));
    }
  }
};

}  // namespace anabranch
