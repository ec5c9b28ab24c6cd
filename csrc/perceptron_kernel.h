// One perceptron's epoch of SGD, for any instruction set S (simd_*.h).
//
// Its weights and velocities stay in the nearest cache that holds them, in panels: columns of two vectors, row after
// row, filled up with zeros, so that every product and every step reads and writes them as one stream. A step is three
// kinds of products in registers, forward, backward and of the slopes; a slope is used where it arises, in the same
// registers, and never stored.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "aligned.h"
#include "perceptron_sgd.h"

namespace anabranch {

template <class S>
class PerceptronKernel {
  using F = typename S::F;
  static constexpr int W = S::W;
  static constexpr int kPanel = 2 * W;
  static constexpr int kRows = S::registers >= 32 ? 8 : S::registers >= 16 ? 4 : 1;  // of a product in registers
  static constexpr int kTerms = 64;  // of a sum, before it is added to others
  static constexpr float kLog2e = 1.44269504088896f;

 public:
  explicit PerceptronKernel(const PerceptronCall& call) : c_(call), L_(call.net.layers), widths_(call.net.widths) {
    int64_t at = 0;
    const auto take = [&](int64_t floats) {
      const int64_t begin = at;
      at += round_up(floats, 16);
      return begin;
    };
    batch_ = static_cast<int>(std::min<int64_t>(call.batch, call.n));
    int64_t turned = 0, widest = 0;
    for (int l = 0; l < L_; ++l) {
      padded_[l] = static_cast<int>(round_up(widths_[l + 1], W));
      weight_[l] = take(int64_t{widths_[l]} * padded_[l]), bias_[l] = take(padded_[l]);
      widest = std::max<int64_t>(widest, padded_[l]);
      if (l) turned = std::max<int64_t>(turned, int64_t{widths_[l + 1]} * padded_[l - 1]);
    }
    velocity_ = at, at *= 2;
    input_ = take(int64_t{batch_} * widths_[0]);
    for (int l = 0; l < L_; ++l) output_[l] = take(int64_t{batch_} * padded_[l]);
    slope_[0] = take(batch_ * widest), slope_[1] = take(batch_ * widest);
    turned_ = take(turned);
    floats_ = at;
  }

  int64_t scratch_floats() const { return floats_; }

  // Client i goes through its samples once.
  void epoch(int64_t i, float* scratch) {
    s_ = scratch;
    const int64_t count = c_.counts[i];
    copy<true>(c_.rows + i * size(), s_), copy<true>(c_.velocity + i * size(), s_ + velocity_);
    for (int64_t begin = 0; begin < count; begin += batch_) {
      const int samples = static_cast<int>(std::min<int64_t>(batch_, count - begin));
      gather(c_.index + i * c_.n + begin, samples);
      for (int l = 0; l < L_; ++l) forward(l, samples);
      slopes_of_logits(c_.y + i * c_.n + begin, samples);
      for (int l = L_ - 1; l >= 0; --l) {
        if (l) backward(l, samples);
        step(l, samples);
      }
    }
    copy<false>(c_.rows + i * size(), s_), copy<false>(c_.velocity + i * size(), s_ + velocity_);
  }

 private:
  int64_t size() const {
    int64_t total = 0;
    for (int l = 0; l < L_; ++l) total += (int64_t{widths_[l]} + 1) * widths_[l + 1];
    return total;
  }

  // Calls body(first column, number of vectors) for each panel of so many columns.
  template <class Body>
  static void each_panel(int columns, Body&& body) {
    int c = 0;
    for (; c + kPanel <= columns; c += kPanel) body(c, std::integral_constant<int, 2>());
    if (c < columns) body(c, std::integral_constant<int, 1>());
  }

  // Calls body(first row, number of rows) for as many rows as the registers hold at a time, then for fewer.
  template <int R = kRows, class Body>
  static void each_block(int begin, int end, Body&& body) {
    for (; begin + R <= end; begin += R) body(begin, std::integral_constant<int, R>());
    if constexpr (R > 1) each_block<R / 2>(begin, end, body);
  }

