// One work item of paged attention, for any instruction set S (simd_*.h).
//
// The cache is walked in tiles of 64 tokens. Of each tile every K head of the group is read once and laid down
// transposed, so that its scores with all query rows are one small matrix product; likewise every V head. Rows are
// ordered head by head, token by token within a head: then the rows of a K head are contiguous, and those of a V head
// too, whatever the two head counts are. The softmax is online, in base 2.
//
// Where S multiplies pairs of bfloat16 (vdpbf16ps, or AMX), q is bfloat16 and the cache bfloat16 or int8, tiles stay in
// pairs. Few query rows take shorter ways: K as it lies by AMX, V as it lies by fma.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "cache_rows.h"
#include "paged_attention.h"
#include "products.h"

namespace anabranch {

constexpr int kTile = 64;
constexpr int kDirectRows = 8;  // query rows of a V head up to which its rows are used where they lie
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Attention of one item: some new tokens of one sequence, some groups of heads, a stretch of the cache. Its rows are the
// query rows of all its groups, group after group; scores exist for one group at a time.
template <class S>
class AttentionKernel {
  using F = typename S::F;
  static constexpr int W = S::W, kVectors = kTile / W;

 public:
  AttentionKernel(const AttentionCall& call, const AttentionItem& item, float* scratch)
      : c_(call), item_(item), heads_(call.Hq / call.groups()), k_heads_(call.Hk / call.groups()),
        v_heads_(call.Hv / call.groups()), group_rows_(heads_ * item.tokens), key_share_((k_heads_ * kTile + group_rows_ - 1) / group_rows_), rows_(group_rows_ * item.groups),
        Dk_(padded(call.Dk, 2 * W)), Dv_(padded(call.Dv, 2 * W)),
        k_pairs_(in_pairs(call.q_type, call.k_type)),
        k_direct_(S::tiles && k_pairs_ && group_rows_ / k_heads_ <= 16),
        v_direct_(group_rows_ / v_heads_ <= kDirectRows && call.Dv % (2 * W) == 0),
        v_pairs_(!v_direct_ && in_pairs(call.q_type, call.v_type)) {
    position_ = call.seq_lens[item.sequence] - new_tokens(item) + item.first_token;
    q_ = scratch;
    keys_ = q_ + (k_direct_ ? int64_t{item.groups} * k_heads_ * packed_query() : int64_t{rows_} * Dk_);
    scores_ = keys_ + int64_t{Dk_} * kTile;
    values_ = scores_ + int64_t{group_rows_} * kTile;
    sum_ = values_ + int64_t{kTile} * Dv_;
    total_ = sum_ + int64_t{rows_} * Dv_;
    highest_ = total_ + int64_t{rows_} * W;
  }

  static int64_t scratch_floats(const AttentionCall& call, int groups, int tokens) {
    const int64_t rows = int64_t{call.Hq / call.groups()} * tokens, Dk = padded(call.Dk, 2 * W), Dv = padded(call.Dv, 2 * W);
    const int64_t q = std::max(rows * groups * Dk, int64_t{groups} * (call.Hk / call.groups()) * 8 * Dk);
    // Tiles read sixteen rows of q or of scores at a time, whatever the last ones hold.
    return q + rows * groups * (Dv + W + 1) + rows * kTile + (Dk + Dv) * kTile + 16 * std::max<int64_t>(Dk, kTile);
  }

  // `after` is what this thread will do next, or null: its first tile is asked for while the last one of this is used.
  void attend(const AttentionItem* after) {
    if constexpr (S::tiles) {
      const typename S::Tiles tiles;
      attend_all(after);
    } else {
      attend_all(after);
    }
  }

  // Scores of every row in base 2, scaled, -inf where hidden, to scores[row][j]; for the selective path, one group.
  void score(float* scores, int64_t stride) {
    if constexpr (S::tiles) {
      const typename S::Tiles tiles;
      score_all(scores, stride);
    } else {
      score_all(scores, stride);
    }
  }

 private:
  // Whether products with a cache of this type are made of pairs of bfloat16.
  static bool in_pairs(Type q, Type cache) {
    return S::pairs && q == Type::bf16 && (cache == Type::bf16 || cache == Type::i8);
  }

