// The Gram matrix of many centred rows in tiles (simd_amx.h): float32 by products of bfloat16, exact but for last bits.
//
// Layout   A difference is cut into three bfloat16, high + middle + low, which add up to it. Sixteen rows by 32 columns
//          of each are a tile; high and middle are transposed as well, for products have rows on one side and columns
//          on the other. What is cut stays in the first cache (up to 32 rows; in the second one for more) and meets in
//          tiles while the next columns are cut: the two use different parts of the CPU.
// Numerics <x, y> = hx hy + mx my + (mx + lx) hy + hx (my + ly), and at most 2^-25 of the product, of either sign, that is
//          left out. The last two terms are one seen from either side, so six tiles do for two blocks of rows. Sums are
//          float32 over 512 columns, then float64. Squares of bfloat16 end in few patterns of bits, so float32 sums of
//          them are rounded down a little more often than up: entries on the diagonal are 2^-26 too small. A row whose
//          squares would leave float32's range is scaled by a power of two.
// Bound    cutting: twenty vector instructions for 32 elements and twenty to transpose them, whatever N.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "gram_kernel.h"

namespace anabranch {

template <class S>
class GramTiles {
  using F = typename S::F;
  static constexpr int W = S::W;
  static constexpr int kSide = 16, kInputs = 32;  // rows and columns of a tile
  static constexpr int kTileBytes = 1024, kSquare = kSide * kSide;
  static constexpr int kColumns = 512;  // whose products are added up in float32
  static constexpr int kAhead = 256;    // columns between those being cut and those asked for
  enum Part { high, middle, low, high_turned, middle_turned, kParts };

  // What the eight tiles are used for, one after the other: pairs of blocks of rows, I and J and the ones after them.
  enum Kind { one, two, one_beside_two, two_by_two, two_by_two_back };
  struct Phase {
    Kind kind;
    int I, J;
  };

 public:
  static bool fits(const GramCall& call) { return call.N >= kSide; }  // fewer are quicker without

  explicit GramTiles(const GramCall& call)
      : c_(call), blocks_((call.N + kSide - 1) / kSide), tile_(call.N <= 2 * kSide ? kInputs : 4 * kInputs) {
    for (int I = 0; I < blocks_; I += 2) {
      phases_.push_back({I + 1 < blocks_ ? two : one, I, I});
      for (int J = I + 2; J < blocks_; J += 2)
        if (J + 1 < blocks_) {
          phases_.push_back({two_by_two, I, J});
          phases_.push_back({two_by_two_back, I, J});
        } else {
          phases_.push_back({one_beside_two, I, J});
        }
    }
    for (const Phase& phase : phases_) pieces_ += kPieces[phase.kind];
  }

  int64_t scratch_floats() const {
    return 2 * cut_bytes() / 4 + 3 * products_floats() + int64_t{c_.N} * kColumns + 2 * c_.N;
  }

  void add(int b, int64_t begin, int64_t end, float* scratch, double* sums) const {
    const typename S::Tiles tiles;
    char* cut = reinterpret_cast<char*>(scratch);
    float* products = scratch + 2 * cut_bytes() / 4;
    double* totals = reinterpret_cast<double*>(products + products_floats());
    double* factors = totals + products_floats();
    float* scaled = reinterpret_cast<float*>(factors + c_.N);
    std::fill(scratch, products, 0.0f);  // what stands for rows that are not there stays so
    std::fill(totals, factors, 0.0);
    with_type(c_.type, [&](auto* type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      if constexpr (sizeof(T) > 1) {
        const T* points = static_cast<const T*>(c_.points) + b * c_.batch;
        const T* zero = c_.centre == nullptr ? nullptr : static_cast<const T*>(c_.centre) + b * c_.centre_batch;
        for (int64_t at = begin; at < end; at += kColumns) {
          const int count = static_cast<int>(std::min<int64_t>(kColumns, end - at));
          const T* centre = zero == nullptr ? zero : zero + at;
          multiply(points + at, c_.row, centre, count, cut, products);
          if (in_range(points + at, centre, count, products)) {
            S::add_to(products, products_floats(), totals);
            continue;
          }
          for (int i = 0; i < c_.N; ++i)
            factors[i] = scale(points + i * c_.row + at, centre, count, scaled + int64_t{i} * kColumns);
          multiply(scaled, kColumns, static_cast<const float*>(nullptr), count, cut, products);
          add_scaled(products, factors, totals);
        }
      }
    });
    for (int i = 0; i < c_.N; ++i)
      for (int j = i; j < c_.N; ++j) sums[int64_t{i} * c_.N + j] += entry(totals, i, j);
  }

