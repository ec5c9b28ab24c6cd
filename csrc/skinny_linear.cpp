#include "skinny_linear.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "parallel.h"

namespace anabranch {

void skinny_linear(const LinearCall& call, Isa isa, int threads) {
  const Kernels& kernels = kernels_for(isa);
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  const int64_t bytes = (kernels.linear_scratch_floats(call) * 4 + 63) / 64 * 64;
  const std::unique_ptr<float, Free> packed(static_cast<float*>(std::aligned_alloc(64, std::max<int64_t>(bytes, 64))));
  kernels.linear_pack(call, packed.get());
  // Tasks of about 128 KiB of weight: long enough to stream, short enough that no thread waits for another.
  const int64_t row_bytes = std::max<int64_t>(1, call.in * size_of(call.weight_type));
  const int64_t rows = std::max<int64_t>(4, (128 * 1024 / row_bytes) / 4 * 4);
  parallel_for(static_cast<int>((call.out + rows - 1) / rows), threads, [&](int task, int) {
    kernels.linear_rows(call, packed.get(), task * rows, std::min<int64_t>(call.out, (task + 1) * rows));
  });
}

}  // namespace anabranch