  int new_tokens(const AttentionItem& item) const {
    return c_.cu_seqlens_q[item.sequence + 1] - c_.cu_seqlens_q[item.sequence];
  }

  void attend_all(const AttentionItem* after) {
    load_queries();
    for (int64_t i = 0; i < int64_t{rows_} * Dv_; ++i) sum_[i] = 0.0f;
    std::fill_n(highest_, rows_, -INFINITY);
    std::fill_n(total_, int64_t{rows_} * W, 0.0f);
    const int start = item_.begin / kTile * kTile;
    locate(item_, start, *next_);
    for (int begin = start; begin < item_.end; begin += kTile) {
      std::swap(now_, next_);
      if (begin + kTile < item_.end)
        locate(item_, begin + kTile, *next_);
      else if (after != nullptr)
        locate(*after, after->begin / kTile * kTile, *next_);
      else
        *next_ = *now_;
      const int first = begin > position_ ? begin - position_ : 0;  // earlier tokens see nothing of this tile
      for (int group = 0; group < item_.groups; ++group) {
        score_tile(group, first);
        soften_tile(group, begin, first);
        add_values(group, first);
      }
    }
    if (item_.partial != nullptr)
      write_partial();
    else
      write_result();
  }

  void score_all(float* scores, int64_t stride) {
    load_queries();
    for (int begin = item_.begin / kTile * kTile; begin < item_.end; begin += kTile) {
      locate(item_, begin, *now_);
      score_tile(0, 0);
      for (int row = 0; row < rows_; ++row) {
        const auto [low, high] = visible(row % item_.tokens, begin);
        for (int j = 0; j < now_->size; ++j)
          scores[row * stride + begin + j] =
              j < low || j >= high ? -INFINITY : scores_[int64_t{row} * kTile + j] * (c_.scale * kLog2e);
      }
    }
  }

  int head(int row) const { return item_.first_group * heads_ + row / item_.tokens; }
  Matrix query(int row) const { return {q_ + int64_t{row} * Dk_, Dk_}; }
  Matrix scores(int group_row) const { return {scores_ + int64_t{group_row} * kTile, kTile}; }
  float* total_of(int row) const { return total_ + int64_t{row} * W; }  // W parts of it
  Matrix sum(int row) const { return {sum_ + int64_t{row} * Dv_, Dv_}; }
  int64_t token(int row) const { return c_.cu_seqlens_q[item_.sequence] + item_.first_token + row % item_.tokens; }

  // Floats of a K head's query rows when they are laid out for score_directly: [pair][16 rows].
  int64_t packed_query() const { return int64_t{Dk_} * 8; }

  void pack_queries() {
    const int rows = group_rows_ / k_heads_;
    std::fill_n(q_, item_.groups * k_heads_ * packed_query(), 0.0f);
    for (int row = 0; row < rows_; ++row) {
      const auto* from = static_cast<const bfloat16*>(c_.q) + token(row) * c_.q_token + head(row) * c_.q_head;
      float* to = q_ + row / rows * packed_query() + row % rows;
      for (int d = 0; d < c_.Dk; d += 2) std::memcpy(to + d * 8, from + d, d + 1 < c_.Dk ? 4 : 2);
    }
  }