 private:
  int64_t cut_bytes() const { return int64_t{tile_ / kInputs} * blocks_ * kParts * kTileBytes; }
  int64_t products_floats() const { return int64_t{blocks_} * (blocks_ + 1) * kSquare; }

  // Of blocks I and J, that of (m + l) h where I > J and all others where I < J; where they are equal `own` is the former.
  int64_t square(int I, int J) const { return (int64_t{I} * blocks_ + J) * kSquare; }
  int64_t own(int I) const { return (int64_t{blocks_} * blocks_ + I) * kSquare; }

  template <class X>
  X entry(const X* products, int i, int j) const {
    const int I = i / kSide, J = j / kSide, r = i % kSide, c = j % kSide;
    const X* back = products + (I == J ? own(I) : square(J, I));
    const X sum = products[square(I, J) + r * kSide + c] + back[c * kSide + r];
    return I == J ? sum + back[r * kSide + c] : sum;
  }

  // ---- rows that float32 cannot square

  template <class T>
  bool in_range(const T* points, const T* centre, int count, const float* products) const {
    for (int i = 0; i < c_.N; ++i) {
      const int64_t diagonal = i % kSide * (kSide + 1);
      const float sum = products[square(i / kSide, i / kSide) + diagonal] + 2 * products[own(i / kSide) + diagonal];
      if (sum >= RowPiece<S>::kSmallest && sum <= RowPiece<S>::kLargest) continue;
      // The centre is often one of the rows: nothing is wrong with its zeros.
      if (sum != 0.0f || centre == nullptr || std::memcmp(points + i * c_.row, centre, count * sizeof(T)) != 0)
        return false;
    }
    return true;
  }

  template <class T>
  [[gnu::noinline]] static double scale(const T* row, const T* centre, int count, float* to) {
    float minus[kColumns];
    RowPiece<S>::negate_centre(centre, count, minus);
    std::fill(to, to + kColumns, 0.0f);
    return RowPiece<S>::copy(row, count, minus, to);
  }

  [[gnu::noinline]] void add_scaled(const float* products, const double* factors, double* totals) const {
    const auto add = [&](int64_t at, int I, int J) {
      for (int r = 0; r < std::min(kSide, c_.N - I * kSide); ++r)
        for (int c = 0; c < std::min(kSide, c_.N - J * kSide); ++c)
          totals[at + r * kSide + c] += products[at + r * kSide + c] * (factors[I * kSide + r] * factors[J * kSide + c]);
    };
    for (int I = 0; I < blocks_; ++I) {
      add(own(I), I, I);
      for (int J = 0; J < blocks_; ++J) add(square(I, J), I, J);
    }
  }

  // ---- one group of columns: cut a tile of them while the one before is multiplied

  struct Cursor {
    const char* cut = nullptr;
    int steps = 0;      // of 32 columns
    bool add = false;   // to the products so far
    size_t phase = 0;
    int step = 0, piece = 0;  // of the phase
  };

  // Up to two blocks: all sums stay in tiles, and of what is cut only this step's and the last one's is kept.
  template <Kind kind, class T>
  [[gnu::noinline]] void multiply_few(const T* points, int64_t stride, const T* centre, int count, char* cut,
                                      float* products) const {
    constexpr int B = kind == one ? 1 : 2;
    const int rows = c_.N - (B - 1) * kSide;  // of the last block
    const char* before = nullptr;
    clear();
    for (int k = 0; k < count; k += kInputs) {
      char* to = before == cut ? cut + B * kParts * kTileBytes : cut;
      const int left = std::min(kInputs, count - k);
      const F minus[2] = {minus_centre(centre, k, left), minus_centre(centre, k + W, left - W)};
      const auto cut_it = [&](int block, auto&& meanwhile) __attribute__((always_inline)) {
        cut_block(points + int64_t{block} * kSide * stride + k, stride, block == B - 1 ? rows : kSide, left, minus,
                  to + block * kParts * kTileBytes, meanwhile);
      };
      if (before == nullptr) {
        for (int block = 0; block < B; ++block) cut_it(block, [](auto) {});
      } else {
        cut_it(0, [&](auto piece) { take<kind, piece>(before, before); });
        if constexpr (B == 2) cut_it(1, [&](auto piece) { take<kind, piece + 4>(before, before); });
      }
      before = to;
    }
    take<kind, 0>(before, before), take<kind, 1>(before, before);
    take<kind, 2>(before, before), take<kind, 3>(before, before);
    take<kind, 4>(before, before), take<kind, 5>(before, before);
    take<kind, 6>(before, before), take<kind, 7>(before, before);
    put<kind>({kind, 0, 0}, products);
  }

