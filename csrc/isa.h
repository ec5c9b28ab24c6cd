// Which instruction sets this CPU has, and the kernels compiled for each.
#pragma once

#include <cstdint>
#include <vector>

#include "scalar.h"

namespace anabranch {

// Slowest first. `avx512_bf16_emulated` runs the code of `avx512_bf16` with its one special instruction (vdpbf16ps)
// spelt out, so that tests reach that code on CPUs without it; it is never chosen by itself.
enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4, avx512_bf16_emulated = 5 };

// What this CPU and system can run and this build contains, slowest first, without the emulated one.
const std::vector<Isa>& supported_isas();
bool is_supported(Isa isa);

struct AttentionCall;
struct AttentionItem;
struct LinearCall;
struct GramCall;
struct CombineCall;
struct Addend;
struct CoordinateCall;
struct CoordinatePlan;
struct Exchange;
struct RowTable;
struct AdapterPlace;
struct Perceptron;
struct PerceptronCall;
struct Sgd;

// A row of those for perceptrons; scratch and states are theirs, of `floats`.
struct PerceptronKernels {
  int64_t (*floats)(const Perceptron&);
  void (*epoch)(const PerceptronCall&, int64_t row, float* scratch);
  void (*load)(const Perceptron&, float* state, const float* row, const float* velocity);
  void (*unload)(const Perceptron&, float* state, float* row, float* velocity);
  void (*forward)(const Perceptron&, float* state, const float* x, int samples, float* logits, float* features);
  void (*step)(const Perceptron&, const Sgd&, float* state, const float* logits, const float* features, int samples);
};

// One row of function pointers for each instruction set. Scratch memory comes from the caller, 64-byte aligned.
struct Kernels {
  int64_t (*attention_scratch_floats)(const AttentionCall&, int groups, int tokens);
  void (*attend)(const AttentionCall&, const AttentionItem&, const AttentionItem* after, float* scratch);
  void (*score)(const AttentionCall&, const AttentionItem&, float* scratch, float* scores, int64_t scores_stride);
  int64_t (*linear_packed_floats)(const LinearCall&);
  void (*linear_pack)(const LinearCall&, float* packed, int group);
  void (*linear_rows)(const LinearCall&, const float* packed, int64_t row_begin, int64_t row_end);
  int64_t (*gram_scratch_floats)(const GramCall&);
  void (*gram)(const GramCall&, int b, int64_t begin, int64_t end, float* scratch, double* sums);
  int64_t (*combine_scratch_floats)();
  void (*combine)(const CombineCall&, int b, const Addend*, int addends, int64_t begin, int64_t end, float* scratch);
  // The next three up to AVX-512; null above.
  CoordinatePlan (*coordinate_plan)(const CoordinateCall&);
  bool (*coordinates)(const CoordinateCall&, int b, int64_t begin, int64_t end, const Exchange*, int64_t exchanges,
                      float* scratch);
  PerceptronKernels perceptron;
  void (*row_dots)(const RowTable&, const int32_t* index, int64_t index_row, int first, int count, const RowTable& x,
                   const int* token, int tokens, float* to, int64_t to_row);
  void (*row_sums)(const RowTable&, const int32_t* index, int first, const float* factors, int count, int begin, int end,
                   void* y, Type y_type, bool add);
  void (*route)(float* scores, const float* bias, const AdapterPlace&, int32_t* picked, float* gates);
  float (*read)(const void* data, int64_t bytes);
};

const Kernels& kernels_for(Isa isa);

}  // namespace anabranch
