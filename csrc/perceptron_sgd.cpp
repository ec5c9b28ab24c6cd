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

}  // namespace

std::string perceptron_sgd(const PerceptronCall& call, Isa isa, int threads) {
  std::string wrong = wrong_in(call);
  if (!wrong.empty() || call.N == 0) return wrong;
  const Kernels& kernels = kernels_for(std::min(isa, Isa::avx512));  // the levels above add nothing here
  const int64_t own = kernels.perceptron_scratch_floats(call);
  threads = static_cast<int>(std::min<int64_t>(threads, call.N));
  const AlignedFloats scratch(own * threads);
  parallel_for(static_cast<int>(call.N), threads, [&](int client, int thread) {
    kernels.perceptron_epoch(call, client, scratch.data() + thread * own);
  });
  return {};
}

}  // namespace anabranch