  // Between a row as the caller has it and panels.
  template <bool in>
  void copy(std::conditional_t<in, const float*, float*> row, float* to) const {
    for (int l = 0; l < L_; ++l) {
      const int out = widths_[l + 1];
      copy_matrix<in>(row, widths_[l], out, padded_[l], to + weight_[l]);
      row += int64_t{widths_[l]} * out;
      copy_matrix<in>(row, 1, out, padded_[l], to + bias_[l]);
      row += out;
    }
  }

  template <bool in>
  static void copy_matrix(std::conditional_t<in, const float*, float*> matrix, int rows, int columns, int padded,
                          float* panels) {
    each_panel(padded, [&](int c, auto vectors) {
      constexpr int width = vectors * W;
      const int own = std::min(width, columns - c);
      float* panel = panels + int64_t{rows} * c;
      for (int64_t i = 0; i < rows; ++i) {
        if constexpr (in) {
          std::copy_n(matrix + i * columns + c, own, panel + i * width);
          std::fill(panel + i * width + own, panel + (i + 1) * width, 0.0f);
        } else {
          std::copy_n(panel + i * width, own, matrix + i * columns + c);
        }
      }
    });
  }

  void gather(const int64_t* index, int samples) {
    for (int b = 0; b < samples; ++b)
      std::copy_n(c_.x + index[b] * widths_[0], widths_[0], s_ + input_ + int64_t{b} * widths_[0]);
  }

  const float* inputs(int l) const { return s_ + (l ? output_[l - 1] : input_); }
  int64_t inputs_row(int l) const { return l ? padded_[l - 1] : widths_[0]; }
  float* slopes(int l) const { return s_ + slope_[l % 2]; }

  // totals[r][v] += row a + r times a panel of K rows. Sums of sums: a long one in a row would round more often.
  template <int R, int V>
  [[gnu::always_inline]] static inline void multiply(const float* a, int64_t a_row, const float* panel, int K,
                                                     F (&totals)[R][V]) {
    for (int begin = 0; begin < K; begin += kTerms) {
      F sums[R][V];
      fill(sums, S::zero());
      for (int k = begin; k < std::min(begin + kTerms, K); ++k) {
        F w[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) w[v] = S::load(panel + int64_t{k} * V * W + v * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const F factor = S::set1(a[r * a_row + k]);
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) sums[r][v] = S::fma(factor, w[v], sums[r][v]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) totals[r][v] = S::add(totals[r][v], sums[r][v]);
    }
  }

  template <int R, int V>
  [[gnu::always_inline]] static inline void fill(F (&all)[R][V], F value) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) all[r][v] = value;
  }

