// The two reads of N long rows that robust aggregation needs: the products of all pairs of them, and one sum of them.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"
#include "scalar.h"

namespace anabranch {

// Strides count elements; rows are contiguous. What is not finite in a centre counts as zero.
struct GramCall {
  const void* points;  // [B, N, D]
  Type type;           // of points and centre; f32, f16 or bf16
  int64_t batch, row;
  const void* centre;  // [B, D], or null for zero
  int64_t centre_batch;
  double* gram;  // [B, N, N], contiguous
  int B, N;
  int64_t D;
};

// gram[b, i, j] = <points[b, i] - centre[b], points[b, j] - centre[b]>
void centred_gram(const GramCall& call, Isa isa, int threads);

struct CombineCall {
  const void* points;  // [B, N, D]
  Type type;           // of points, centre and out; f32, f16 or bf16
  int64_t batch, row;
  const double* coefficients;  // [B, N], contiguous
  const void* centre;          // [B, D], or null for zero
  int64_t centre_batch;
  void* out;  // [B, D], contiguous
  int B, N;
  int64_t D;
};

// One row that takes part in a sum.
struct Addend {
  const char* row;
  float coefficient;
};

// out[b] = centre[b] + sum of coefficients[b, i] * (points[b, i] - centre[b]). Rows of coefficient 0 are not read; one
// row of coefficient 1 beside none else is copied.
void combine(const CombineCall& call, Isa isa, int threads);

}  // namespace anabranch
