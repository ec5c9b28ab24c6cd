// SGD on cross-entropy of many perceptrons, each on samples of its own.
#pragma once

#include <cstdint>
#include <string>

#include "isa.h"

namespace anabranch {

// Layers of rectified linear units, the last one without; layer l has weight [widths[l], widths[l + 1]] and bias.
struct Perceptron {
  static constexpr int kMostLayers = 16;
  int layers;
  int widths[kMostLayers + 1];
  int batch;  // samples of a step, at most

  int64_t size() const {
    int64_t total = 0;
    for (int l = 0; l < layers; ++l) total += (int64_t{widths[l]} + 1) * widths[l + 1];
    return total;
  }
};

struct Sgd {
  float lr, momentum, weight_decay;
};

// All tensors are contiguous; what they are is said in perceptron_sgd/op.py.
struct PerceptronCall {
  Perceptron net;
  Sgd sgd;
  float* rows;            // [N, D], trained in place
  float* velocity;        // [N, D]
  const float* x;         // [M, widths[0]]
  const int64_t* index;   // [N, n]
  const int64_t* y;       // [N, n]
  const int64_t* counts;  // [N]
  int64_t N, M, n;
};

// Says what is wrong with samples, labels or counts; nothing has been trained then.
std::string perceptron_sgd(const PerceptronCall& call, Isa isa, int threads);

// Perceptrons between two steps, whose losses are computed elsewhere; see perceptron_sgd/steps.py. `states` [N, floats]
// is where they are trained, rows and velocity where they come from and go to.
struct PerceptronSteps {
  Perceptron net;
  float* states;
  int64_t floats, N;
  Isa isa;
};

int64_t perceptron_state_floats(const Perceptron& net, Isa isa);
void perceptron_load(const PerceptronSteps& steps, const float* rows, const float* velocity, int threads);
void perceptron_unload(const PerceptronSteps& steps, float* rows, float* velocity, int threads);

// x [M, B, widths[0]], every M-th row is shown the same -> logits [N, B, C], features [N, B, d], null without hidden
// layers.
void perceptron_forward(const PerceptronSteps& steps, const float* x, int64_t M, int B, float* logits, float* features,
                        int threads);

// Of what `perceptron_forward` last gave, the slopes, for rows of which live [M] is true; those of features may be
// null.
void perceptron_step(const PerceptronSteps& steps, const Sgd& sgd, const float* logits, const float* features,
                     const bool* live, int64_t M, int B, int threads);

}  // namespace anabranch