  void forward(int l, int samples) {
    const float* a = inputs(l);
    const int64_t a_row = inputs_row(l);
    const int P = padded_[l];
    float* to = s_ + output_[l];
    const bool last = l + 1 == L_;
    each_panel(P, [&](int c, auto vectors) {
      constexpr int V = vectors;
      const float* panel = s_ + weight_[l] + int64_t{widths_[l]} * c;
      each_block(0, samples, [&](int b, auto rows) {
        constexpr int R = rows;
        F sums[R][V];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) sums[r][v] = S::load(s_ + bias_[l] + c + v * W);
        multiply<R, V>(a + b * a_row, a_row, panel, widths_[l], sums);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v)
            S::store(to + int64_t{b + r} * P + c + v * W, last ? sums[r][v] : S::max(S::zero(), sums[r][v]));  // NaN stays
      });
    });
  }

  // softmax(logits) less one at the label, over the samples: what descends the mean cross-entropy.
  void slopes_of_logits(const int64_t* y, int samples) {
    const int l = L_ - 1, P = padded_[l], C = widths_[L_];
    const F share = S::set1(1.0f / samples);
    for (int b = 0; b < samples; ++b) {
      float* z = s_ + output_[l] + int64_t{b} * P;
      float* to = slopes(l) + int64_t{b} * P;
      std::fill(z + C, z + P, -std::numeric_limits<float>::infinity());
      F high = S::load(z), total = S::zero();
      for (int c = W; c < P; c += W) high = S::max(high, S::load(z + c));
      const F shift = S::set1(-S::highest(high) * kLog2e);
      for (int c = 0; c < P; c += W) {
        const F e = S::exp2(S::fma(S::load(z + c), S::set1(kLog2e), shift));
        S::store(to + c, e);
        total = S::add(total, e);
      }
      const F factor = S::mul(S::set1(1.0f / S::sum(total)), share);
      for (int c = 0; c < P; c += W) S::store(to + c, S::mul(S::load(to + c), factor));
      to[y[b]] -= 1.0f / samples;
    }
  }

  // Slopes of layer l's inputs, of those of its outputs, through the rectifier that made the inputs.
  void backward(int l, int samples) {
    const int in = widths_[l], out = widths_[l + 1], P = padded_[l], P_in = padded_[l - 1];
    turn(s_ + weight_[l], in, out, P, P_in);
    const float* from = slopes(l);
    const float* a = inputs(l);
    float* to = slopes(l - 1);
    each_panel(P_in, [&](int c, auto vectors) {
      constexpr int V = vectors;
      each_block(0, samples, [&](int b, auto rows) {
        constexpr int R = rows;
        F sums[R][V];
        fill(sums, S::zero());
        multiply<R, V>(from + int64_t{b} * P, P, s_ + turned_ + int64_t{out} * c, out, sums);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) {
            const int64_t place = int64_t{b + r} * P_in + c + v * W;
            S::store(to + place, S::where_greater(S::load(a + place), S::zero(), sums[r][v], S::zero()));
          }
      });
    });
  }

  // A weight [in, out] in panels to its transpose [out, in] in panels; what fills these up is not written.
  void turn(const float* panels, int in, int out, int P, int P_in) {
    float* to = s_ + turned_;
    each_panel(P, [&](int c, auto vectors) {
      constexpr int width = vectors * W;
      const float* panel = panels + int64_t{in} * c;
      const int own = std::min(width, out - c);
      each_panel(P_in, [&](int d, auto others) {
        constexpr int other = others * W;
        const int rows = std::min(other, in - d);
        for (int j = 0; j < own; ++j) {
          float* line = to + int64_t{out} * d + int64_t{c + j} * other;
          for (int i = 0; i < rows; ++i) line[i] = panel[int64_t{d + i} * width + j];
        }
      });
    });
  }

  // Layer l goes down its slopes.
  void step(int l, int samples) {
    const float* a = inputs(l);
    const int64_t a_row = inputs_row(l);
    const float* from = slopes(l);
    const int in = widths_[l], P = padded_[l];
    each_panel(P, [&](int c, auto vectors) {
      constexpr int V = vectors;
      float* panel = s_ + weight_[l] + int64_t{in} * c;
      each_block(0, in, [&](int i, auto rows) {
        constexpr int R = rows;
        F sums[R][V];
        fill(sums, S::zero());
        for (int b = 0; b < samples; ++b) {
          F slope[V];
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) slope[v] = S::load(from + int64_t{b} * P + c + v * W);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            const F factor = S::set1(a[b * a_row + i + r]);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) sums[r][v] = S::fma(factor, slope[v], sums[r][v]);
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) descend(panel + (int64_t{i + r} * V + v) * W, sums[r][v]);
      });
      F sums[V];
      for (int v = 0; v < V; ++v) sums[v] = S::zero();
      for (int b = 0; b < samples; ++b)
        for (int v = 0; v < V; ++v) sums[v] = S::add(sums[v], S::load(from + int64_t{b} * P + c + v * W));
      for (int v = 0; v < V; ++v) descend(s_ + bias_[l] + c + v * W, sums[v]);
    });
  }

  [[gnu::always_inline]] inline void descend(float* w, F slope) const {
    float* velocity = w + velocity_;
    const F old = S::load(w);
    slope = S::fma(S::set1(c_.weight_decay), old, slope);
    slope = S::fma(S::set1(c_.momentum), S::load(velocity), slope);
    S::store(velocity, slope);
    S::store(w, S::fma(S::set1(-c_.lr), slope, old));
  }

  const PerceptronCall& c_;
  const int L_;
  const int* widths_;
  int batch_;
  // Where things are in the scratch memory; velocities are as far behind what they move.
  int padded_[Perceptron::kMostLayers];
  int64_t weight_[Perceptron::kMostLayers], bias_[Perceptron::kMostLayers], output_[Perceptron::kMostLayers];
  int64_t velocity_, input_, slope_[2], turned_, floats_;
  float* s_ = nullptr;
};

}  // namespace anabranch
