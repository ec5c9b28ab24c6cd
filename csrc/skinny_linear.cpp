#include "skinny_linear.h"

#include <algorithm>
#include <vector>

#include "aligned.h"
#include "parallel.h"

namespace anabranch {

void skinny_linear(const LinearCall& call, Isa isa, int threads) {
  const Kernels& kernels = kernels_for(isa);
  std::vector<LinearCall> groups;  // of at most kMostRows rows of x
  for (int m = 0; m < call.M; m += kMostRows) {
    LinearCall group = call;
    group.x = static_cast<const char*>(call.x) + m * call.x_row * size_of(call.x_type);
    group.y = static_cast<char*>(call.y) + int64_t{m} * call.out * size_of(call.x_type);
    group.M = std::min(kMostRows, call.M - m);
    groups.push_back(group);
  }
  if (groups.empty()) return;
  const int64_t floats = (kernels.linear_scratch_floats(groups[0]) + 15) / 16 * 16;
  const AlignedFloats packed(floats * static_cast<int64_t>(groups.size()));
  parallel_for(static_cast<int>(groups.size()), threads,
               [&](int task, int) { kernels.linear_pack(groups[task], packed.data() + task * floats); });
  // Tasks of about 128 KiB of weight: long enough to stream, short enough that no thread waits for another, and small
  // enough for the second cache while one group after another passes.
  const int64_t row_bytes = std::max<int64_t>(1, call.in * size_of(call.weight_type));
  const int64_t rows = std::max<int64_t>(16, (128 * 1024 / row_bytes) / 16 * 16);
  parallel_for(static_cast<int>((call.out + rows - 1) / rows), threads, [&](int task, int) {
    const int64_t begin = task * rows, end = std::min<int64_t>(call.out, begin + rows);
    for (size_t group = 0; group < groups.size(); ++group)
      kernels.linear_rows(groups[group], packed.data() + group * floats, begin, end);
  });
}

}  // namespace anabranch
