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
#include <utility>

#include "paged_attention.h"

namespace anabranch {

constexpr int kTile = 64;
constexpr int kDirectRows = 8;  // query rows of a V head up to which its rows are used where they lie
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

inline int padded(int n, int to) { return (n + to - 1) / to * to; }

// The rows of the next tile, head after head. Every step of the work on this tile asks the memory for one of them: it
// stays busy through the whole tile, not only while rows are read.
template <class S>
class Ahead {
 public:
  struct Rows {
    const char* base;
    const int64_t* offset;  // of each row, in elements
    int64_t element, bytes;
    int size;
  };

  Ahead() = default;
  Ahead(const Rows& k, int64_t k_head, int k_heads, const Rows& v, int64_t v_head, int v_heads)
      : rows_(k), v_(v), k_head_(k_head), v_head_(v_head), left_k_(k_heads), left_(k.size * (k_heads + v_heads)) {}

  void ask() {
    if (left_ == 0) return;
    --left_;
    const char* row = rows_.base + rows_.offset[at_] * rows_.element;
    for (int64_t byte = 0; byte < rows_.bytes; byte += 64) S::prefetch(row + byte);
    if (++at_ < rows_.size) return;
    at_ = 0;
    if (--left_k_ > 0)
      rows_.base += k_head_ * rows_.element;
    else if (left_k_ == 0)
      rows_ = v_;
    else
      rows_.base += v_head_ * rows_.element;
  }