  void load_queries() {
    if (k_direct_) return pack_queries();
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

  // Where each token of a tile lies, without a division for each. Behind the last one, the last one is repeated.
  struct Places {
    int size = 0;
    int page[kTile], slot[kTile];
    int64_t k[kTile], v[kTile];  // offset of the token's row in head 0, in elements
    bool straight[kTile / 16];   // whether sixteen K rows follow each other
  };

  void locate(const AttentionItem& item, int begin, Places& places) const {
    const int left = item.end - begin;
    const int32_t* table = c_.page_table + item.sequence * c_.table_row;
    int index = begin / c_.page, slot = begin % c_.page;
    places.size = left < 0 ? 0 : left < kTile ? left : kTile;
    for (int j = 0; j < places.size; ++j) {
      const int64_t page = table[index];
      places.page[j] = table[index];
      places.slot[j] = slot;
      places.k[j] = page * c_.k_page + slot * c_.k_slot;
      places.v[j] = page * c_.v_page + slot * c_.v_slot;
      if (++slot == c_.page) slot = 0, ++index;
    }
    if (places.size == 0) return;
    for (int j = places.size; j < kTile; ++j) places.k[j] = places.k[j - 1], places.v[j] = places.v[j - 1];
    for (int j = 0; j < kTile; j += 16) {
      bool& straight = places.straight[j / 16] = true;
      for (int i = j + 1; i < j + 16; ++i) straight &= places.k[i] - places.k[i - 1] == c_.k_slot;
    }
  }

  template <class T>
  const T* k_row(int h, int j, const Places& places) const {
    return static_cast<const T*>(c_.k) + h * c_.k_head + places.k[j];
  }
  template <class T>
  const T* v_head(int h) const {
    return static_cast<const T*>(c_.v) + h * c_.v_head;
  }
  template <class T>
  const T* v_row(int h, int j, const Places& places) const {
    return v_head<T>(h) + places.v[j];
  }

  // The scales of a head's rows of this tile, run by run of slots in one page; 0 behind the last one.
  void gather_scales(const float* all, int heads, int h, float* to) const {
    int j = 0;
    while (j < now_->size) {
      const int left = now_->size - j, room = c_.page - now_->slot[j], run = left < room ? left : room;
      std::memcpy(to + j, all + (int64_t{now_->page[j]} * heads + h) * c_.page + now_->slot[j], run * 4);
      j += run;
    }
    for (; j < kTile; ++j) to[j] = 0.0f;
  }

  // keys_[d][token], or keys_[d / 2][token] as pairs of bfloat16 (int8 unscaled); columns past the tile's size up to a
  // multiple of W are 0.
  template <class T>
  void transpose_keys(int h, const float* scales) {
    for (int j = 0; j < now_->size; j += W) {
      const T* rows[W];
      for (int i = 0; i < W; ++i) {
        rows[i] = j + i < now_->size ? k_row<T>(h, j + i, *now_) : nullptr;
      }
      const Matrix to{keys_ + j, kTile};
      if constexpr (S::pairs && (std::is_same_v<T, bfloat16> || sizeof(T) == 1)) {
        if (k_pairs_) {
          transpose_pairs<S, true>(rows, c_.Dk, to);
          continue;
        }
      }
      if constexpr (std::is_same_v<T, bfloat16>)
        transpose_pairs<S, false>(rows, c_.Dk, to);
      else
        transpose_rows<S>(rows, scales + j, c_.Dk, to);
    }
  }

  // scores_[row][token] = q · k for the group's rows of tokens from `first` on.
  void score_tile(int group, int first) {
    const int width = padded(now_->size, W), shared = heads_ / k_heads_;
    const bool scaled = c_.k_type == Type::i8;
    float scales[kTile];
    for (int h = 0; h < k_heads_; ++h) {
      const int k_head = (item_.first_group + group) * k_heads_ + h;
      if (scaled) gather_scales(c_.k_scales, c_.Hk, k_head, scales);
      with_type(c_.k_type, [&](auto* type) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
        if (k_direct_)
          score_directly<T>(group, h, scales);
        else
          transpose_keys<T>(k_head, scales);
      });
      if (k_direct_) continue;
      for_rows(h * shared, shared, first, [&](int row, int rows) {
        const Matrix q = query(group * group_rows_ + row), keys{keys_, kTile}, to = scores(row);
        if constexpr (S::pairs) {
          if (k_pairs_) {
            multiply<S, true>(rows, width, q, keys, to, (c_.Dk + 1) / 2, false);
            if (scaled) scale_columns(to, rows, scales);
            return;
          }
        }
        multiply<S, false>(rows, width, q, keys, to, c_.Dk, false);
      });
    }
  }

