#include "field_coding.h"

#include <algorithm>
#include <cstring>

#include "aligned.h"
#include "isa.h"
#include "parallel.h"

namespace anabranch {

const FieldKernels& field_generic_kernels();
#if defined(__x86_64__)
const FieldKernels& field_avx2_kernels();
const FieldKernels& field_avx512_kernels();
const FieldKernels& field_avx512_ifma_kernels();
#endif

namespace {

constexpr int64_t kColumns = 2048;    // of a task of a product: enough to stream, few enough to share among threads
constexpr int64_t kPlaces = 1 << 16;  // of a sum over few columns, for one task, at least

std::vector<FieldIsa> find_isas() {
  std::vector<FieldIsa> isas{FieldIsa::generic};
#if defined(__x86_64__)
  if (is_supported(Isa::avx2)) isas.push_back(FieldIsa::avx2);
  if (is_supported(Isa::avx512)) isas.push_back(FieldIsa::avx512);
  if (is_supported(Isa::avx512) && __builtin_cpu_supports("avx512ifma")) isas.push_back(FieldIsa::avx512_ifma);
#endif
  return isas;
}

// Scratch memory of one task.
uint64_t* words_of(const AlignedFloats& scratch, int64_t words, int thread) {
  return reinterpret_cast<uint64_t*>(scratch.data()) + words * thread;
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

void multiply_columns(const FieldProduct& call, const FieldKernels& kernels, int threads) {
  const AlignedFloats factors(2 * kernels.factor_words(call));
  kernels.prepare(call, words_of(factors, 0, 0));
  const int64_t words = round_up(kernels.scratch_words(call), 8);
  const AlignedFloats scratch(2 * words * threads);
  const int64_t tasks = (call.L + kColumns - 1) / kColumns;
  parallel_for(static_cast<int>(tasks), threads, [&](int task, int thread) {
    const int64_t begin = task * kColumns;
    kernels.columns(call, words_of(factors, 0, 0), begin, std::min(call.L, begin + kColumns),
                    words_of(scratch, words, thread));
  });
}

// Sums of several tasks are added up by one more product, with a row of ones.
void multiply_across(const FieldProduct& call, const FieldKernels& kernels, int threads) {
  const int64_t tasks = std::clamp<int64_t>(call.U / kPlaces, 1, 4 * threads);
  const int64_t width = round_up((call.U + tasks - 1) / tasks, 16), size = call.M * call.L, bytes = size_of(call.field);
  const int64_t words = round_up(kernels.across_words(call), 8);
  const AlignedFloats scratch(2 * words * threads);
  std::vector<char> sums(tasks * size * bytes);
  parallel_for(static_cast<int>(tasks), threads, [&](int task, int thread) {
    const int64_t begin = std::min(call.U, task * width), end = std::min(call.U, begin + width);
    kernels.across(call, begin, end, words_of(scratch, words, thread), sums.data() + task * size * bytes);
  });
  if (tasks == 1) {
    std::memcpy(call.out, sums.data(), sums.size());
    return;
  }
  const uint64_t one = 1;  // of 32 or 64 bits, on little-endian machines
  multiply_columns({call.field, &one, 0, 0, sums.data(), size, 1, call.out, 1, tasks, size}, kernels, 1);
}

}  // namespace

// CPUID is looked at once: in a virtual machine every question leaves it, for tens of microseconds.
const std::vector<FieldIsa>& supported_field_isas() {
  static const std::vector<FieldIsa> isas = find_isas();
  return isas;
}

const FieldKernels& field_kernels_for(FieldIsa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case FieldIsa::avx2: return field_avx2_kernels();
    case FieldIsa::avx512: return field_avx512_kernels();
    case FieldIsa::avx512_ifma: return field_avx512_ifma_kernels();
    default: break;
  }
#endif
  return field_generic_kernels();
}

void field_multiply(const FieldProduct& call, FieldIsa isa, int threads) {
  if (call.M == 0 || call.L == 0) return;
  const FieldKernels& kernels = field_kernels_for(isa);
  if (call.x_column == 1) return multiply_columns(call, kernels, threads);
  multiply_across(call, kernels, threads);
}

}  // namespace anabranch
