// y = x · weightᵀ + bias for few rows of x: the weight is read once, at the speed of memory.
#pragma once

#include <cstdint>

#include "isa.h"
#include "scalar.h"

namespace anabranch {

constexpr int kGroupRows = 16;  // of x: a group is packed by one task

// Strides count elements; rows are contiguous.
struct LinearCall {
  const void* x;  // [M, in]
  Type x_type;
  int64_t x_row;
  const void* weight;  // [out, in], type of x or int8 with scales
  Type weight_type;
  int64_t weight_row;
  const float* scales;  // [out] or null
  const void* bias;     // [out], type of x, or null
  void* y;              // [M, out], contiguous, type of x
  int M, in, out;
};

void skinny_linear(const LinearCall& call, Isa isa, int threads);

}  // namespace anabranch
