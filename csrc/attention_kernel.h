// One work item of paged attention, for any instruction set S (simd_*.h).
//
// The cache is walked in tiles of 64 tokens. Of each tile every K head of the group is read once and laid down
// transposed, so that its scores with all query rows are one small matrix product; likewise every V head. Rows are
// ordered head by head, token by token within a head: then the rows of a K head are contiguous, and those of a V head
// too, whatever the two head counts are. The softmax is online, in base 2.
//
// Where S multiplies pairs of bfloat16 (vdpbf16ps) and q and the cache are bfloat16, tiles stay in pairs.
#pragma once

#include <cmath>
#include <type_traits>

#include "paged_attention.h"

namespace anabranch {

constexpr int kTile = 64;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

inline int padded(int n, int to) { return (n + to - 1) / to * to; }

struct Matrix {
  float* data;
  int64_t row;  // stride
};

// c[R][C * W] = (add ? c : 0) + a[R][K] · b[K][C * W]; a and b hold floats, or pairs of bfloat16 when `pairs`.
template <class S, bool pairs, int R, int C>
inline void multiply_block(Matrix a, Matrix b, Matrix c, int K, bool add) {
  using F = typename S::F;
  F sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < C; ++i) sum[r][i] = add ? S::load(c.data + r * c.row + i * S::W) : S::zero();
  for (int k = 0; k < K; ++k) {
    F column[C];
    for (int i = 0; i < C; ++i) column[i] = S::load(b.data + k * b.row + i * S::W);
    for (int r = 0; r < R; ++r) {
      const F factor = S::set1(a.data[r * a.row + k]);
      for (int i = 0; i < C; ++i) {
        if constexpr (pairs)
          sum[r][i] = S::dot2(factor, column[i], sum[r][i]);
        else
          sum[r][i] = S::fma(factor, column[i], sum[r][i]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < C; ++i) S::store(c.data + r * c.row + i * S::W, sum[r][i]);
}

template <class S, bool pairs, int R, int C>
inline void multiply_rows(int& rows, Matrix& a, Matrix b, Matrix& c, int K, bool add) {
  for (; rows >= R; rows -= R, a.data += R * a.row, c.data += R * c.row) multiply_block<S, pairs, R, C>(a, b, c, K, add);
}

template <class S, bool pairs, int C>
inline void multiply_columns(int rows, Matrix a, Matrix b, Matrix c, int K, bool add) {
  // R * C sums, C columns and one factor fit the vector registers: 32 of AVX-512, 16 of the others.
  if constexpr (S::W == 16) multiply_rows<S, pairs, 8, C>(rows, a, b, c, K, add);
  multiply_rows<S, pairs, 4, C>(rows, a, b, c, K, add);
  multiply_rows<S, pairs, 2, C>(rows, a, b, c, K, add);
  multiply_rows<S, pairs, 1, C>(rows, a, b, c, K, add);
}

// c[rows][n] = (add ? c : 0) + a[rows][K] · b[K][n]; n is a multiple of W. A row's sum does not depend on the others.
template <class S, bool pairs>
inline void multiply(int rows, int n, Matrix a, Matrix b, Matrix c, int K, bool add) {
  for (; n >= 2 * S::W; n -= 2 * S::W, b.data += 2 * S::W, c.data += 2 * S::W)
    multiply_columns<S, pairs, 2>(rows, a, b, c, K, add);
  if (n > 0) multiply_columns<S, pairs, 1>(rows, a, b, c, K, add);
}

// W elements from p, of which only `valid` exist; the others are 0.
template <class S, class T>
inline typename S::F widen_some(const T* p, int valid) {
  if (valid >= S::W) return S::widen(p);
  T some[S::W] = {};
  for (int i = 0; i < valid; ++i) some[i] = p[i];
  return S::widen(some);
}

template <class S>
class AttentionKernel {
  using F = typename S::F;
  static constexpr int W = S::W;

 public:
  AttentionKernel(const AttentionCall& call, const AttentionItem& item, float* scratch)
      : c_(call), item_(item), heads_(call.Hq / call.groups()), rows_(heads_ * item.tokens),
        Dk_(padded(call.Dk, 2 * W)), Dv_(padded(call.Dv, W)), table_(call.page_table + item.sequence * call.table_row),
        k_pairs_(S::pairs && call.q_type == Type::bf16 && call.k_type == Type::bf16),
        v_pairs_(S::pairs && call.q_type == Type::bf16 && call.v_type == Type::bf16) {
    const int new_tokens = call.cu_seqlens_q[item.sequence + 1] - call.cu_seqlens_q[item.sequence];
    position_ = call.seq_lens[item.sequence] - new_tokens + item.first_token;
    q_ = scratch;
    keys_ = q_ + int64_t{rows_} * Dk_;
    scores_ = keys_ + int64_t{Dk_} * kTile;
    values_ = scores_ + int64_t{rows_} * kTile;
    sum_ = values_ + int64_t{kTile} * Dv_;
    highest_ = sum_ + int64_t{rows_} * Dv_;
    total_ = highest_ + rows_;
  }

  static int64_t scratch_floats(const AttentionCall& call, int tokens) {
    const int64_t rows = int64_t{call.Hq / call.groups()} * tokens, Dk = padded(call.Dk, 2 * W), Dv = padded(call.Dv, W);
    return rows * (Dk + kTile + Dv + 2) + (Dk + Dv) * kTile;
  }

  void attend() {
    load_queries();
    for (int64_t i = 0; i < int64_t{rows_} * Dv_; ++i) sum_[i] = 0.0f;
    for (int row = 0; row < rows_; ++row) highest_[row] = -INFINITY, total_[row] = 0.0f;
    for (int begin = item_.begin / kTile * kTile; begin < item_.end; begin += kTile) {
      const int size = item_.end - begin < kTile ? item_.end - begin : kTile;
      locate(begin, size);
      const int first = begin > position_ ? begin - position_ : 0;  // earlier tokens see nothing of this tile
      score_tile(size, first);
      soften_tile(begin, size, first);
      add_values(size, first);
    }
    if (item_.partial != nullptr)
      write_partial();
    else
      write_result();
  }

  // Scores of every row in base 2, scaled, -inf where hidden, to scores[row][j]; for the selective path.
  void score(float* scores, int64_t stride) {
    load_queries();
    for (int begin = item_.begin / kTile * kTile; begin < item_.end; begin += kTile) {
      const int size = item_.end - begin < kTile ? item_.end - begin : kTile;
      locate(begin, size);
      score_tile(size, 0);
      for (int row = 0; row < rows_; ++row) {
        int low, high;
        visible(row % item_.tokens, begin, size, &low, &high);
        for (int j = 0; j < size; ++j)
          scores[row * stride + begin + j] =
              j < low || j >= high ? -INFINITY : scores_[int64_t{row} * kTile + j] * (c_.scale * kLog2e);
      }
    }
  }

 private:
  int head(int row) const { return item_.group * heads_ + row / item_.tokens; }
  Matrix query(int row) const { return {q_ + int64_t{row} * Dk_, Dk_}; }
  Matrix scores(int row) const { return {scores_ + int64_t{row} * kTile, kTile}; }
  Matrix sum(int row) const { return {sum_ + int64_t{row} * Dv_, Dv_}; }
  int64_t token(int row) const { return c_.cu_seqlens_q[item_.sequence] + item_.first_token + row % item_.tokens; }

  void load_queries() {
    with_type(c_.q_type, [&](auto* type) {
      for (int row = 0; row < rows_; ++row) {
        const auto* from = static_cast<decltype(type)>(c_.q) + token(row) * c_.q_token + head(row) * c_.q_head;
        float* to = q_ + int64_t{row} * Dk_;
        if (k_pairs_) {  // the pairs are already what memory holds
          for (int d = c_.Dk / 2; d < Dk_ / 2; ++d) to[d] = 0.0f;
          std::memcpy(to, from, c_.Dk * 2);
        } else {
          for (int d = 0; d < c_.Dk; ++d) to[d] = to_float(from[d]);
        }
      }
    });
  }

  // Where each token of the tile lies: page and slot, without a division for each.
  void locate(int begin, int size) {
    int index = begin / c_.page, slot = begin % c_.page;
    for (int j = 0; j < size; ++j) {
      page_[j] = table_[index];
      slot_[j] = slot;
      if (++slot == c_.page) slot = 0, ++index;
    }
  }

  template <class T>
  const T* k_row(int h, int j) const {
    return static_cast<const T*>(c_.k) + page_[j] * c_.k_page + h * c_.k_head + slot_[j] * c_.k_slot;
  }
  template <class T>
  const T* v_row(int h, int j) const {
    return static_cast<const T*>(c_.v) + page_[j] * c_.v_page + h * c_.v_head + slot_[j] * c_.v_slot;
  }
  float k_scale(int h, int j) const { return c_.k_scales[(int64_t{page_[j]} * c_.Hk + h) * c_.page + slot_[j]]; }
  float v_scale(int h, int j) const { return c_.v_scales[(int64_t{page_[j]} * c_.Hv + h) * c_.page + slot_[j]]; }

  // keys_[d][token]; columns past `size` up to a multiple of W are 0.
  template <class T>
  void transpose_keys(int h, int size) {
    for (int j = 0; j < size; j += W)
      for (int d = 0; d < c_.Dk; d += W) {
        F block[W];
        for (int i = 0; i < W; ++i) {
          if (j + i >= size) {
            block[i] = S::zero();
            continue;
          }
          block[i] = widen_some<S>(k_row<T>(h, j + i) + d, c_.Dk - d);
          if constexpr (sizeof(T) == 1) block[i] = S::mul(block[i], S::set1(k_scale(h, j + i)));
        }
        S::transpose(block);
        const int depth = c_.Dk - d < W ? c_.Dk - d : W;
        for (int i = 0; i < depth; ++i) S::store(keys_ + int64_t{d + i} * kTile + j, block[i]);
      }
  }

  // keys_[d / 2][token], each a pair of bfloat16.
  void transpose_key_pairs(int h, int size) {
    for (int j = 0; j < size; j += W)
      for (int d = 0; d < c_.Dk; d += 2 * W) {
        F block[W];
        for (int i = 0; i < W; ++i) {
          float pairs[W] = {};
          if (j + i < size) {
            const bfloat16* row = k_row<bfloat16>(h, j + i) + d;
            if (c_.Dk - d >= 2 * W) {
              block[i] = S::load(reinterpret_cast<const float*>(row));
              continue;
            }
            std::memcpy(pairs, row, (c_.Dk - d) * 2);
          }
          block[i] = S::load(pairs);
        }
        S::transpose(block);
        for (int i = 0; i < W; ++i) S::store(keys_ + int64_t{d / 2 + i} * kTile + j, block[i]);
      }
  }

  // scores_[row][token] = q · k for the rows of tokens from `first` on.
  void score_tile(int size, int first) {
    const int width = padded(size, W), k_heads = c_.Hk / c_.groups(), shared = heads_ / k_heads;
    for (int h = 0; h < k_heads; ++h) {
      const int k_head = item_.group * k_heads + h;
      if constexpr (S::pairs) {
        if (k_pairs_) {
          transpose_key_pairs(k_head, size);
          for_rows(h * shared, shared, first, [&](int row, int rows) {
            multiply<S, true>(rows, width, query(row), {keys_, kTile}, scores(row), (c_.Dk + 1) / 2, false);
          });
          continue;
        }
      }
      with_type(c_.k_type, [&](auto* type) {
        transpose_keys<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(k_head, size);
      });
      for_rows(h * shared, shared, first, [&](int row, int rows) {
        multiply<S, false>(rows, width, query(row), {keys_, kTile}, scores(row), c_.Dk, false);
      });
    }
  }

  // Runs body(row, rows) over the rows of `heads` heads, leaving out their first `first` tokens.
  template <class Body>
  void for_rows(int head, int heads, int first, Body&& body) {
    if (first == 0) return body(head * item_.tokens, heads * item_.tokens);
    if (first >= item_.tokens) return;
    for (int h = head; h < head + heads; ++h) body(h * item_.tokens + first, item_.tokens - first);
  }

  // Which tokens [low, high) of the tile the row of new token `a` sees.
  void visible(int a, int begin, int size, int* low, int* high) const {
    const int64_t position = position_ + a;
    const int64_t oldest = c_.window ? position - c_.window + 1 : 0;
    const int64_t from = (oldest > item_.begin ? oldest : item_.begin) - begin, to = position + 1 - begin;
    *low = static_cast<int>(from < 0 ? 0 : from);
    *high = static_cast<int>(to < size ? to : size);
  }

  // Scores become probabilities relative to the row's highest score so far; sums so far are rescaled to it.
  void soften_tile(int begin, int size, int first) {
    const int width = padded(size, W);
    const F factor = S::set1(c_.scale * kLog2e);
    for_rows(0, heads_, first, [&](int row0, int rows) {
      for (int row = row0; row < row0 + rows; ++row) {
        float* s = scores_ + int64_t{row} * kTile;
        int low, high;
        visible(row % item_.tokens, begin, size, &low, &high);
        if (low >= high) {
          for (int j = 0; j < width; ++j) s[j] = 0.0f;
          continue;
        }
        F top = S::set1(-INFINITY);
        for (int j = 0; j < width; j += W) S::store(s + j, S::mul(S::load(s + j), factor));
        for (int j = 0; j < low; ++j) s[j] = -INFINITY;
        for (int j = high; j < width; ++j) s[j] = -INFINITY;
        for (int j = 0; j < width; j += W) top = S::max(top, S::load(s + j));
        const float before = highest_[row], tile = S::highest(top), now = before > tile ? before : tile;
        const F shift = S::set1(-now);
        F total = S::zero();
        for (int j = 0; j < width; j += W) {
          const F p = S::exp2(S::add(S::load(s + j), shift));
          total = S::add(total, p);
          S::store(s + j, p);
        }
        if (now != before) {
          const float fade = before == -INFINITY ? 0.0f : exp2f(before - now);
          float* sum = sum_ + int64_t{row} * Dv_;
          for (int d = 0; d < Dv_; d += W) S::store(sum + d, S::mul(S::load(sum + d), S::set1(fade)));
          total_[row] *= fade;
          highest_[row] = now;
        }
        total_[row] += S::sum(total);
        if constexpr (S::pairs) {
          if (v_pairs_)
            for (int j = 0; j < kTile; j += 2 * W) {
              const F low_half = j < width ? S::load(s + j) : S::zero();
              const F high_half = j + W < width ? S::load(s + j + W) : S::zero();
              S::store(s + j / 2, S::round_to_pairs(low_half, high_half));
            }
        }
      }
    });
  }

  // values_[token][d] as floats.
  template <class T>
  void widen_values(int h, int size) {
    for (int j = 0; j < size; ++j) {
      const T* row = v_row<T>(h, j);
      F scale = S::zero();
      if constexpr (sizeof(T) == 1) scale = S::set1(v_scale(h, j));
      for (int d = 0; d < c_.Dv; d += W) {
        F v = widen_some<S>(row + d, c_.Dv - d);
        if constexpr (sizeof(T) == 1) v = S::mul(v, scale);
        S::store(values_ + int64_t{j} * Dv_ + d, v);
      }
    }
  }

  // values_[token / 2][d], each a pair of bfloat16 along the tokens.
  void pair_values(int h, int size) {
    const bfloat16 zeros[W] = {};
    for (int j = 0; j < size; j += 2) {
      const bfloat16* first = v_row<bfloat16>(h, j);
      const bfloat16* second = j + 1 < size ? v_row<bfloat16>(h, j + 1) : nullptr;
      for (int d = 0; d < c_.Dv; d += W) {
        bfloat16 some[2][W] = {};
        const bfloat16 *a = first + d, *b = second ? second + d : zeros;
        if (c_.Dv - d < W) {
          std::memcpy(some[0], a, (c_.Dv - d) * 2);
          if (second) std::memcpy(some[1], b, (c_.Dv - d) * 2);
          a = some[0], b = some[1];
        }
        S::store(values_ + int64_t{j / 2} * Dv_ + d, S::interleave(a, b));
      }
    }
  }

  void add_values(int size, int first) {
    const int v_heads = c_.Hv / c_.groups(), shared = heads_ / v_heads;
    for (int h = 0; h < v_heads; ++h) {
      const int v_head = item_.group * v_heads + h;
      if constexpr (S::pairs) {
        if (v_pairs_) {
          pair_values(v_head, size);
          for_rows(h * shared, shared, first, [&](int row, int rows) {
            multiply<S, true>(rows, Dv_, scores(row), {values_, Dv_}, sum(row), (size + 1) / 2, true);
          });
          continue;
        }
      }
      with_type(c_.v_type, [&](auto* type) {
        widen_values<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(v_head, size);
      });
      for_rows(h * shared, shared, first, [&](int row, int rows) {
        multiply<S, false>(rows, Dv_, scores(row), {values_, Dv_}, sum(row), size, true);
      });
    }
  }

  void write_partial() {
    for (int row = 0; row < rows_; ++row) {
      float* to = item_.partial + int64_t{row} * (c_.Dv + 2);
      to[0] = highest_[row];
      to[1] = total_[row];
      std::memcpy(to + 2, sum_ + int64_t{row} * Dv_, c_.Dv * 4);
    }
  }

  void write_result() {
    with_type(c_.q_type, [&](auto* type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      if constexpr (sizeof(T) != 1) {
        for (int row = 0; row < rows_; ++row) {
          const int64_t at = token(row) * c_.Hq + head(row);
          const float inverse = total_[row] == 0.0f ? 0.0f : 1.0f / total_[row];
          T* to = static_cast<T*>(c_.out) + at * c_.Dv;
          for (int d = 0; d < c_.Dv; ++d) from_float(sum_[int64_t{row} * Dv_ + d] * inverse, to + d);
          c_.lse[at] = (highest_[row] + std::log2(total_[row])) * kLn2;
        }
      }
    });
  }

  const AttentionCall& c_;
  const AttentionItem& item_;
  const int heads_, rows_, Dk_, Dv_;
  const int32_t* table_;
  const bool k_pairs_, v_pairs_;
  int position_;  // of the item's first token in its sequence
  float *q_, *keys_, *scores_, *values_, *sum_, *highest_, *total_;
  int page_[kTile], slot_[kTile];
};

}  // namespace anabranch
