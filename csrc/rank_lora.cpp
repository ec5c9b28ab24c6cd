#include "rank_lora.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "aligned.h"
#include "parallel.h"

namespace anabranch {
namespace {

constexpr int kTokens = 8;      // of a task
constexpr int kColumns = 1024;  // of y that a task writes, where tokens alone are too few tasks

struct Item {
  int adapter, begin, end;  // of the tokens in their order
};

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

std::string what_is_wrong(const RankLoraCall& call) {
  for (int a = 0; a < call.adapters; ++a) {
    const AdapterPlace& place = call.places[a];
    if (place.first_rank + place.ranks > call.ranks || place.first_row + place.rows > call.groups)
      return "adapter " + std::to_string(a) + " has ranks up to " + std::to_string(place.first_rank + place.ranks) +
             " of " + std::to_string(call.ranks) + " and router rows up to " +
             std::to_string(place.first_row + place.rows) + " of " + std::to_string(call.groups);
  }
  for (int t = 0; t < call.T; ++t)
    if (call.adapter_of[t] >= call.adapters)
      return "token " + std::to_string(t) + " has adapter " + std::to_string(call.adapter_of[t]) + " of " +
             std::to_string(call.adapters);
  return {};
}

// Tokens that have an adapter, adapter by adapter, and tasks of at most kTokens of them.
std::vector<Item> items_of(const RankLoraCall& call, std::vector<int>& order) {
  std::vector<int> first(call.adapters + 1);
  for (int t = 0; t < call.T; ++t)
    if (call.adapter_of[t] >= 0) ++first[call.adapter_of[t] + 1];
  for (int a = 0; a < call.adapters; ++a) first[a + 1] += first[a];
  order.resize(first.back());
  std::vector<int> next = first;
  for (int t = 0; t < call.T; ++t)
    if (call.adapter_of[t] >= 0) order[next[call.adapter_of[t]]++] = t;
  std::vector<Item> items;
  for (int a = 0; a < call.adapters; ++a)
    for (int at = first[a]; at < first[a + 1]; at += kTokens)
      items.push_back({a, at, std::min(at + kTokens, first[a + 1])});
  return items;
}

// The rows of `a` and `b` that token t uses; null where it uses all of its adapter's.
const int32_t* ranks_of(const RankLoraCall& call, const AdapterPlace& place, int t, int32_t* ranks) {
  if (static_cast<Gate>(place.gate) == Gate::constant) return nullptr;
  const int block = place.ranks / place.rows;
  for (int c = 0; c < place.chosen; ++c)
    for (int q = 0; q < block; ++q)
      ranks[c * block + q] = place.first_rank + call.picked[int64_t{t} * call.chosen + c] * block + q;
  return ranks;
}

int active(const AdapterPlace& place) { return place.rows == 0 ? place.ranks : place.chosen * (place.ranks / place.rows); }

}  // namespace

std::string rank_lora(const RankLoraCall& asked, Isa isa, int threads) {
  const std::string wrong = what_is_wrong(asked);
  if (!wrong.empty()) return wrong;
  const Kernels& kernels = kernels_for(isa);
  RankLoraCall call = asked;
  const bool add = call.add;
  const int64_t most_picked = int64_t{call.T} * call.chosen, most_active = int64_t{call.T} * call.active;
  std::vector<int32_t> picked(add ? most_picked : 0);
  std::vector<float> kept(add ? most_picked + most_active : 0);
  if (add) call.picked = picked.data(), call.gates = kept.data(), call.h = kept.data() + most_picked;
  if (!add) {
    std::fill_n(call.counts, call.groups, 0);
    std::fill_n(call.picked, most_picked, -1);
    std::fill_n(call.gates, most_picked, 0.0f);
    std::fill_n(call.h, most_active, 0.0f);
  }
  std::vector<int> order;
  const std::vector<Item> items = items_of(call, order);
  const int64_t x_row = round_up(call.x.width, 16);
  const int64_t floats = kTokens * (x_row + round_up(std::max(call.groups, call.active), 16)) + round_up(call.active, 16);
  const AlignedFloats scratch(floats * threads);
  const auto y_of = [&](int64_t t) { return static_cast<char*>(call.y) + t * call.y_row * size_of(call.b.type); };

  parallel_for(static_cast<int>(items.size()), threads, [&](int task, int thread) {
    const Item& item = items[task];
    const AdapterPlace& place = call.places[item.adapter];
    const int tokens = item.end - item.begin, ranks = active(place);
    float* x = scratch.data() + thread * floats;
    float* sums = x + kTokens * x_row;
    int32_t* listed = reinterpret_cast<int32_t*>(sums + kTokens * round_up(std::max(call.groups, call.active), 16));
    for (int m = 0; m < tokens; ++m) kernels.widen_row(call.x, order[item.begin + m], x + m * x_row);
    if (place.rows == 0) {
      kernels.row_dots(call.a, nullptr, place.first_rank, ranks, x, x_row, tokens, sums, ranks);
      for (int m = 0; m < tokens; ++m)
        std::copy_n(sums + m * ranks, ranks, call.h + int64_t{order[item.begin + m]} * call.active);
      return;
    }
    kernels.row_dots(call.router, nullptr, place.first_row, place.rows, x, x_row, tokens, sums, place.rows);
    for (int m = 0; m < tokens; ++m) {
      const int64_t t = order[item.begin + m];
      kernels.route(sums + m * place.rows, call.bias + place.first_row, place, call.picked + t * call.chosen,
                    call.gates + t * call.chosen);
      const int32_t* rows = ranks_of(call, place, static_cast<int>(t), listed);
      kernels.row_dots(call.a, rows, 0, ranks, x + m * x_row, x_row, 1, call.h + t * call.active, ranks);
    }
  });

  const int parts = static_cast<int>(items.size()) >= threads ? 1 : (call.b.width + kColumns - 1) / kColumns;
  const int width = parts == 1 ? call.b.width : kColumns;
  parallel_for(static_cast<int>(items.size()) * parts, threads, [&](int task, int thread) {
    const Item& item = items[task / parts];
    const AdapterPlace& place = call.places[item.adapter];
    const int ranks = active(place), block = place.rows == 0 ? 1 : place.ranks / place.rows;
    const float scale = call.scales[item.adapter];
    float* factors = scratch.data() + thread * floats;
    int32_t* listed = reinterpret_cast<int32_t*>(factors + round_up(call.active, 16));
    const int begin = task % parts * width, end = std::min(begin + width, call.b.width);
    // Column block by column block: its pieces of all ranks stay in the first cache while the tokens pass.
    constexpr int piece = 128;
    for (int at = begin; at < end; at += piece)
      for (int m = item.begin; m < item.end; ++m) {
        const int64_t t = order[m];
        const float* h = call.h + t * call.active;
        for (int i = 0; i < ranks; ++i)
          factors[i] = scale * h[i] * (place.rows == 0 ? 1.0f : call.gates[t * call.chosen + i / block]);
        const int32_t* rows = ranks_of(call, place, static_cast<int>(t), listed);
        kernels.row_sums(call.b, rows, place.first_rank, factors, ranks, at, std::min(at + piece, end),
                         y_of(t), call.b.type, add);
      }
  });

  for (int t = 0; t < call.T && !add; ++t) {
    const int adapter = call.adapter_of[t];
    if (adapter < 0) {
      std::memset(y_of(t), 0, call.b.width * size_of(call.b.type));
      continue;
    }
    const AdapterPlace& place = call.places[adapter];
    for (int c = 0; c < place.chosen; ++c) ++call.counts[place.first_row + call.picked[int64_t{t} * call.chosen + c]];
  }
  return {};
}

void listed_dots(const RowLists& lists, const RowTable& x, float* to, Isa isa, int threads) {
  const Kernels& kernels = kernels_for(isa);
  const int64_t floats = round_up(x.width, 16);
  const AlignedFloats scratch(floats * threads);
  parallel_for(lists.lists, threads, [&](int n, int thread) {
    const int64_t begin = lists.offsets[n], count = lists.offsets[n + 1] - begin;
    if (count == 0) return;
    float* row = scratch.data() + thread * floats;
    kernels.widen_row(x, n, row);
    kernels.row_dots(lists.rows, lists.index + begin, 0, static_cast<int>(count), row, floats, 1, to + begin, count);
  });
}

void listed_sums(const RowLists& lists, const float* factors, float* y, Isa isa, int threads) {
  const Kernels& kernels = kernels_for(isa);
  parallel_for(lists.lists, threads, [&](int n, int) {
    const int64_t begin = lists.offsets[n], count = lists.offsets[n + 1] - begin;
    kernels.row_sums(lists.rows, lists.index + begin, 0, factors + begin, static_cast<int>(count), 0, lists.rows.width,
                     y + int64_t{n} * lists.rows.width, Type::f32, false);
  });
}

}  // namespace anabranch
