#include "skinny_linear.h"

#include <algorithm>

#include "aligned.h"
#include "parallel.h"

namespace anabranch {

void skinny_linear(const LinearCall& call, Isa isa, int threads) {
  if (call.M == 0 || call.out == 0) return;
  const Kernels& kernels = kernels_for(isa);
  const AlignedFloats packed(kernels.linear_packed_floats(call));
  parallel_for((call.M + kGroupRows - 1) / kGroupRows, threads,
               [&](int group, int) { kernels.linear_pack(call, packed.data(), group); });
  // Tasks of about 256 KiB of weight: long enough to stream, short enough that no thread waits for another. Larger ones
  // where many rows of x pass: these are then read less often, and the weight still stays in the second cache.
  const int64_t row_bytes = std::max<int64_t>(1, call.in * size_of(call.weight_type));
  const int64_t bytes = (call.M > 64 ? 512 : 256) * 1024;
  const int64_t rows = std::max<int64_t>(32, bytes / row_bytes / 32 * 32);
  parallel_for(static_cast<int>((call.out + rows - 1) / rows), threads, [&](int task, int) {
    const int64_t begin = task * rows, end = std::min<int64_t>(call.out, begin + rows);
    kernels.linear_rows(call, packed.data(), begin, end);
  });
}

}  // namespace anabranch
