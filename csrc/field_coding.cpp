#include "field_coding.h"

#include <algorithm>
#include <atomic>
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

constexpr int64_t kColumns = 2048;      // of a task of a product: enough to stream, few enough to share among threads
constexpr int64_t kPlaces = 1 << 16;    // of a sum over few columns, for one task, at least
constexpr int64_t kElements = 1 << 16;  // of a task that handles one element after another

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

// body(begin, end) for pieces of [0, size).
template <class Body>
void in_pieces(int64_t size, int64_t piece, int threads, Body&& body) {
  parallel_for(static_cast<int>((size + piece - 1) / piece), threads,
               [&](int task, int) { body(task * piece, std::min(size, (task + 1) * piece)); });
}

// `count` powers of `base`, each times `first`, as factors.
template <class Prime>
std::vector<typename Prime::Element> powers(const Prime& prime, uint64_t base, uint64_t first, int64_t count) {
  using Element = typename Prime::Element;
  const Element factor = prime.to_factor(static_cast<Element>(base));
  std::vector<Element> result(count);
  Element power = static_cast<Element>(first);
  for (Element& entry : result) {
    entry = prime.to_factor(power);
    power = prime.mul(power, factor);
  }
  return result;
}

template <class Prime>
uint64_t power(const Prime& prime, uint64_t base, uint64_t exponent) {
  using Element = typename Prime::Element;
  Element result = 1, square = static_cast<Element>(base);
  for (; exponent; exponent >>= 1) {
    if (exponent & 1) result = prime.mul(result, prime.to_factor(square));
    square = prime.mul(square, prime.to_factor(square));
  }
  return result;
}

template <class Prime>
TransformRoots<typename Prime::Element> roots_of(const TransformCall& call, const Prime& prime) {
  using Element = typename Prime::Element;
  const auto root = [&](int64_t order) { return power(prime, prime.generator, (prime.p - 1) / order); };
  const auto inverse = [&](uint64_t x) { return power(prime, x, prime.p - 2); };
  TransformRoots<Element> roots;
  roots.inverse = powers(prime, inverse(root(call.order)), 1, call.order / 2);
  roots.forward = powers(prime, root(call.coset_order), 1, call.coset_order / 2);
  const std::vector<Element> twist = powers(prime, prime.generator, inverse(call.order), call.order);
  roots.twist.resize(call.order);
  for (int64_t m = 0; m < call.order; ++m) {
    int64_t reversed = 0;
    for (int64_t bit = 1; bit < call.order; bit *= 2) reversed = reversed * 2 + ((m & bit) != 0);
    roots.twist[reversed] = twist[m];
  }
  return roots;
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

Counts field_quantise(const QuantiseCall& call, FieldIsa isa, int threads) {
  const FieldKernels& kernels = field_kernels_for(isa);
  std::atomic<int64_t> clipped{0}, not_finite{0};
  in_pieces(call.size, kElements, threads, [&](int64_t begin, int64_t end) {
    int64_t counts[2] = {0, 0};
    kernels.quantise(call, begin, end, counts);
    clipped += counts[0], not_finite += counts[1];
  });
  return {clipped, not_finite};
}

void field_dequantise(const DequantiseCall& call, FieldIsa isa, int threads) {
  const FieldKernels& kernels = field_kernels_for(isa);
  in_pieces(call.size, kElements, threads, [&](int64_t begin, int64_t end) { kernels.dequantise(call, begin, end); });
}

// Every piece is kept where its words would stand if all were; then the pieces move together.
int64_t field_accept(const AcceptCall& call, FieldIsa isa, int threads) {
  const FieldKernels& kernels = field_kernels_for(isa);
  const int64_t piece = threads == 1 ? std::max<int64_t>(1, call.words) : kElements, bytes = size_of(call.field);
  std::vector<int64_t> kept((call.words + piece - 1) / piece);
  in_pieces(call.words, piece, threads,
            [&](int64_t begin, int64_t end) { kept[begin / piece] = kernels.accept(call, begin, end); });
  char* out = static_cast<char*>(call.out);
  int64_t count = 0;
  for (size_t i = 0; i < kept.size(); count += kept[i++])
    std::memmove(out + count * bytes, out + static_cast<int64_t>(i) * piece * bytes, kept[i] * bytes);
  return count;
}

void field_transform(const TransformCall& call, FieldIsa isa, int threads) {
  const FieldKernels& kernels = field_kernels_for(isa);
  const auto run = [&](const auto& roots) {
    const int64_t words = round_up(kernels.transform_words(call), 8);
    const AlignedFloats scratch(2 * words * threads);
    parallel_for(static_cast<int>((call.L + kColumns - 1) / kColumns), threads, [&](int task, int thread) {
      const int64_t begin = task * kColumns;
      kernels.transform(call, &roots, begin, std::min(call.L, begin + kColumns), words_of(scratch, words, thread));
    });
  };
  if (call.field == Field::goldilocks) return run(roots_of(call, Prime64()));
  run(roots_of(call, prime31(call.field)));
}

void field_multiply(const FieldProduct& call, FieldIsa isa, int threads) {
  if (call.M == 0 || call.L == 0) return;
  const FieldKernels& kernels = field_kernels_for(isa);
  if (call.x_column == 1) return multiply_columns(call, kernels, threads);
  multiply_across(call, kernels, threads);
}

}  // namespace anabranch