  template <class T>
  [[gnu::noinline]] void multiply(const T* points, int64_t stride, const T* centre, int count, char* cut,
                                  float* products) const {
    if (blocks_ == 1) return multiply_few<one>(points, stride, centre, count, cut, products);
    if (blocks_ == 2) return multiply_few<two>(points, stride, centre, count, cut, products);
    Cursor before;
    before.phase = phases_.size();
    for (int at = 0; at < count; at += tile_) {
      char* to = cut + (at / tile_ % 2) * cut_bytes();
      const int steps = (std::min(tile_, count - at) + kInputs - 1) / kInputs;
      const int each = (before.steps * pieces_ + steps * blocks_ * 4 - 1) / (steps * blocks_ * 4);
      for (int step = 0; step < steps; ++step) {
        const int k = at + step * kInputs, left = std::min(kInputs, count - k);
        const F minus[2] = {minus_centre(centre, k, left), minus_centre(centre, k + W, left - W)};
        for (int block = 0; block < blocks_; ++block)
          cut_block(points + int64_t{block} * kSide * stride + k, stride, std::min(kSide, c_.N - block * kSide), left,
                    minus, to + (step * blocks_ + block) * kParts * kTileBytes, [&](auto) {
                      for (int i = 0; i < each; ++i) advance(before, products);
                    });
      }
      while (before.phase < phases_.size()) advance(before, products);
      before = {to, steps, at > 0};
    }
    while (before.phase < phases_.size()) advance(before, products);
  }

  template <class T>
  static F minus_centre(const T* centre, int k, int left) {
    if (centre == nullptr || left <= 0) return S::zero();
    if (left >= W) return S::mul(S::finite_or_zero(S::widen(centre + k)), S::set1(-1.0f));
    T some[W] = {};
    std::memcpy(some, centre + k, left * sizeof(T));
    return S::mul(S::finite_or_zero(S::widen(some)), S::set1(-1.0f));
  }

  // Calls meanwhile() four times.
  template <class T, class Meanwhile>
  [[gnu::always_inline]] static inline void cut_block(const T* points, int64_t stride, int rows, int left, const F (&minus)[2], char* to,
                        Meanwhile&& meanwhile) {
    T some[kSide * kInputs];
    if (left < kInputs) {
      std::fill(some, some + kSide * kInputs, T{});
      for (int r = 0; r < rows; ++r) std::memcpy(some + r * kInputs, points + r * stride, left * sizeof(T));
      points = some;
      stride = kInputs;
    }
    const auto cut = [&](int first) __attribute__((always_inline)) {
      const int end = first + kSide / 4 < rows ? first + kSide / 4 : rows;
      for (int r = first; r < end; ++r, points += stride) {
        S::prefetch_second(reinterpret_cast<const char*>(points + kAhead));
        if constexpr (sizeof(T) == 4) S::prefetch_second(reinterpret_cast<const char*>(points + kAhead + W));
        F parts[3];
        S::cut(S::add(S::widen(points), minus[0]), S::add(S::widen(points + W), minus[1]), parts);
#pragma GCC unroll 3
        for (int part = 0; part < 3; ++part)
          S::store(reinterpret_cast<float*>(to + part * kTileBytes + r * 64), parts[part]);
      }
    };
    using std::integral_constant;
    cut(0), meanwhile(integral_constant<int, 0>());
    cut(4), meanwhile(integral_constant<int, 1>());
    cut(8), meanwhile(integral_constant<int, 2>());
    cut(12), meanwhile(integral_constant<int, 3>());
    S::turn(to + high * kTileBytes, to + high_turned * kTileBytes);
    S::turn(to + middle * kTileBytes, to + middle_turned * kTileBytes);
  }

