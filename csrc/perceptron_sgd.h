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
};

// All tensors are contiguous; what they are is said in perceptron_sgd/op.py.
struct PerceptronCall {
  Perceptron net;
  float* rows;           // [N, D], trained in place
  float* velocity;       // [N, D]
  const float* x;        // [M, widths[0]]
  const int64_t* index;  // [N, n]
  const int64_t* y;      // [N, n]
  const int64_t* counts; // [N]
  int64_t N, M, n;
  int batch;
  float lr, momentum, weight_decay;
};

// Says what is wrong with samples, labels or counts; nothing has been trained then.
std::string perceptron_sgd(const PerceptronCall& call, Isa isa, int threads);

}  // namespace anabranch