  // The same by tiles for at most sixteen query rows of a K head. K rows are used where they lie, so that not they have
  // to be transposed, only their scores.
  template <class T>
  void score_directly(int group, int h, const float* scales) {
    if constexpr (S::tiles && (std::is_same_v<T, bfloat16> || sizeof(T) == 1)) {
      const int k_head = (item_.first_group + group) * k_heads_ + h, rows = group_rows_ / k_heads_;
      const float* q = q_ + int64_t{group * k_heads_ + h} * packed_query();
      std::pair<const char*, int64_t> keys[4];  // address and bytes of a row
      for (int b = 0; b < 4; ++b) keys[b] = lay_keys<T>(k_head, b);
      S::template tile_zero<0>(), S::template tile_zero<1>(), S::template tile_zero<2>(), S::template tile_zero<3>();
      for (int step = 0; step < Dk_ / 32; ++step) {
        S::template tile_load<6>(q + step * 256, 64);
        S::template tile_load<4>(keys[0].first + step * 64, keys[0].second), S::template tile_dot<0, 4, 6>();
        S::template tile_load<5>(keys[1].first + step * 64, keys[1].second), S::template tile_dot<1, 5, 6>();
        S::template tile_load<4>(keys[2].first + step * 64, keys[2].second), S::template tile_dot<2, 4, 6>();
        S::template tile_load<5>(keys[3].first + step * 64, keys[3].second), S::template tile_dot<3, 5, 6>();
      }
      alignas(64) float products[4][16][16];  // [block][token][query row]
      S::template tile_store<0>(products[0], 64), S::template tile_store<1>(products[1], 64);
      S::template tile_store<2>(products[2], 64), S::template tile_store<3>(products[3], 64);
      for (int b = 0; b < 4; ++b) {
        F block[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) block[i] = S::load(products[b][i]);
        S::transpose(block);
        for (int r = 0; r < rows; ++r) {
          const F score = sizeof(T) == 1 ? S::mul(block[r], S::load(scales + b * 16)) : block[r];
          S::store(scores(h * rows + r).data + b * 16, score);
        }
      }
    }
  }

  // Sixteen K rows of a tile for tiles to load. Rows that do not follow each other, or have to be widened or padded, are
  // laid into keys_.
  template <class T>
  std::pair<const char*, int64_t> lay_keys(int k_head, int block) {
    const int j = block * 16;
    if (std::is_same_v<T, bfloat16> && now_->straight[block] && c_.Dk == Dk_)
      return {reinterpret_cast<const char*>(k_row<T>(k_head, j, *now_)), c_.k_slot * 2};
    float* to = keys_ + int64_t{j} * Dk_ / 2;
    for (int i = 0; i < 16; ++i)
      for (int d = 0; d < c_.Dk; d += 2 * W) {
        const T* from = k_row<T>(k_head, j + i, *now_) + d;
        S::store(to + (int64_t{i} * Dk_ + d) / 2, c_.Dk - d < 2 * W ? load_some_pairs<S>(from, c_.Dk - d) : load_pairs<S>(from));
      }
    return {reinterpret_cast<const char*>(to), int64_t{Dk_} * 2};
  }

  static void scale_columns(Matrix m, int rows, const float* scales) {
    for (int row = 0; row < rows; ++row)
      for (int j = 0; j < kTile; j += W) {
        float* at = m.data + row * m.row + j;
        S::store(at, S::mul(S::load(at), S::load(scales + j)));
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
  std::pair<int, int> visible(int a, int begin) const {
    const int64_t position = position_ + a;
    const int64_t oldest = c_.window ? position - c_.window + 1 : 0;
    const int64_t from = (oldest > item_.begin ? oldest : item_.begin) - begin, to = position + 1 - begin;
    return {static_cast<int>(from < 0 ? 0 : from), static_cast<int>(to < now_->size ? to : now_->size)};
  }

  // Scores become probabilities relative to the row's highest score so far; sums so far are rescaled to it.
  void soften_tile(int group, int begin, int first) {
    const int shared = heads_ / v_heads_;
    const bool scaled = v_pairs_ && c_.v_type == Type::i8;  // a pair holds the int8 itself: its scale goes to the weight
    float scales[kTile];
    for (int h = 0; h < v_heads_; ++h) {
      const int v_head = (item_.first_group + group) * v_heads_ + h;
      if (scaled) gather_scales(c_.v_scales, c_.Hv, v_head, scales);
      for_rows(h * shared, shared, first, [&](int row, int rows) {
        for (int r = row; r < row + rows; ++r) {
          ask_for_keys(group, r);
          soften_row(group * group_rows_ + r, scores(r).data, begin, scaled ? scales : nullptr);
        }
      });
    }
  }

  // Asks for the K rows of the next tile while the scores of this one are softened, which needs no memory: a share of
  // them beside each of the group's rows.
  void ask_for_keys(int group, int row) const {
    const int end = std::min((row + 1) * key_share_, k_heads_ * kTile);
    with_type(c_.k_type, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      for (int i = row * key_share_; i < end; ++i)
        ask_for<S>(k_row<T>((item_.first_group + group) * k_heads_ + i / kTile, i % kTile, *next_), c_.Dk);
    });
  }

  void soften_row(int row, float* s, int begin, const float* scales) {
    const auto [low, high] = visible(row % item_.tokens, begin);
    if (low >= high) {
      for (int j = 0; j < kTile; ++j) s[j] = 0.0f;
      return;
    }
    float factor = c_.scale * kLog2e;
    if (low > 0 || high < kTile) {
      for (int j = 0; j < kTile; ++j) s[j] = j < low || j >= high ? -INFINITY : s[j] * factor;
      factor = 1.0f;
    }
    F p[kVectors], top = S::set1(-INFINITY), total = S::zero();
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      p[i] = S::mul(S::load(s + i * W), S::set1(factor));
      top = S::max(top, p[i]);
    }
    const float before = highest_[row], tile = S::highest(top), now = before > tile ? before : tile;
    const F shift = S::set1(-now);
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      p[i] = S::exp2(S::add(p[i], shift));
      total = S::add(total, p[i]);
    }
    store_probabilities(p, s, scales);
    if (now != before) {
      const float fade = before == -INFINITY ? 0.0f : exp2f(before - now);
      float* sum = sum_ + int64_t{row} * Dv_;
      for (int d = 0; d < Dv_; d += W) S::store(sum + d, S::mul(S::load(sum + d), S::set1(fade)));
      total = S::fma(S::load(total_of(row)), S::set1(fade), total);
      highest_[row] = now;
    } else {
      total = S::add(S::load(total_of(row)), total);
    }
    S::store(total_of(row), total);
  }