 private:
  Rows rows_{}, v_{};
  int64_t k_head_ = 0, v_head_ = 0;
  int left_k_ = 0, left_ = 0, at_ = 0;
};

struct Matrix {
  float* data;
  int64_t row;  // stride
};

// c[R][C * W] = (add ? c : 0) + a[R][K] · b[K][C * W]; a and b hold floats, or pairs of bfloat16 when `pairs`.
template <class S, bool pairs, int R, int C>
[[gnu::noinline]] void multiply_block(Matrix a, Matrix b, Matrix c, int K, bool add, Ahead<S>& ahead) {
  using F = typename S::F;
  F sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < C; ++i) sum[r][i] = add ? S::load(c.data + r * c.row + i * S::W) : S::zero();
  for (int k = 0; k < K; ++k) {
    ahead.ask();
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
inline void multiply_rows(int& rows, Matrix& a, Matrix b, Matrix& c, int K, bool add, Ahead<S>& ahead) {
  for (; rows >= R; rows -= R, a.data += R * a.row, c.data += R * c.row)
    multiply_block<S, pairs, R, C>(a, b, c, K, add, ahead);
}

template <class S, bool pairs, int C>
inline void multiply_columns(int rows, Matrix a, Matrix b, Matrix c, int K, bool add, Ahead<S>& ahead) {
  // R * C sums, C columns and one factor fit the vector registers: 32 of AVX-512, 16 of the others.
  if constexpr (S::W == 16 && C <= 2) multiply_rows<S, pairs, 8, C>(rows, a, b, c, K, add, ahead);
  if constexpr (S::W == 16 || C <= 2) multiply_rows<S, pairs, 4, C>(rows, a, b, c, K, add, ahead);
  multiply_rows<S, pairs, 2, C>(rows, a, b, c, K, add, ahead);
  multiply_rows<S, pairs, 1, C>(rows, a, b, c, K, add, ahead);
}

// c[rows][n] = (add ? c : 0) + a[rows][K] · b[K][n]; n is a multiple of W. A row's sum does not depend on the others.
template <class S, bool pairs>
inline void multiply(int rows, int n, Matrix a, Matrix b, Matrix c, int K, bool add, Ahead<S>& ahead) {
  // Few rows need more columns: below eight sums at a time each waits for the one before.
  for (; rows < 8 && n >= 4 * S::W; n -= 4 * S::W, b.data += 4 * S::W, c.data += 4 * S::W)
    multiply_columns<S, pairs, 4>(rows, a, b, c, K, add, ahead);
  for (; n >= 2 * S::W; n -= 2 * S::W, b.data += 2 * S::W, c.data += 2 * S::W)
    multiply_columns<S, pairs, 2>(rows, a, b, c, K, add, ahead);
  if (n > 0) multiply_columns<S, pairs, 1>(rows, a, b, c, K, add, ahead);
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
inline void transpose_rows(const T* const (&rows)[S::W], const float (&scales)[S::W], int n, Matrix to) {
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

template <class S>
[[gnu::noinline]] typename S::F load_some_pairs(const bfloat16* p, int valid) {
  float some[S::W] = {};
  std::memcpy(some, p, valid * 2);
  return S::load(some);
}

// The same for bfloat16, two elements in a lane until they are apart: half the shuffles. to[d / 2][i] takes pairs if
// `keep_pairs`, else to[d][i] takes floats. Writes up to the next multiple of 2 * W of n.
template <class S, bool keep_pairs>
inline void transpose_pairs(const bfloat16* const (&rows)[S::W], int n, Matrix to) {
  constexpr int W = S::W;
  for (int d = 0; d < n; d += 2 * W) {
    typename S::F block[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (rows[i] == nullptr)
        block[i] = S::zero();
      else
        block[i] = n - d >= 2 * W ? S::load(reinterpret_cast<const float*>(rows[i] + d)) : load_some_pairs<S>(rows[i] + d, n - d);
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

// c[R][C * W] += a[R][n] · rows[n][C * W] times scales[n] where T is int8, straight from the cache. Unpacking rows into
// scratch memory first costs more than it saves below some ten query rows: almost every load then shares its low
// address bits with a store still in flight, and waits for it.
template <class S, class T, int R, int C>
[[gnu::noinline]] void add_rows(const T* base, const int64_t* offset, const float* scales, int n, Matrix a, Matrix c,
                                Ahead<S>& ahead) {
  typename S::F sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < C; ++i) sum[r][i] = S::load(c.data + r * c.row + i * S::W);
  for (int j = 0; j < n; ++j) {
    ahead.ask();
    const T* row = base + offset[j];
    typename S::F v[C];
#pragma GCC unroll 16
    for (int i = 0; i < C; ++i) v[i] = S::widen(row + i * S::W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float p = a.data[r * a.row + j];
      const typename S::F factor = S::set1(sizeof(T) == 1 ? p * scales[j] : p);
#pragma GCC unroll 16
      for (int i = 0; i < C; ++i) sum[r][i] = S::fma(factor, v[i], sum[r][i]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < C; ++i) S::store(c.data + r * c.row + i * S::W, sum[r][i]);
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
        v_rows_(rows_ / (call.Hv / call.groups())), v_direct_(v_rows_ <= kDirectRows && call.Dv % W == 0),
        v_pairs_(S::pairs && !v_direct_ && call.q_type == Type::bf16 && call.v_type == Type::bf16) {
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
    locate(item_.begin / kTile * kTile, *next_);
    for (int begin = item_.begin / kTile * kTile; begin < item_.end; begin += kTile) {
      advance(begin);
      const int size = now_->size;
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
    locate(item_.begin / kTile * kTile, *next_);
    for (int begin = item_.begin / kTile * kTile; begin < item_.end; begin += kTile) {
      advance(begin);
      const int size = now_->size;
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

  // Where each token of a tile lies, without a division for each.
  struct Places {
    int size = 0;
    int page[kTile], slot[kTile];
    int64_t k[kTile], v[kTile];  // offset of the token's row in head 0, in elements
  };

  void locate(int begin, Places& places) const {
    const int left = item_.end - begin, size = left < 0 ? 0 : left < kTile ? left : kTile;
    int index = begin / c_.page, slot = begin % c_.page;
    places.size = size;
    for (int j = 0; j < size; ++j) {
      const int64_t page = table_[index];
      places.page[j] = table_[index];
      places.slot[j] = slot;
      places.k[j] = page * c_.k_page + slot * c_.k_slot;
      places.v[j] = page * c_.v_page + slot * c_.v_slot;
      if (++slot == c_.page) slot = 0, ++index;
    }
  }

  void advance(int begin) {
    std::swap(now_, next_);
    locate(begin + kTile, *next_);
    const int k_heads = c_.Hk / c_.groups(), v_heads = c_.Hv / c_.groups();
    const int64_t k_element = size_of(c_.k_type), v_element = size_of(c_.v_type);
    ahead_ = {{static_cast<const char*>(c_.k) + item_.group * k_heads * c_.k_head * k_element, next_->k, k_element,
               c_.Dk * k_element, next_->size},
              c_.k_head,
              k_heads,
              {static_cast<const char*>(c_.v) + item_.group * v_heads * c_.v_head * v_element, next_->v, v_element,
               c_.Dv * v_element, next_->size},
              c_.v_head,
              v_heads};
  }

  template <class T>
  const T* k_row(int h, int j) const {
    return static_cast<const T*>(c_.k) + h * c_.k_head + now_->k[j];
  }
  template <class T>
  const T* v_row(int h, int j) const {
    return static_cast<const T*>(c_.v) + h * c_.v_head + now_->v[j];
  }
  float k_scale(int h, int j) const { return c_.k_scales[(int64_t{now_->page[j]} * c_.Hk + h) * c_.page + now_->slot[j]]; }
  float v_scale(int h, int j) const { return c_.v_scales[(int64_t{now_->page[j]} * c_.Hv + h) * c_.page + now_->slot[j]]; }

  // keys_[d][token], or keys_[d / 2][token] as pairs of bfloat16; columns past `size` up to a multiple of W are 0.
  template <class T>
  void transpose_keys(int h, int size) {
    for (int j = 0; j < size; j += W) {
      const T* rows[W];
      float scales[W];
      for (int i = 0; i < W; ++i) {
        ahead_.ask();
        rows[i] = j + i < size ? k_row<T>(h, j + i) : nullptr;
        scales[i] = sizeof(T) == 1 && j + i < size ? k_scale(h, j + i) : 1.0f;
      }
      const Matrix to{keys_ + j, kTile};
      if constexpr (!std::is_same_v<T, bfloat16>)
        transpose_rows<S>(rows, scales, c_.Dk, to);
      else if (k_pairs_)
        transpose_pairs<S, true>(rows, c_.Dk, to);
      else
        transpose_pairs<S, false>(rows, c_.Dk, to);
    }
  }

  // scores_[row][token] = q · k for the rows of tokens from `first` on.
  void score_tile(int size, int first) {
    const int width = padded(size, W), k_heads = c_.Hk / c_.groups(), shared = heads_ / k_heads;
    for (int h = 0; h < k_heads; ++h) {
      const int k_head = item_.group * k_heads + h;
      with_type(c_.k_type, [&](auto* type) {
        transpose_keys<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(k_head, size);
      });
      for_rows(h * shared, shared, first, [&](int row, int rows) {
        const Matrix q = query(row), keys{keys_, kTile}, to = scores(row);
        if constexpr (S::pairs) {
          if (k_pairs_) return multiply<S, true>(rows, width, q, keys, to, (c_.Dk + 1) / 2, false, ahead_);
        }
        multiply<S, false>(rows, width, q, keys, to, c_.Dk, false, ahead_);
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
      ahead_.ask();
      widen_row<S>(v_row<T>(h, j), c_.Dv, sizeof(T) == 1 ? v_scale(h, j) : 1.0f, values_ + int64_t{j} * Dv_);
    }
  }

  // values_[token / 2][d], each a pair of bfloat16 along the tokens.
  void pair_values(int h, int size) {
    const bfloat16 zeros[W] = {};
    for (int j = 0; j < size; j += 2) {
      ahead_.ask();
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

  template <class T>
  void add_direct(int h, int size, int row, int rows) {
    float scales[kTile];
    if constexpr (sizeof(T) == 1)
      for (int j = 0; j < size; ++j) scales[j] = v_scale(h, j);
    const T* base = static_cast<const T*>(c_.v) + h * c_.v_head;
    int d = 0;
    for (; d + 4 * W <= c_.Dv; d += 4 * W) add_columns<T, 4>(base, scales, d, size, row, rows);
    for (; d + 2 * W <= c_.Dv; d += 2 * W) add_columns<T, 2>(base, scales, d, size, row, rows);
    for (; d < c_.Dv; d += W) add_columns<T, 1>(base, scales, d, size, row, rows);
  }

  template <class T, int C>
  void add_columns(const T* base, const float* scales, int d, int size, int row, int rows) {
    for (int done = 0; done < rows;) {
      const Matrix p = scores(row + done), to{sum(row + done).data + d, Dv_};
      const int left = rows - done;
      if (left >= 4) {
        add_rows<S, T, 4, C>(base + d, now_->v, scales, size, p, to, ahead_);
        done += 4;
      } else if (left >= 2) {
        add_rows<S, T, 2, C>(base + d, now_->v, scales, size, p, to, ahead_);
        done += 2;
      } else {
        add_rows<S, T, 1, C>(base + d, now_->v, scales, size, p, to, ahead_);
        done += 1;
      }
    }
  }

  void add_values(int size, int first) {
    const int v_heads = c_.Hv / c_.groups(), shared = heads_ / v_heads;
    for (int h = 0; h < v_heads; ++h) {
      const int v_head = item_.group * v_heads + h;
      if (v_direct_) {
        with_type(c_.v_type, [&](auto* type) {
          using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
          for_rows(h * shared, shared, first, [&](int row, int rows) { add_direct<T>(v_head, size, row, rows); });
        });
        continue;
      }
      if constexpr (S::pairs) {
        if (v_pairs_) {
          pair_values(v_head, size);
          for_rows(h * shared, shared, first, [&](int row, int rows) {
            multiply<S, true>(rows, Dv_, scores(row), {values_, Dv_}, sum(row), (size + 1) / 2, true, ahead_);
          });
          continue;
        }
      }
      with_type(c_.v_type, [&](auto* type) {
        widen_values<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(v_head, size);
      });
      for_rows(h * shared, shared, first, [&](int row, int rows) {
        multiply<S, false>(rows, Dv_, scores(row), {values_, Dv_}, sum(row), size, true, ahead_);
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
  const bool k_pairs_;
  const int v_rows_;
  const bool v_direct_, v_pairs_;
  int position_;  // of the item's first token in its sequence
  float *q_, *keys_, *scores_, *values_, *sum_, *highest_, *total_;
  Places places_[2];
  Ahead<S> ahead_;
  Places *now_ = &places_[0], *next_ = &places_[1];
};

}  // namespace anabranch
