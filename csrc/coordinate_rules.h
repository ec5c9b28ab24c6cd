// Robust rules that work coordinate by coordinate: one read of N long rows.
#pragma once

#include <cstdint>

#include "isa.h"
#include "scalar.h"
#include "sorting_network.h"

namespace anabranch {

// Of the N values of a coordinate in ascending order; what they are is said in coordinate_rules/op.py.
enum class Rule : int { median = 0, trimmed_mean = 1, mean_around_median = 2, phocas = 3, sign_majority = 4 };

// Strides count elements; rows are contiguous.
struct CoordinateCall {
  const void* points;  // [B, N, D]
  Type type;           // of points and out; f32, f16 or bf16
  int64_t batch, row;
  void* out;  // [B, D], contiguous
  Rule rule;
  int f;  // how many values trimmed_mean leaves out at each end, the others in all; below N
  int B, N;
  int64_t D;
};

// How columns are sorted: `sequences` of values within the registers, each as many places apart, and from there on by
// exchanges of `lanes` columns.
struct CoordinatePlan {
  int sequences, lanes;
  int64_t scratch_floats;
};

// False if any of the points is NaN; what is in out says nothing then.
bool coordinate_rule(const CoordinateCall& call, Isa isa, int threads);

}  // namespace anabranch
