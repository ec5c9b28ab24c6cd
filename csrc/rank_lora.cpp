#include "rank_lora.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "aligned.h"
#include "parallel.h"

namespace anabranch {
namespace {

constexpr int kTokens = 64, kFewTokens = 4;  // of a task: most, and fewest where there are more
constexpr int kColumns = 1024;  // of y that a task writes, where tokens alone are too few tasks

struct Item {
  int adapter, begin, end;  // of the tokens in their order
};

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

// Tokens that have an adapter, adapter by adapter, and tasks of some of them: as many as give every thread its share.
std::vector<Item> items_of(const RankLoraCall& call, int threads, std::vector<int>& order) {
  std::vector<int> first(call.adapters + 1);
  for (int t = 0; t < call.T; ++t)
    if (call.adapter_of[t] >= 0) ++first[call.adapter_of[t] + 1];
  for (int a = 0; a < call.adapters; ++a) first[a + 1] += first[a];
  order.resize(first.back());
  std::vector<int> next = first;
  for (int t = 0; t < call.T; ++t)
    if (call.adapter_of[t] >= 0) order[next[call.adapter_of[t]]++] = t;
  const int share = (first.back() + threads - 1) / threads, tokens = std::clamp(share, kFewTokens, kTokens);
  std::vector<Item> items;
  for (int a = 0; a < call.adapters; ++a)
    for (int at = first[a]; at < first[a + 1]; at += tokens)
      items.push_back({a, at, std::min(at + tokens, first[a + 1])});
  return items;
}

// The rows of `a` and `b` that token t uses; nothing where it uses all of its adapter's.
void list_ranks(const RankLoraCall& call, const AdapterPlace& place, int64_t t, int32_t* ranks) {
  if (static_cast<Gate>(place.gate) == Gate::constant) return;
  const int block = place.ranks / place.rows;
  for (int c = 0; c < place.chosen; ++c)
    for (int q = 0; q < block; ++q)
      ranks[c * block + q] = place.first_rank + call.picked[t * call.chosen + c] * block + q;
}

int active(const AdapterPlace& place) {
  return place.rows == 0 ? place.ranks : place.chosen * (place.ranks / place.rows);
}

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
  const std::vector<Item> items = items_of(call, threads, order);
  int widest = call.active, longest = 0;
  for (int a = 0; a < call.adapters; ++a) widest = std::max(widest, call.places[a].rows);
  for (const Item& item : items) longest = std::max(longest, item.end - item.begin);
  const int64_t lists = longest * round_up(widest, 16), floats = lists + longest * round_up(call.active, 16);
  const AlignedFloats scratch(floats * threads);
  const auto y_of = [&](int64_t t) { return static_cast<char*>(call.y) + t * call.y_row * size_of(call.b.type); };

  parallel_for(static_cast<int>(items.size()), threads, [&](int task, int thread) {
    const Item& item = items[task];
    const AdapterPlace& place = call.places[item.adapter];
    const int tokens = item.end - item.begin, ranks = active(place);
    float* sums = scratch.data() + thread * floats;
    int32_t* listed = reinterpret_cast<int32_t*>(sums + lists);
    const int* token = order.data() + item.begin;
    if (place.rows == 0) {
      kernels.row_dots(call.a, nullptr, 0, place.first_rank, ranks, call.x, token, tokens, sums, ranks);
      for (int m = 0; m < tokens; ++m) std::copy_n(sums + m * ranks, ranks, call.h + int64_t{token[m]} * call.active);
      return;
    }
    kernels.row_dots(call.router, nullptr, 0, place.first_row, place.rows, call.x, token, tokens, sums, place.rows);
    for (int m = 0; m < tokens; ++m) {
      const int64_t t = token[m];
      kernels.route(sums + m * place.rows, call.bias + place.first_row, place, call.picked + t * call.chosen,
                    call.gates + t * call.chosen);
      list_ranks(call, place, t, listed + m * ranks);
    }
    kernels.row_dots(call.a, listed, ranks, 0, ranks, call.x, token, tokens, sums, ranks);
    for (int m = 0; m < tokens; ++m) std::copy_n(sums + m * ranks, ranks, call.h + int64_t{token[m]} * call.active);
  });

  const int parts = static_cast<int>(items.size()) >= threads ? 1 : (call.b.width + kColumns - 1) / kColumns;
  const int width = parts == 1 ? call.b.width : kColumns;
  parallel_for(static_cast<int>(items.size()) * parts, threads, [&](int task, int thread) {
    const Item& item = items[task / parts];
    const AdapterPlace& place = call.places[item.adapter];
    const int ranks = active(place), block = place.rows == 0 ? 1 : place.ranks / place.rows;
    const float scale = call.scales[item.adapter];
    float* factors = scratch.data() + thread * floats;
    int32_t* listed = reinterpret_cast<int32_t*>(factors + lists);
    for (int m = 0; m < item.end - item.begin; ++m) {
      const int64_t t = order[item.begin + m];
      const float *h = call.h + t * call.active, *gates = call.gates + t * call.chosen;
      for (int i = 0; i < ranks; ++i)
        factors[m * ranks + i] = scale * h[i] * (place.rows == 0 ? 1.0f : gates[i / block]);
      list_ranks(call, place, t, listed + m * ranks);
    }
    const int begin = task % parts * width, end = std::min(begin + width, call.b.width);
    // Column block by column block: its pieces of all ranks stay in the first cache while the tokens pass.
    constexpr int piece = 128;
    for (int at = begin; at < end; at += piece)
      for (int m = 0; m < item.end - item.begin; ++m)
        kernels.row_sums(call.b, place.rows == 0 ? nullptr : listed + m * ranks, place.first_rank, factors + m * ranks,
                         ranks, at, std::min(at + piece, end), y_of(order[item.begin + m]), call.b.type, add);
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
  parallel_for(lists.lists, threads, [&](int n, int) {
    const int64_t begin = lists.offsets[n], count = lists.offsets[n + 1] - begin;
    if (count > 0)
      kernels.row_dots(lists.rows, lists.index + begin, 0, 0, static_cast<int>(count), x, &n, 1, to + begin, count);
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