  void store_probabilities(F (&p)[kVectors], float* s, const float* scales) {
    if constexpr (S::pairs) {
      if (v_pairs_) {
        if (scales != nullptr)
#pragma GCC unroll 16
          for (int i = 0; i < kVectors; ++i) p[i] = S::mul(p[i], S::load(scales + i * W));
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; i += 2) S::store(s + i / 2 * W, S::round_to_pairs(p[i], p[i + 1]));
        return;
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) S::store(s + i * W, p[i]);
  }

  // values_[token][d] as floats.
  template <class T>
  void widen_values(int h, const float* scales) {
    for (int j = 0; j < now_->size; ++j) {
      ask_for<S>(v_row<T>(h, j, *next_), c_.Dv);
      widen_row<S>(v_row<T>(h, j, *now_), c_.Dv, sizeof(T) == 1 ? scales[j] : 1.0f, values_ + int64_t{j} * Dv_);
    }
  }

  // values_[token / 2][d], each a pair of bfloat16 along the tokens; zeros behind the last token.
  template <class T>
  void pair_values(int h) {
    const auto pairs_of = [&](int j, int d) {
      if (j >= now_->size) return S::zero();
      const T* from = v_row<T>(h, j, *now_) + d;
      return c_.Dv - d < 2 * W ? load_some_pairs<S>(from, c_.Dv - d) : load_pairs<S>(from);
    };
    for (int j = 0; j < padded(now_->size, 2 * W); j += 2) {
      ask_for<S>(v_row<T>(h, j, *next_), c_.Dv);
      ask_for<S>(v_row<T>(h, j + 1, *next_), c_.Dv);
      for (int d = 0; d < c_.Dv; d += 2 * W) {
        F low, high;
        S::pair_rows(pairs_of(j, d), pairs_of(j + 1, d), low, high);
        S::store(values_ + int64_t{j / 2} * Dv_ + d, low);
        S::store(values_ + int64_t{j / 2} * Dv_ + d + W, high);
      }
    }
  }