  // ---- products of what is cut: one step of one phase at a time. Where there is but one phase, sums stay in tiles.

  static constexpr int kPieces[] = {4, 8, 4, 4, 2};  // of a step of each kind

  void advance(Cursor& cursor, float* products) const {
    if (cursor.phase == phases_.size()) return;
    switch (phases_[cursor.phase].kind) {
      case one: return advance<one>(cursor, products);
      case two: return advance<two>(cursor, products);
      case one_beside_two: return advance<one_beside_two>(cursor, products);
      case two_by_two: return advance<two_by_two>(cursor, products);
      case two_by_two_back: return advance<two_by_two_back>(cursor, products);
    }
  }

  template <Kind kind>
  void advance(Cursor& cursor, float* products) const {
    const Phase& phase = phases_[cursor.phase];
    const char* blocks = cursor.cut + cursor.step * blocks_ * kParts * kTileBytes;
    const char *a = blocks + phase.I * kParts * kTileBytes, *b = blocks + phase.J * kParts * kTileBytes;
    switch (cursor.piece++) {
      case 0:
        if (cursor.step == 0) cursor.add ? get<kind>(phase, products) : clear();
        return take<kind, 0>(a, b);
      case 1: return kind == two_by_two_back ? finish<kind, 1>(cursor, products, a, b) : take<kind, 1>(a, b);
      case 2: return take<kind, 2>(a, b);
      case 3: return kind != two ? finish<kind, 3>(cursor, products, a, b) : take<kind, 3>(a, b);
      case 4: return take<kind, 4>(a, b);
      case 5: return take<kind, 5>(a, b);
      case 6: return take<kind, 6>(a, b);
      default: return finish<kind, 7>(cursor, products, a, b);
    }
  }

  template <Kind kind, int piece>
  void finish(Cursor& cursor, float* products, const char* a, const char* b) const {
    take<kind, piece>(a, b);
    cursor.piece = 0;
    if (++cursor.step < cursor.steps) return;
    put<kind>(phases_[cursor.phase], products);
    cursor.step = 0;
    ++cursor.phase;
  }

  template <int t>
  static void load(const char* block, Part part) {
    S::template tile_load<t>(block + part * kTileBytes, 64);
  }
  template <int sum, int a, int b>
  static void dot() {
    S::template tile_dot<sum, a, b>();
  }

