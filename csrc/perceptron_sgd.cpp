#include "perceptron_sgd.h"

#include <algorithm>

#include "aligned.h"
#include "parallel.h"

namespace anabranch {
namespace {

std::string wrong_in(const PerceptronCall& call) {
  const int classes = call.net.widths[call.net.layers];
  const auto out_of = [](const char* name, int64_t got, int64_t end, int64_t i) {
    return std::string(name) + " must be in [0, " + std::to_string(end) + "), got " + std::to_string(got) +
           " in row " + std::to_string(i);
  };
  for (int64_t i = 0; i < call.N; ++i) {
    const int64_t count = call.counts[i];
    if (count < 0 || count > call.n) return out_of("counts", count, call.n + 1, i);
    for (int64_t j = i * call.n; j < i * call.n + count; ++j) {
      if (call.index[j] < 0 || call.index[j] >= call.M) return out_of("index", call.index[j], call.M, i);
      if (call.y[j] < 0 || call.y[j] >= classes) return out_of("y", call.y[j], classes, i);
    }
  }
  return {};
}

const PerceptronKernels& kernels_of_perceptrons(Isa isa) {
  return kernels_for(std::min(isa, Isa::avx512)).perceptron;  // the levels above add nothing here
}

// Calls body(row, its state, kernels) for all rows.
template <class Body>
void each_state(const PerceptronSteps& s, int threads, Body&& body) {
  const PerceptronKernels& kernels = kernels_of_perceptrons(s.isa);
  parallel_for(static_cast<int>(s.N), threads, [&](int i, int) { body(i, s.states + i * s.floats, kernels); });
}

// Row i of rows that are so long; null if there are none.
template <class T>
T* row_of(T* rows, int64_t i, int64_t floats) {
  return rows == nullptr ? nullptr : rows + i * floats;
}

}  // namespace

std::string perceptron_sgd(const PerceptronCall& call, Isa isa, int threads) {
  std::string wrong = wrong_in(call);
  if (!wrong.empty() || call.N == 0) return wrong;
  const PerceptronKernels& kernels = kernels_of_perceptrons(isa);
  const int64_t own = kernels.floats(call.net);
  threads = static_cast<int>(std::min<int64_t>(threads, call.N));
  const AlignedFloats scratch(own * threads);
  parallel_for(static_cast<int>(call.N), threads, [&](int row, int thread) {
    kernels.epoch(call, row, scratch.data() + thread * own);
  });
  return {};
}

int64_t perceptron_state_floats(const Perceptron& net, Isa isa) {
  return kernels_of_perceptrons(isa).floats(net);
}

void perceptron_load(const PerceptronSteps& s, const float* rows, const float* velocity, int threads) {
  const int64_t D = s.net.size();
  each_state(s, threads, [&](int64_t i, float* state, const PerceptronKernels& kernels) {
    kernels.load(s.net, state, rows + i * D, velocity + i * D);
  });
}

void perceptron_unload(const PerceptronSteps& s, float* rows, float* velocity, int threads) {
  const int64_t D = s.net.size();
  each_state(s, threads, [&](int64_t i, float* state, const PerceptronKernels& kernels) {
    kernels.unload(s.net, state, rows + i * D, velocity + i * D);
  });
}

void perceptron_forward(const PerceptronSteps& s, const float* x, int64_t M, int B, float* logits, float* features,
                        int threads) {
  const int* last = s.net.widths + s.net.layers;
  each_state(s, threads, [&](int64_t i, float* state, const PerceptronKernels& kernels) {
    kernels.forward(s.net, state, row_of(x, i % M, int64_t{B} * s.net.widths[0]), B,
                    row_of(logits, i, int64_t{B} * last[0]), row_of(features, i, int64_t{B} * last[-1]));
  });
}

void perceptron_step(const PerceptronSteps& s, const Sgd& sgd, const float* logits, const float* features,
                     const bool* live, int64_t M, int B, int threads) {
  const int* last = s.net.widths + s.net.layers;
  each_state(s, threads, [&](int64_t i, float* state, const PerceptronKernels& kernels) {
    if (live[i % M])
      kernels.step(s.net, sgd, state, row_of(logits, i, int64_t{B} * last[0]),
                   row_of(features, i, int64_t{B} * last[-1]), B);
  });
}

}  // namespace anabranch
