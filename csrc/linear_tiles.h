// Rows of a linear layer in tiles (simd_amx.h), any number of rows of x: a weight T of bfloat16, or of int8 as digits.
//
// Layout   Tiles of the weight, sixteen rows of 64 bytes, come from where they lie and meet tiles of x, which is packed
//          once: sixteen columns of 64 bytes, transposed in pieces of four. One or two tiles of the weight and up to
//          four of x make up to four tiles of sums [16 outputs][16 columns].
// int8     x becomes digits: with the power of two that makes the row's largest |x| 2^29 to 2^30, x is rounded to whole
//          numbers and these are cut into four signed bytes. Products and sums of bytes are exact; the four sums of a
//          row of x are put together in float32. Of bfloat16 nothing is lost down to 2^-22 of the largest (float16:
//          2^-19), below that at most 2^-30 of the largest. A row of x with inf or NaN gives NaN.
// Bound    memory: four products take about 20 ns a KiB of weight, reading it 60 to 80. Rows of tiles are streams that
//          the CPU's own prefetchers follow; asking for lines ahead changed nothing. More rows of x than four tiles hold
//          pass two tiles at a time, over a weight that is then in the second cache.
// Numerics every sum runs over the inputs in one order, so a row's result depends on nothing else. As with vdpbf16ps,
//          subnormal bfloat16 count as 0.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "linear_kernel.h"

namespace anabranch {

template <class S, class T>
class LinearTiles {
  using F = typename S::F;
  static constexpr bool kDigits = std::is_same<T, int8_t>::value;
  static constexpr int kSide = 16, kTileBytes = 1024;
  static constexpr int kInputs = 64 / sizeof(T);                 // of a step: one tile deep
  static constexpr int kTileRows = kDigits ? kSide / 4 : kSide;  // rows of x in one tile
  static constexpr int kMostInputs = (1 << 17) - 1;              // whose products of bytes cannot overflow int32

 public:
  static bool fits(const LinearCall& call) {
    if constexpr (kDigits)
      return call.weight_type == Type::i8 && call.x_type != Type::f32 && call.in <= kMostInputs;
    else
      return call.weight_type == Type::bf16 && call.x_type == Type::bf16;
  }

  explicit LinearTiles(const LinearCall& call)
      : c_(call), steps_((call.in + kInputs - 1) / kInputs), groups_((call.M + kTileRows - 1) / kTileRows),
        group_bytes_(int64_t{steps_} * kTileBytes) {}

  int64_t packed_floats() const { return groups_ * (group_bytes_ / 4 + kTileRows); }  // tiles, then units

  void pack(float* packed, int rows_group) const {
    constexpr int tiles = kGroupRows / kTileRows;
    for (int group = rows_group * tiles; group < std::min(groups_, (rows_group + 1) * tiles); ++group)
      pack_tiles(packed, group);
  }

  void rows(const float* packed, int64_t begin, int64_t end) const {
    const typename S::Tiles tiles;
    for (int group = 0, count = 0; group < groups_; group += count) {
      count = std::min(groups_ - group, groups_ > 4 ? 2 : 4);
      for (int64_t row = begin, rows = 0; row < end; row += rows) {
        rows = std::min<int64_t>(end - row, count > 2 ? kSide : 2 * kSide);
        const Block block{static_cast<const T*>(c_.weight) + row * c_.weight_row,
                          reinterpret_cast<const char*>(packed) + group * group_bytes_,
                          packed + groups_ * group_bytes_ / 4 + group * kTileRows, row, static_cast<int>(rows), group};
        switch (count) {
          case 4: multiply<1, 4>(block); break;
          case 3: multiply<1, 3>(block); break;
          case 2: rows > kSide ? multiply<2, 2>(block) : multiply<1, 2>(block); break;
          default: rows > kSide ? multiply<2, 1>(block) : multiply<1, 1>(block);
        }
      }
    }
  }

 private:
  struct Block {
    const T* weight;
    const char* x;       // tiles of its groups
    const float* units;  // what one of q is worth in each row of x
    int64_t row;
    int rows, group;
  };

  void pack_tiles(float* packed, int group) const {
    const int first = group * kTileRows, rows = std::min(kTileRows, c_.M - first);
    float* to = packed + group * group_bytes_ / 4;
    float* units = packed + groups_ * group_bytes_ / 4 + first;
    with_type(c_.x_type, [&](auto* type) {
      using X = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      const X* from = static_cast<const X*>(c_.x) + first * c_.x_row;
      if constexpr (kDigits && sizeof(X) == 2)
        for (int m = 0; m < rows; ++m) units[m] = unit_of(from + m * c_.x_row);
      for (int step = 0; step < steps_; ++step, from += kInputs, to += kTileBytes / 4) {
        const int inputs = std::min(kInputs, c_.in - step * kInputs);
        F column[kSide];
        for (int m = 0; m < kTileRows; ++m) {
          X some[kInputs] = {};
          if (m < rows) std::memcpy(some, from + m * c_.x_row, inputs * sizeof(X));
          if constexpr (kDigits && sizeof(X) == 2)
            S::digits(some, m < rows ? 1.0f / units[m] : 1.0f, column + 4 * m);
          else if constexpr (!kDigits && sizeof(X) == 2)
            column[m] = S::load(reinterpret_cast<const float*>(some));
        }
        S::transpose(column);
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i) S::store(to + i * kSide, column[i]);
      }
    });
  }