  // One piece of a step. Tiles 0 to 3, or to 5, are sums, the others factors.
  template <Kind kind, int piece>
  static void take(const char* a, const char* b) {
    const char *a1 = a + kParts * kTileBytes, *b1 = b + kParts * kTileBytes;
    if constexpr (kind == one) {
      if constexpr (piece == 0) load<7>(a, high_turned), load<6>(a, high), dot<0, 6, 7>();
      if constexpr (piece == 1) load<5>(a, low), dot<1, 5, 7>();
      if constexpr (piece == 2) load<6>(a, middle), load<4>(a, middle_turned), dot<0, 6, 4>();
      if constexpr (piece == 3) dot<1, 6, 7>();
    } else if constexpr (kind == two) {
      if constexpr (piece == 0) load<7>(a, high_turned), load<6>(a, high), dot<0, 6, 7>();
      if constexpr (piece == 1) load<6>(a1, middle), dot<3, 6, 7>(), load<6>(a, middle), dot<1, 6, 7>();
      if constexpr (piece == 2) load<6>(a1, low), dot<3, 6, 7>(), load<6>(a, low), dot<1, 6, 7>();
      if constexpr (piece == 3) load<7>(a1, high_turned), load<6>(a, high), dot<2, 6, 7>();
      if constexpr (piece == 4) load<6>(a1, high), dot<4, 6, 7>(), load<6>(a, low), dot<2, 6, 7>();
      if constexpr (piece == 5) load<6>(a1, middle), dot<5, 6, 7>(), load<6>(a, middle), dot<2, 6, 7>();
      if constexpr (piece == 6) {
        load<6>(a1, low), dot<5, 6, 7>();
        load<6>(a, middle), load<7>(a, middle_turned), dot<0, 6, 7>();
      }
      if constexpr (piece == 7) load<7>(a1, middle_turned), dot<2, 6, 7>(), load<6>(a1, middle), dot<4, 6, 7>();
    } else if constexpr (kind == one_beside_two) {
      if constexpr (piece == 0) {
        load<7>(b, high_turned), load<6>(a, high), dot<0, 6, 7>();
        load<6>(a1, high), dot<1, 6, 7>();
        load<5>(a, high_turned), load<6>(b, middle), dot<2, 6, 5>();
      }
      if constexpr (piece == 1) load<4>(a1, high_turned), dot<3, 6, 4>(), load<6>(a, low), dot<0, 6, 7>();
      if constexpr (piece == 2) {
        load<6>(a1, low), dot<1, 6, 7>();
        load<6>(b, low), dot<2, 6, 5>(), dot<3, 6, 4>();
      }
      if constexpr (piece == 3) {
        load<6>(a, middle), dot<0, 6, 7>();
        load<5>(a1, middle), dot<1, 5, 7>();
        load<7>(b, middle_turned), dot<0, 6, 7>(), dot<1, 5, 7>();
      }
    } else if constexpr (kind == two_by_two) {
      if constexpr (piece == 0) load<6>(b, high_turned), load<7>(b1, high_turned), four(a, a1, high);
      if constexpr (piece == 1) four(a, a1, low);
      if constexpr (piece == 2) four(a, a1, middle);
      if constexpr (piece == 3) load<6>(b, middle_turned), load<7>(b1, middle_turned), four_dots();
    } else {
      if constexpr (piece == 0) load<6>(a, high_turned), load<7>(a1, high_turned), four(b, b1, middle);
      if constexpr (piece == 1) four(b, b1, low);
    }
  }
  static void four(const char* a, const char* a1, Part part) { load<4>(a, part), load<5>(a1, part), four_dots(); }
  static void four_dots() { dot<0, 4, 6>(), dot<1, 4, 7>(), dot<2, 5, 6>(), dot<3, 5, 7>(); }

  static void clear() {
    S::template tile_zero<0>(), S::template tile_zero<1>(), S::template tile_zero<2>();
    S::template tile_zero<3>(), S::template tile_zero<4>(), S::template tile_zero<5>();
  }

  // body(tile, where its sums are kept), for each of a phase
  template <Kind kind, class Body>
  void each_sum(const Phase& phase, Body&& body) const {
    const int I = phase.I, J = phase.J;
    using std::integral_constant;
    const integral_constant<int, 0> t0;
    const integral_constant<int, 1> t1;
    const integral_constant<int, 2> t2;
    const integral_constant<int, 3> t3;
    if constexpr (kind == one || kind == two) {
      body(t0, square(I, I)), body(t1, own(I));
      if constexpr (kind == two) {
        body(t2, square(I, I + 1)), body(t3, square(I + 1, I));
        body(integral_constant<int, 4>(), square(I + 1, I + 1)), body(integral_constant<int, 5>(), own(I + 1));
      }
    } else if constexpr (kind == one_beside_two) {
      body(t0, square(I, J)), body(t1, square(I + 1, J)), body(t2, square(J, I)), body(t3, square(J, I + 1));
    } else {
      const int row = kind == two_by_two ? I : J, column = kind == two_by_two ? J : I;
      body(t0, square(row, column)), body(t1, square(row, column + 1));
      body(t2, square(row + 1, column)), body(t3, square(row + 1, column + 1));
    }
  }
  template <Kind kind>
  void get(const Phase& phase, const float* products) const {
    each_sum<kind>(phase, [&](auto t, int64_t at) { S::template tile_load<t>(products + at, 64); });
  }
  template <Kind kind>
  void put(const Phase& phase, float* products) const {
    each_sum<kind>(phase, [&](auto t, int64_t at) { S::template tile_store<t>(products + at, 64); });
  }

  const GramCall& c_;
  const int blocks_, tile_;
  std::vector<Phase> phases_;
  int pieces_ = 0;  // of a step of all phases
};

}  // namespace anabranch
