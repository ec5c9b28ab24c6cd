// Low-rank adapters whose ranks are experts: every token picks its ranks, every token may have another adapter.
#pragma once

#include <cstdint>
#include <string>

#include "isa.h"
#include "scalar.h"

namespace anabranch {

// Rows of `width` elements, `row` elements apart; f32, f16 or bf16.
struct RowTable {
  const void* data;
  Type type;
  int64_t row;
  int width;
};

enum class Gate : int { constant = 0, softmax_topk = 1, sigmoid_renorm = 2, sigmoid_renorm_unbiased = 3 };

// Where one adapter lies, as in kernels/anabranch_kernels/rank_lora/op.py.
struct AdapterPlace {
  int32_t first_rank, ranks, first_row, rows, chosen, gate;
};

struct RankLoraCall {
  RowTable x, a, b, router;    // x [T, D], a [R, D], b [R, O], router [G, D], all of one type
  const float* bias;           // [G]
  const AdapterPlace* places;  // [A]
  const float* scales;         // [A]
  const int32_t* adapter_of;   // [T], -1 for none
  void* y;                     // [T, O], type of x, rows y_row elements apart
  int64_t y_row;
  int64_t* counts;  // [G]
  int32_t* picked;  // [T, chosen]
  float* gates;     // [T, chosen]
  float* h;         // [T, active]
  int T, adapters, ranks, groups, chosen, active;
  bool add;
};

// Writes y and all behind it; or with `add`, when what is behind y may be null, adds to y and leaves the rows of tokens
// without an adapter alone. Returns what is wrong with the numbers of adapters and rows, or nothing.
std::string rank_lora(const RankLoraCall& call, Isa isa, int threads);

// Lists of rows of a table: row index[j] for j in [offsets[n], offsets[n + 1]) belongs to list n.
struct RowLists {
  RowTable rows;
  const int64_t* offsets;  // [lists + 1]
  const int32_t* index;
  int lists;
};

// to[j] = <x[n], rows[index[j]]> for all j of list n.
void listed_dots(const RowLists& lists, const RowTable& x, float* to, Isa isa, int threads);

// y[n] = sum of factors[j] * rows[index[j]] over list n, in that order; [lists, width] floats.
void listed_sums(const RowLists& lists, const float* factors, float* y, Isa isa, int threads);

}  // namespace anabranch