  // The power of two that one of q is worth; NaN for a row with inf or NaN. Rows below 2^-90 keep to 2^-120.
  template <class X>
  float unit_of(const X* x) const {
    const float largest = to_float(X{S::largest_bits(&x->bits, c_.in)});
    if (!std::isfinite(largest)) return std::nanf("");
    int exponent = 0;
    std::frexp(largest, &exponent);
    return std::ldexp(1.0f, std::max(exponent, -90) - 30);
  }

  // Tiles 0 to 3 hold sums: those of tile a of the weight and tile g of x in a * G + g. 4 and 5 hold the weight, 6 and 7 x.
  template <int A, int G>
  [[gnu::noinline]] void multiply(const Block& b) const {
    alignas(64) char edge[A * kTileBytes];
    const int whole = b.rows == A * kSide ? c_.in / kInputs : 0;
    zero<A * G - 1>();
    for (int step = 0; step < steps_; ++step) {
      const char* weight = reinterpret_cast<const char*>(b.weight + step * kInputs);
      int64_t row_bytes = c_.weight_row * static_cast<int64_t>(sizeof(T));
      if (step >= whole) {
        copy_edge<A>(b, step, edge);
        weight = edge, row_bytes = 64;
      }
      S::template tile_load<4>(weight, row_bytes);
      if constexpr (A > 1) S::template tile_load<5>(weight + kSide * row_bytes, row_bytes);
      multiply_tiles<A, G, 0>(b.x + int64_t{step} * kTileBytes);
    }
    write_tiles<A, G, 0>(b);
  }

  template <int last>
  static void zero() {
    S::template tile_zero<last>();
    if constexpr (last > 0) zero<last - 1>();
  }

  template <int A, int G, int g>
  void multiply_tiles(const char* x) const {
    S::template tile_load<6 + g % 2>(x + g * group_bytes_, 64);
    dot<g, 4, 6 + g % 2>();
    if constexpr (A > 1) dot<G + g, 5, 6 + g % 2>();
    if constexpr (g + 1 < G) multiply_tiles<A, G, g + 1>(x);
  }

  template <int c, int a, int b>
  static void dot() {
    if constexpr (kDigits)
      S::template tile_dot_bytes<c, a, b>();
    else
      S::template tile_dot<c, a, b>();
  }

  // A step of the weight where its rows or its inputs end, filled up with zeros.
  template <int A>
  void copy_edge(const Block& b, int step, char* to) const {
    const int inputs = std::min(kInputs, c_.in - step * kInputs);
    for (int r = 0; r < A * kSide; ++r, to += 64) {
      T some[kInputs] = {};
      if (r < b.rows) std::memcpy(some, b.weight + r * c_.weight_row + step * kInputs, inputs * sizeof(T));
      std::memcpy(to, some, 64);
    }
  }

  template <int A, int G, int tile>
  void write_tiles(const Block& b) const {
    alignas(64) float sums[kSide][kSide];
    S::template tile_store<tile>(sums, 64);
    const int row = tile / G * kSide;
    write(b, sums, b.row + row, std::min(kSide, b.rows - row), tile % G * kTileRows);
    if constexpr (tile + 1 < A * G) write_tiles<A, G, tile + 1>(b);
  }

  // Sums [out][column] to y [M][out]; `first` counts the rows of x from the first of the block.
  void write(const Block& b, const float (&sums)[kSide][kSide], int64_t row, int rows, int first) const {
    F column[kSide];
#pragma GCC unroll 16
    for (int r = 0; r < kSide; ++r) column[r] = S::load(sums[r]);
    S::transpose(column);
    const int m = b.group * kTileRows + first, existing = std::min(kTileRows, c_.M - m);
    for (int i = 0; i < existing; ++i) {
      if constexpr (kDigits)
        write_results<S>(c_, S::mul(S::of_digits(column + 4 * i), S::set1(b.units[first + i])), row, rows, m + i);
      else
        write_results<S>(c_, column[i], row, rows, m + i);
    }
  }

  const LinearCall& c_;
  const int steps_, groups_;
  const int64_t group_bytes_;
};

}  // namespace anabranch
