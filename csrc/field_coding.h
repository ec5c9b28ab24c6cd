// Arithmetic on long rows of elements of a prime field (field.h): exact, the same to the last bit in every instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "field.h"

namespace anabranch {

// Slowest first; what each needs beyond the one before: AVX2, AVX-512 F/BW/DQ/VL, AVX-512 IFMA.
enum class FieldIsa : int { generic = 0, avx2 = 1, avx512 = 2, avx512_ifma = 3 };

const std::vector<FieldIsa>& supported_field_isas();

// out[m, l] = sum over u of matrix[m, u] * x[u, l]. Strides count elements.
struct FieldProduct {
  Field field;
  const void* matrix;  // [M, U]
  int64_t matrix_row, matrix_column;
  const void* x;  // [U, L]
  int64_t x_row, x_column;
  void* out;  // [M, L], contiguous
  int64_t M, U, L;
};

// x_column must be 1, or x_row and matrix_column.
void field_multiply(const FieldProduct& call, FieldIsa isa, int threads);

enum class Real : int { f64 = 0, f32 = 1, bf16 = 2, f16 = 3 };

// out = x, held within +-clip, times scale, rounded to the nearest, half to even; with dither the floor of the sum.
struct QuantiseCall {
  Field field;
  const void* x;  // [size]
  Real type;
  const double* dither;  // [size], or null
  void* out;             // [size]
  int64_t size;
  double clip, scale;
};

struct Counts {
  int64_t clipped, not_finite;
};

Counts field_quantise(const QuantiseCall& call, FieldIsa isa, int threads);

// out = x / divisor, elements above (p - 1) / 2 as negative numbers
struct DequantiseCall {
  Field field;
  const void* x;  // [size]
  double* out;    // [size]
  int64_t size;
  double divisor;
};

void field_dequantise(const DequantiseCall& call, FieldIsa isa, int threads);

// The words of the stream, masked to the bits of p, that are below p. `out` has room for all of them.
struct AcceptCall {
  Field field;
  const void* stream;
  void* out;
  int64_t words;
};

int64_t field_accept(const AcceptCall& call, FieldIsa isa, int threads);  // returns how many

// Values at the subgroup of `order` points, zeros behind the first U, to values at the first N points of the coset of
// `coset_order` points: powers of two, order <= coset_order, U <= order, N <= coset_order. Not for M31 and F50.
struct TransformCall {
  Field field;
  const void* x;  // [U, L], rows contiguous
  int64_t x_row;
  void* out;  // [N, L], contiguous
  int64_t U, N, L, order, coset_order;
};

void field_transform(const TransformCall& call, FieldIsa isa, int threads);

// Factors of a transform, in the form that multiplication wants them (Montgomery's, where there is one).
template <class Element>
struct TransformRoots {
  std::vector<Element> inverse;  // [order / 2] powers of the inverse root of the subgroup
  std::vector<Element> twist;    // [order] generator^m / order, m bit-reversed
  std::vector<Element> forward;  // [coset_order / 2] powers of the root of the coset's subgroup
};

// One row of function pointers for each instruction set. Scratch memory comes from the caller, 64-byte aligned.
struct FieldKernels {
  int64_t (*factor_words)(const FieldProduct&);
  void (*prepare)(const FieldProduct&, uint64_t* factors);
  int64_t (*scratch_words)(const FieldProduct&);
  void (*columns)(const FieldProduct&, const uint64_t* factors, int64_t begin, int64_t end, uint64_t* scratch);
  int64_t (*across_words)(const FieldProduct&);
  void (*across)(const FieldProduct&, int64_t begin, int64_t end, uint64_t* scratch, void* sums);
  int64_t (*transform_words)(const TransformCall&);
  void (*transform)(const TransformCall&, const void* roots, int64_t begin, int64_t end, uint64_t* scratch);
  void (*quantise)(const QuantiseCall&, int64_t begin, int64_t end, int64_t* counts);
  void (*dequantise)(const DequantiseCall&, int64_t begin, int64_t end);
  int64_t (*accept)(const AcceptCall&, int64_t begin, int64_t end);
};

const FieldKernels& field_kernels_for(FieldIsa isa);

}  // namespace anabranch
