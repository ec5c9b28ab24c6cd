#include "coordinate_rules.h"

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "aligned.h"
#include "parallel.h"

namespace anabranch {
namespace {

// Places [begin, end) of the sorted values that a rule looks at.
std::pair<int, int> places(const CoordinateCall& call) {
  switch (call.rule) {
    case Rule::median: return {(call.N - 1) / 2, call.N / 2 + 1};
    case Rule::trimmed_mean: return {call.f, call.N - call.f};
    case Rule::mean_around_median:
    case Rule::phocas: return {0, call.N};
    case Rule::sign_majority: break;
  }
  return {0, 0};
}

// The exchanges that are left when the sequences are sorted, without those that change nothing in [begin, end).
std::vector<Exchange> exchanges_for(int N, int sequences, std::pair<int, int> places) {
  std::vector<Exchange> all;
  if (sequences > 1) each_exchange(N, sequences, [&](Exchange exchange) { all.push_back(exchange); });
  std::vector<char> wanted(N);
  std::fill(wanted.begin() + places.first, wanted.begin() + places.second, 1);
  std::vector<Exchange> backwards;
  for (auto exchange = all.rbegin(); exchange != all.rend(); ++exchange)
    if (wanted[exchange->low] || wanted[exchange->high]) {
      wanted[exchange->low] = wanted[exchange->high] = 1;
      backwards.push_back(*exchange);
    }
  return {backwards.rbegin(), backwards.rend()};
}

}  // namespace

bool coordinate_rule(const CoordinateCall& call, Isa isa, int threads) {
  const Kernels& kernels = kernels_for(std::min(isa, Isa::avx512));  // the levels above add nothing here
  const CoordinatePlan plan = kernels.coordinate_plan(call);
  std::vector<Exchange> exchanges = exchanges_for(call.N, plan.sequences, places(call));
  for (Exchange& exchange : exchanges) exchange.low *= plan.lanes, exchange.high *= plan.lanes;
  const int64_t count = static_cast<int64_t>(exchanges.size());
  // Tasks long enough to stream, short enough that no thread waits for another.
  constexpr int64_t width = 16384;
  const int64_t parts = (call.D + width - 1) / width;
  const AlignedFloats scratch(plan.scratch_floats * threads);
  std::atomic<bool> numbers{true};
  parallel_for(static_cast<int>(call.B * parts), threads, [&](int task, int thread) {
    const int64_t begin = task % parts * width;
    float* own = scratch.data() + thread * plan.scratch_floats;
    if (!kernels.coordinates(call, static_cast<int>(task / parts), begin, std::min(call.D, begin + width),
                             exchanges.data(), count, own))
      numbers = false;
  });
  return numbers;
}

}  // namespace anabranch
