#include "geometric_median.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "aligned.h"
#include "parallel.h"

namespace anabranch {
namespace {

constexpr int64_t kPartialSums = int64_t{1} << 23;  // float64 sums kept at a time, at most: 64 MiB
constexpr int64_t kParts = 64;                      // of a problem's columns: enough to share among many threads
constexpr int64_t kColumns = 8192;                  // of a part, at least: its sums are added up in the end

}  // namespace

void centred_gram(const GramCall& call, Isa isa, int threads) {
  if (call.B == 0 || call.N == 0) return;
  const Kernels& kernels = kernels_for(isa);
  // How the columns are cut depends on the sizes alone, so the bits of the sums do not depend on the threads.
  const int64_t square = int64_t{call.N} * call.N;
  const int64_t most = std::clamp<int64_t>(kPartialSums / square / call.B, 1, kParts);
  const int64_t width = std::max(kColumns, round_up((call.D + most - 1) / most, 1024));
  const int64_t parts = std::max<int64_t>(1, (call.D + width - 1) / width);
  std::vector<double> sums(parts * call.B * square);
  const int64_t floats = round_up(kernels.gram_scratch_floats(call), 16);
  const AlignedFloats scratch(floats * threads);
  parallel_for(static_cast<int>(call.B * parts), threads, [&](int task, int thread) {
    const int64_t begin = task % parts * width;
    kernels.gram(call, static_cast<int>(task / parts), begin, std::min(call.D, begin + width),
                 scratch.data() + thread * floats, sums.data() + task * square);
  });
  parallel_for(call.B * call.N, threads, [&](int task, int) {
    const int64_t b = task / call.N, i = task % call.N;
    double* gram = call.gram + b * square;
    for (int64_t j = i; j < call.N; ++j) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += sums[(b * parts + part) * square + i * call.N + j];
      gram[i * call.N + j] = gram[j * call.N + i] = sum;
    }
  });
}

void combine(const CombineCall& call, Isa isa, int threads) {
  const Kernels& kernels = kernels_for(isa);
  const int64_t bytes = size_of(call.type);
  std::vector<std::vector<Addend>> addends(call.B);
  for (int b = 0; b < call.B; ++b)
    for (int i = 0; i < call.N; ++i) {
      const float coefficient = static_cast<float>(call.coefficients[int64_t{b} * call.N + i]);
      const char* row = static_cast<const char*>(call.points) + (b * call.batch + i * call.row) * bytes;
      if (coefficient != 0) addends[b].push_back({row, coefficient});
    }
  // Tasks of about 64 KiB of each row: long enough to stream, short enough that no thread waits for another.
  constexpr int64_t width = 16384;
  const int64_t parts = (call.D + width - 1) / width;
  const int64_t floats = kernels.combine_scratch_floats();
  const AlignedFloats scratch(floats * threads);
  parallel_for(static_cast<int>(call.B * parts), threads, [&](int task, int thread) {
    const int b = static_cast<int>(task / parts);
    const int64_t begin = task % parts * width, end = std::min(call.D, begin + width);
    const std::vector<Addend>& rows = addends[b];
    if (rows.size() == 1 && rows[0].coefficient == 1)
      std::memcpy(static_cast<char*>(call.out) + (b * call.D + begin) * bytes, rows[0].row + begin * bytes,
                  (end - begin) * bytes);
    else
      kernels.combine(call, b, rows.data(), static_cast<int>(rows.size()), begin, end, scratch.data() + thread * floats);
  });
}

}  // namespace anabranch
