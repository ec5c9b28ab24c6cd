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

// One row of function pointers for each instruction set. Scratch memory comes from the caller, 64-byte aligned.
struct FieldKernels {
  int64_t (*factor_words)(const FieldProduct&);
  void (*prepare)(const FieldProduct&, uint64_t* factors);
  int64_t (*scratch_words)(const FieldProduct&);
  void (*columns)(const FieldProduct&, const uint64_t* factors, int64_t begin, int64_t end, uint64_t* scratch);
  int64_t (*across_words)(const FieldProduct&);
  void (*across)(const FieldProduct&, int64_t begin, int64_t end, uint64_t* scratch, void* sums);
};

const FieldKernels& field_kernels_for(FieldIsa isa);

}  // namespace anabranch
