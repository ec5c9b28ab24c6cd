// One perceptron under SGD, for any instruction set S (simd_*.h).
//
// Its weights and velocities stay in the nearest cache that holds them, in panels: columns of two vectors, row after
// row, filled up with zeros, so that every product and every step reads and writes them as one stream. A step is three
// kinds of products in registers, forward, backward and of the slopes; a slope is used where it arises, in the same
// registers, and never stored.
#pragma once

#include <algorithm>
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
  // `scratch` is the perceptron's own as long as it is trained.
  PerceptronKernel(const Perceptron& net, float* scratch)
      : net_(net), L_(net.layers), widths_(net.widths), s_(scratch) {
    int64_t at = 0;
    const auto room_for = [&](int64_t floats) {
      const int64_t begin = at;
      at += round_up(floats, 16);
      return begin;
    };
    const int64_t B = net.batch;
    int64_t turned = 0, widest = 0;
    for (int l = 0; l < L_; ++l) {
      padded_[l] = static_cast<int>(round_up(widths_[l + 1], W));
      weight_[l] = room_for(int64_t{widths_[l]} * padded_[l]), bias_[l] = room_for(padded_[l]);
      widest = std::max<int64_t>(widest, padded_[l]);
      if (l) turned = std::max<int64_t>(turned, int64_t{widths_[l + 1]} * padded_[l - 1]);
    }
    velocity_ = at, at *= 2;
    input_ = room_for(B * widths_[0]);
    for (int l = 0; l < L_; ++l) output_[l] = room_for(B * padded_[l]);
    slope_[0] = room_for(B * widest), slope_[1] = room_for(B * widest);
    turned_ = room_for(turned);
    floats_ = at;
  }

  int64_t floats() const { return floats_; }

  void load(const float* row, const float* velocity) { copy<true>(row, s_), copy<true>(velocity, s_ + velocity_); }

  void unload(float* row, float* velocity) const { copy<false>(row, s_), copy<false>(velocity, s_ + velocity_); }

  // Row i of a call goes through its samples once.
  void epoch(const PerceptronCall& call, int64_t i) {
    const int64_t count = call.counts[i], D = net_.size();
    load(call.rows + i * D, call.velocity + i * D);
    for (int64_t begin = 0; begin < count; begin += net_.batch) {
      const int samples = static_cast<int>(std::min<int64_t>(net_.batch, count - begin));
      const int64_t* index = call.index + i * call.n + begin;
      for (int b = 0; b < samples; ++b) take(b, call.x + index[b] * widths_[0]);
      for (int l = 0; l < L_; ++l) forward(l, samples);
      slopes_of_logits(call.y + i * call.n + begin, samples);
      descend(call.sgd, nullptr, samples);
    }
    unload(call.rows + i * D, call.velocity + i * D);
  }

  // x [samples, widths[0]] -> logits [samples, C], features [samples, d].
  void forward_all(const float* x, int samples, float* logits, float* features) {
    for (int b = 0; b < samples; ++b) take(b, x + int64_t{b} * widths_[0]);
    for (int l = 0; l < L_; ++l) forward(l, samples);
    const int C = widths_[L_], d = widths_[L_ - 1];
    for (int64_t b = 0; b < samples; ++b) {
      std::copy_n(s_ + output_[L_ - 1] + b * padded_[L_ - 1], C, logits + b * C);
      if (features != nullptr) std::copy_n(inputs(L_ - 1) + b * inputs_row(L_ - 1), d, features + b * d);
    }
  }

  // One step, of the slopes of these.
  void step_all(const Sgd& sgd, const float* logits, const float* features, int samples) {
    const int C = widths_[L_], P = padded_[L_ - 1];
    float* to = slopes(L_ - 1);
    for (int64_t b = 0; b < samples; ++b) {
      std::copy_n(logits + b * C, C, to + b * P);
      std::fill(to + b * P + C, to + (b + 1) * P, 0.0f);
    }
    descend(sgd, features, samples);
  }

 private:
  void take(int b, const float* x) { std::copy_n(x, widths_[0], s_ + input_ + int64_t{b} * widths_[0]); }

  // Down the slopes of the logits, and those of features that come beside.
  void descend(const Sgd& sgd, const float* features, int samples) {
    for (int l = L_ - 1; l >= 0; --l) {
      if (l) backward(l, samples);
      if (l == L_ - 1 && l && features != nullptr) add_to_slopes(l - 1, features, samples);
      step(sgd, l, samples);
    }
  }

  // More slopes [samples, width] of layer l's outputs, through their rectifier.
  void add_to_slopes(int l, const float* more, int samples) {
    const int width = widths_[l + 1];
    for (int64_t b = 0; b < samples; ++b) {
      const float* a = s_ + output_[l] + b * padded_[l];
      float* to = slopes(l) + b * padded_[l];
      for (int j = 0; j < width; ++j) to[j] += a[j] > 0.0f ? more[b * width + j] : 0.0f;
    }
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

  const float* inputs(int l) const { return s_ + (l ? output_[l - 1] : input_); }
  int64_t inputs_row(int l) const { return l ? padded_[l - 1] : widths_[0]; }
  float* slopes(int l) const { return s_ + slope_[l % 2]; }

  // totals[r][v] += row a + r times a panel of K rows. Sums of sums: a long one in a row would round more often.
  template <int R, int V>
  [[gnu::always_inline]] static inline void multiply(const float* a, int64_t a_row, const float* panel, int K,
                                                     F (&totals)[R][V]) {
    for (int begin = 0; begin < K; begin += kTerms) {
      F sums[R][V];
      clear(sums);
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
      each_sum(sums, [&](int r, int v, F& sum) { totals[r][v] = S::add(totals[r][v], sum); });
    }
  }

  // Calls body(r, v, sum) for the registers of a product.
  template <int R, int V, class Body>
  [[gnu::always_inline]] static inline void each_sum(F (&sums)[R][V], Body&& body) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) body(r, v, sums[r][v]);
  }

  template <int R, int V>
  [[gnu::always_inline]] static inline void clear(F (&sums)[R][V]) {
    each_sum(sums, [](int, int, F& sum) { sum = S::zero(); });
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
        each_sum(sums, [&](int, int v, F& sum) { sum = S::load(s_ + bias_[l] + c + v * W); });
        multiply<R, V>(a + b * a_row, a_row, panel, widths_[l], sums);
        each_sum(sums, [&](int r, int v, F& sum) {
          S::store(to + int64_t{b + r} * P + c + v * W, last ? sum : S::max(S::zero(), sum));  // NaN stays
        });
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
        clear(sums);
        multiply<R, V>(from + int64_t{b} * P, P, s_ + turned_ + int64_t{out} * c, out, sums);
        each_sum(sums, [&](int r, int v, F& sum) {
          const int64_t place = int64_t{b + r} * P_in + c + v * W;
          S::store(to + place, S::where_greater(S::load(a + place), S::zero(), sum, S::zero()));
        });
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
  void step(const Sgd& sgd, int l, int samples) {
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
        clear(sums);
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
        each_sum(sums, [&](int r, int v, F& sum) { move(sgd, panel + (int64_t{i + r} * V + v) * W, sum); });
      });
      F sums[1][V];
      clear(sums);
      for (int b = 0; b < samples; ++b)
        each_sum(sums, [&](int, int v, F& sum) { sum = S::add(sum, S::load(from + int64_t{b} * P + c + v * W)); });
      each_sum(sums, [&](int, int v, F& sum) { move(sgd, s_ + bias_[l] + c + v * W, sum); });
    });
  }

  [[gnu::always_inline]] inline void move(const Sgd& sgd, float* w, F slope) const {
    float* velocity = w + velocity_;
    const F old = S::load(w);
    slope = S::fma(S::set1(sgd.weight_decay), old, slope);
    slope = S::fma(S::set1(sgd.momentum), S::load(velocity), slope);
    S::store(velocity, slope);
    S::store(w, S::fma(S::set1(-sgd.lr), slope, old));
  }

  const Perceptron& net_;
  const int L_;
  const int* widths_;
  float* s_;
  // Where things are in the scratch memory; velocities are as far behind what they move.
  int padded_[Perceptron::kMostLayers];
  int64_t weight_[Perceptron::kMostLayers], bias_[Perceptron::kMostLayers], output_[Perceptron::kMostLayers];
  int64_t velocity_, input_, slope_[2], turned_, floats_;
};

}  // namespace anabranch