  void add_values(int group, int first) {
    const int shared = heads_ / v_heads_;
    for (int h = 0; h < v_heads_; ++h)
      with_type(c_.v_type, [&](auto* type) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
        const int v_head = (item_.first_group + group) * v_heads_ + h;
        if constexpr (S::pairs && (std::is_same_v<T, bfloat16> || sizeof(T) == 1))
          if (v_pairs_) return add_head_in_pairs<T>(group, v_head, h * shared, shared, first);
        add_head<T>(group, v_head, h * shared, shared, first);
      });
  }

  template <class T>
  void add_head(int group, int v_head, int q_head, int q_heads, int first) {
    float scales[kTile];
    if constexpr (sizeof(T) == 1) gather_scales(c_.v_scales, c_.Hv, v_head, scales);
    if (!v_direct_) widen_values<T>(v_head, scales);
    for_rows(q_head, q_heads, first, [&](int row, int rows) {
      const Matrix p = scores(row), to = sum(group * group_rows_ + row);
      if (v_direct_)
        add_direct<T>(v_head, scales, rows, p, to);
      else
        multiply<S, false>(rows, Dv_, p, {values_, Dv_}, to, now_->size, true);
    });
  }

  template <class T>
  void add_head_in_pairs(int group, int v_head, int q_head, int q_heads, int first) {
    pair_values<T>(v_head);
    for_rows(q_head, q_heads, first, [&](int row, int rows) {
      multiply<S, true>(rows, Dv_, scores(row), {values_, Dv_}, sum(group * group_rows_ + row), (now_->size + 1) / 2, true);
    });
  }

  template <class T>
  void add_direct(int h, const float* scales, int rows, Matrix p, Matrix to) {
    for (int d = 0; d < c_.Dv;) {
      const Rows<T> v{v_head<T>(h) + d, now_->v}, next{v_head<T>(h) + d, next_->v};
      const Matrix columns{to.data + d, to.row};
      if (d + 4 * W <= c_.Dv) {
        add_columns<T, 2>(v, next, scales, rows, p, columns);
        d += 4 * W;
      } else {
        add_columns<T, 1>(v, next, scales, rows, p, columns);
        d += 2 * W;
      }
    }
  }

  template <class T, int C>
  void add_columns(Rows<T> v, Rows<T> ahead, const float* scales, int rows, Matrix p, Matrix to) {
    const auto add = [&](auto R) {
      for (; rows >= R; rows -= R, p.data += R * p.row, to.data += R * to.row)
        add_rows<S, T, R, C>(v, ahead, scales, now_->size, p, to);
    };
    if constexpr (W == 16) add(std::integral_constant<int, 4>());  // sums for the registers of AVX-512
    add(std::integral_constant<int, 2>());
    add(std::integral_constant<int, 1>());
  }

  void write_partial() {
    for (int row = 0; row < rows_; ++row) {
      float* to = item_.partial + int64_t{row} * (c_.Dv + 2);
      to[0] = highest_[row];
      to[1] = S::sum(S::load(total_of(row)));
      std::memcpy(to + 2, sum_ + int64_t{row} * Dv_, c_.Dv * 4);
    }
  }

  void write_result() {
    with_type(c_.q_type, [&](auto* type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      if constexpr (sizeof(T) != 1) {
        for (int row = 0; row < rows_; ++row) {
          const int64_t at = token(row) * c_.Hq + head(row);
          const float total = S::sum(S::load(total_of(row)));
          scale_row(sum(row).data, total == 0.0f ? 0.0f : 1.0f / total, static_cast<T*>(c_.out) + at * c_.Dv);
          c_.lse[at] = (highest_[row] + std::log2(total)) * kLn2;
        }
      }
    });
  }

  template <class T>
  void scale_row(const float* from, float factor, T* to) const {
    int d = 0;
    if constexpr (S::pairs && std::is_same_v<T, bfloat16>)
      for (; d + 2 * W <= c_.Dv; d += 2 * W) {
        const F low = S::mul(S::load(from + d), S::set1(factor)), high = S::mul(S::load(from + d + W), S::set1(factor));
        S::store(reinterpret_cast<float*>(to + d), S::round_to_pairs(low, high));
      }
    for (; d < c_.Dv; ++d) from_float(from[d] * factor, to + d);
  }

  const AttentionCall& c_;
  const AttentionItem& item_;
  const int heads_, k_heads_, v_heads_;  // of one group
  const int group_rows_, key_share_, rows_, Dk_, Dv_;
  const bool k_pairs_, k_direct_, v_direct_, v_pairs_;
  int position_;  // of the item's first token in its sequence
  float *q_, *keys_, *scores_, *values_, *sum_, *total_, *highest_;
  Places places_[2];
  Places *now_ = &places_[0], *next_ = &places_[1];
};

}  // namespace anabranch
