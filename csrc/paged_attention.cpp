// The plan of a paged-attention call: which work items there are, who does them, and how parts are put together.
//
// Sequences with few new tokens (decoding) are cut along the cache into parts, whose results are merged by their
// log-sum-exps in a fixed order; a part takes all heads, for in a page they lie side by side, and memory is fastest
// where a thread reads on and on. Long ones (prefill) are cut along their new tokens and by groups of heads. Both cuts
// depend on the sequence alone, so a result depends neither on the batch around it nor on the number of threads.
#include "paged_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "aligned.h"
#include "parallel.h"
#include "store_row.h"

namespace anabranch {
namespace {

constexpr int kPartBytes = 640 * 1024, kPartTokens = 256;  // of a part, about and at least: its result is 1 % of that
constexpr int kFewTokens = 16;  // up to so many new tokens the cache is cut, above the new tokens are
constexpr int kRows = 512;      // query rows of a prefill item: tiles of K and V are unpacked once for so many
constexpr int kSelectiveTokens = 4;  // new tokens of a selective item: it holds all their scores

// Scratch memory of every thread of a call.
class Scratch {
 public:
  Scratch(int threads, int64_t floats) : stride_((floats + 15) / 16 * 16), memory_(stride_ * threads) {}
  float* of(int thread) const { return memory_.data() + stride_ * thread; }

 private:
  int64_t stride_;
  AlignedFloats memory_;
};

std::string check_tables(const AttentionCall& c) {
  const auto text = [](int64_t n) { return std::to_string(n); };
  if (c.cu_seqlens_q[0] != 0 || c.cu_seqlens_q[c.B] != c.T)
    return "cu_seqlens_q must run from 0 to T=" + text(c.T) + ", got " + text(c.cu_seqlens_q[0]) + " to " +
           text(c.cu_seqlens_q[c.B]);
  for (int b = 0; b < c.B; ++b) {
    const std::string where = " at sequence " + text(b);
    const int64_t length = c.seq_lens[b], most = int64_t{c.max_pages} * c.page;
    const int64_t fresh = int64_t{c.cu_seqlens_q[b + 1]} - c.cu_seqlens_q[b];
    if (fresh < 0)
      return "cu_seqlens_q must not decrease, got " + text(c.cu_seqlens_q[b]) + " then " + text(c.cu_seqlens_q[b + 1]) +
             where;
    if (length < 0 || length > most)
      return "seq_lens must lie in [0, max_pages * page = " + text(most) + "], got " + text(length) + where;
    if (0 < length && length < fresh)
      return "seq_lens counts the new tokens too, got " + text(length) + " with " + text(fresh) + " new" + where;
    const int32_t* pages = c.page_table + b * c.table_row;
    const int64_t used = (length + c.page - 1) / c.page;
    for (int64_t i = 0; i < used; ++i)
      if (pages[i] < 0 || pages[i] >= c.P) {
        const auto range = std::minmax_element(pages, pages + used);
        return "page_table must lie in [0, P=" + text(c.P) + "), got [" + text(*range.first) + ", " +
               text(*range.second) + "]" + where;
      }
  }
  return {};
}

// A sequence whose parts wait to be merged; the item is the first of them.
struct Merge {
  int item, parts;
};

struct Plan {
  std::vector<AttentionItem> items;
  std::vector<Merge> merges;
  int64_t partial_floats = 0, scratch_floats = 0;
};

int64_t partial_floats(const AttentionCall& c, int tokens) { return int64_t{c.Hq} * tokens * (c.Dv + 2); }

// Cached tokens of a part: whole tiles, and as many as this shape of cache has in about kPartBytes.
int part_tokens(const AttentionCall& c) {
  const int64_t bytes = int64_t{c.Hk} * c.Dk * size_of(c.k_type) + int64_t{c.Hv} * c.Dv * size_of(c.v_type);
  return static_cast<int>(std::clamp<int64_t>(kPartBytes / std::max<int64_t>(bytes, 1) / 64 * 64, kPartTokens, 4096));
}

Plan make_plan(const AttentionCall& c, const Kernels& kernels) {
  Plan plan;
  const int heads = c.Hq / c.groups(), part = part_tokens(c);
  const auto reserve = [&](int groups, int tokens) {
    plan.scratch_floats = std::max(plan.scratch_floats, kernels.attention_scratch_floats(c, groups, tokens));
  };
  for (int b = 0; b < c.B; ++b) {
    const int fresh = c.cu_seqlens_q[b + 1] - c.cu_seqlens_q[b], length = c.seq_lens[b];
    if (fresh == 0 || length == 0) continue;
    const auto oldest = [&](int token) {  // the first cached token that new token `token` sees
      return c.window ? std::max(0, length - fresh + token - c.window + 1) : 0;
    };
    if (fresh <= kFewTokens) {
      reserve(c.groups(), fresh);
      const int first_part = oldest(0) / part, parts = (length + part - 1) / part - first_part;
      if (parts > 1) {
        plan.merges.push_back({static_cast<int>(plan.items.size()), parts});
        plan.partial_floats += partial_floats(c, fresh) * parts;
      }
      for (int i = first_part; i < first_part + parts; ++i)
        plan.items.push_back({b, 0, c.groups(), 0, fresh, std::max(i * part, oldest(0)), std::min((i + 1) * part, length),
                              nullptr});
    } else {
      const int tile = std::max(1, kRows / heads);
      reserve(1, std::min(tile, fresh));
      for (int last = fresh; last > 0; last -= tile)  // the longest first: they balance best
        for (int group = 0; group < c.groups(); ++group) {
          const int first = std::max(0, last - tile);
          plan.items.push_back({b, group, 1, first, last - first, oldest(first), length - fresh + last, nullptr});
        }
    }
  }
  return plan;
}

template <class Body>
void with_query_type(Type type, Body&& body) {
  with_type(type, [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    if constexpr (sizeof(T) != 1) body(static_cast<T*>(nullptr));  // queries are never int8
  });
}

// The rows of one query head.
void merge_parts(const AttentionCall& c, const AttentionItem* items, int parts, int head) {
  const AttentionItem& first = items[0];
  std::vector<float> sum(c.Dv);
  for (int row = head * first.tokens; row < (head + 1) * first.tokens; ++row) {
    const int64_t at = row * int64_t{c.Dv + 2};
    float highest = -INFINITY, total = 0.0f;
    for (int i = 0; i < parts; ++i) highest = std::max(items[i].partial[at], highest);
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int i = 0; i < parts; ++i) {
      const float* part = items[i].partial + at;
      if (part[1] == 0.0f) continue;  // this row sees nothing of the part
      const float weight = std::exp2(part[0] - highest);
      total += weight * part[1];
      for (int d = 0; d < c.Dv; ++d) sum[d] += weight * part[2 + d];
    }
    const int64_t to = (int64_t{c.cu_seqlens_q[first.sequence]} + row % first.tokens) * c.Hq + head;
    with_query_type(c.q_type, [&](auto* typed) {
      auto* out = static_cast<decltype(typed)>(c.out) + to * c.Dv;
      for (int d = 0; d < c.Dv; ++d) from_float(sum[d] / total, out + d);
    });
    c.lse[to] = (highest + std::log2(total)) * 0.6931471805599453f;
  }
}

// Indices of the `k` highest of n scores: candidates above a rising threshold are collected and thinned out.
void highest_scores(const float* scores, int n, int k, std::vector<int>& kept) {
  const auto higher = [&](int a, int b) { return scores[a] > scores[b] || (scores[a] == scores[b] && a < b); };
  float threshold = -INFINITY;
  kept.clear();
  for (int j = 0; j < n; ++j) {
    if (!(scores[j] > threshold)) continue;
    kept.push_back(j);
    if (static_cast<int>(kept.size()) >= 2 * k) {
      std::nth_element(kept.begin(), kept.begin() + (k - 1), kept.end(), higher);
      threshold = scores[kept[k - 1]];
      kept.resize(k);
    }
  }
  if (static_cast<int>(kept.size()) > k) {
    std::nth_element(kept.begin(), kept.begin() + (k - 1), kept.end(), higher);
    kept.resize(k);
  }
}

// Reads V only at each row's most probable tokens; scores holds a row of `stride` floats for each query row.
void attend_selected(const AttentionCall& c, const AttentionItem& item, const float* scores, int64_t stride) {
  const int heads = c.Hq / c.groups();
  const int32_t* pages = c.page_table + item.sequence * c.table_row;
  std::vector<int> kept;
  std::vector<float> sum(c.Dv);
  for (int row = 0; row < heads * item.tokens; ++row) {
    const float* s = scores + row * stride;
    const int head = item.first_group * heads + row / item.tokens, v_head = static_cast<int>(int64_t{head} * c.Hv / c.Hq);
    float highest = -INFINITY, total = 0.0f, kept_total = 0.0f;
    for (int j = item.begin; j < item.end; ++j) highest = std::max(highest, s[j]);
    for (int j = item.begin; j < item.end; ++j)
      if (s[j] != -INFINITY) total += std::exp2(s[j] - highest);
    highest_scores(s + item.begin, item.end - item.begin, std::min(c.v_top_k, item.end - item.begin), kept);
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int index : kept) {
      const int j = item.begin + index;
      const int64_t page = pages[j / c.page], slot = j % c.page;
      float p = std::exp2(s[j] - highest);
      kept_total += p;
      if (c.v_scales != nullptr) p *= c.v_scales[(page * c.Hv + v_head) * c.page + slot];
      with_type(c.v_type, [&](auto* typed) {
        const auto* v = static_cast<decltype(typed)>(c.v) + page * c.v_page + v_head * c.v_head + slot * c.v_slot;
        for (int d = 0; d < c.Dv; ++d) sum[d] += p * to_float(v[d]);
      });
    }
    // A score that is no number is never among the highest; it must spoil the row all the same.
    const float inverse = 1.0f / (c.renormalise && !std::isnan(total) ? kept_total : total);
    const int64_t to =
        (int64_t{c.cu_seqlens_q[item.sequence]} + item.first_token + row % item.tokens) * c.Hq + head;
    with_query_type(c.q_type, [&](auto* typed) {
      auto* out = static_cast<decltype(typed)>(c.out) + to * c.Dv;
      for (int d = 0; d < c.Dv; ++d) from_float(sum[d] * inverse, out + d);
    });
    c.lse[to] = (highest + std::log2(total)) * 0.6931471805599453f;
  }
}

void run_selective(const AttentionCall& c, const Kernels& kernels, int threads) {
  std::vector<AttentionItem> items;
  int64_t longest = 0;
  for (int b = 0; b < c.B; ++b) {
    const int fresh = c.cu_seqlens_q[b + 1] - c.cu_seqlens_q[b], length = c.seq_lens[b];
    if (length == 0) continue;
    for (int first = 0; first < fresh; first += kSelectiveTokens)
      for (int group = 0; group < c.groups(); ++group) {
        const int tokens = std::min(kSelectiveTokens, fresh - first);
        const int begin = c.window ? std::max(0, length - fresh + first - c.window + 1) : 0;
        items.push_back({b, group, 1, first, tokens, begin, length - fresh + first + tokens, nullptr});
      }
    longest = std::max<int64_t>(longest, length);
  }
  const Scratch scratch(threads, kernels.attention_scratch_floats(c, 1, kSelectiveTokens));
  const Scratch scores(threads, int64_t{c.Hq / c.groups()} * kSelectiveTokens * longest);
  parallel_for(static_cast<int>(items.size()), threads, [&](int task, int thread) {
    kernels.score(c, items[task], scratch.of(thread), scores.of(thread), longest);
    attend_selected(c, items[task], scores.of(thread), longest);
  });
}

void run(const AttentionCall& c, const Kernels& kernels, int threads) {
  Plan plan = make_plan(c, kernels);
  std::vector<float> partials(plan.partial_floats);
  float* next = partials.data();
  for (const Merge& merge : plan.merges)
    for (int i = merge.item; i < merge.item + merge.parts; ++i) {
      plan.items[i].partial = next;
      next += partial_floats(c, plan.items[i].tokens);
    }
  const int items = static_cast<int>(plan.items.size()), workers = std::min(threads, items);
  const Scratch scratch(workers, plan.scratch_floats);
  std::atomic<int> queue{0};
  // Every worker takes an item ahead of its time, so that it can ask the memory for it.
  parallel_for(workers, threads, [&](int, int thread) {
    for (int item = queue++, after; item < items; item = after) {
      after = queue++;
      kernels.attend(c, plan.items[item], after < items ? &plan.items[after] : nullptr, scratch.of(thread));
    }
  });
  parallel_for(static_cast<int>(plan.merges.size()) * c.Hq, threads, [&](int task, int) {
    const Merge& merge = plan.merges[task / c.Hq];
    merge_parts(c, &plan.items[merge.item], merge.parts, task % c.Hq);
  });
}

// One row of the cache: converted, or quantised to the int8 whose largest magnitude is 127.
template <class From, class To>
void store_row(const From* from, To* to, int n, float* scale) {
  if constexpr (sizeof(To) == 1) {
    float most = 0.0f;
    for (int d = 0; d < n; ++d) most = std::max(most, std::fabs(to_float(from[d])));
    *scale = quantisation_scale(most);
    for (int d = 0; d < n; ++d) to[d] = quantise(to_float(from[d]), *scale);
  } else if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, n * sizeof(To));
  } else {
    for (int d = 0; d < n; ++d) from_float(to_float(from[d]), to + d);
  }
}

}  // namespace

int AttentionCall::groups() const { return std::gcd(Hk, Hv); }

std::string paged_attention(const AttentionCall& call, Isa isa, int threads) {
  std::string wrong = check_tables(call);
  if (!wrong.empty()) return wrong;
  // Rows of padding sequences are nobody's work: they keep these values.
  std::memset(call.out, 0, int64_t{call.T} * call.Hq * call.Dv * size_of(call.q_type));
  std::fill_n(call.lse, int64_t{call.T} * call.Hq, -INFINITY);
  if (call.v_top_k > 0)
    run_selective(call, kernels_for(isa), threads);
  else
    run(call, kernels_for(isa), threads);
  return {};
}

std::string store_kv(const StoreCall& c, int threads) {
  const int64_t slots = int64_t{c.P} * c.page;
  for (int t = 0; t < c.T; ++t)
    if (c.slots[t] >= slots)
      return "slots must be below P * page = " + std::to_string(slots) + ", got " + std::to_string(c.slots[t]);
  const auto store = [&](int t, const void* from, Type from_type, int64_t from_stride, void* to, Type to_type,
                         int64_t to_page, int64_t to_head, int64_t to_slot, float* scales, int H, int D) {
    const int64_t page = c.slots[t] / c.page, slot = c.slots[t] % c.page;
    with_query_type(from_type, [&](auto* source) {
      with_type(to_type, [&](auto* target) {
        using To = std::remove_const_t<std::remove_pointer_t<decltype(target)>>;
        for (int h = 0; h < H; ++h)
          store_row(static_cast<decltype(source)>(const_cast<void*>(from)) + h * from_stride,
                    static_cast<To*>(to) + page * to_page + h * to_head + slot * to_slot, D,
                    scales == nullptr ? nullptr : scales + (page * H + h) * c.page + slot);
      });
    });
  };
  // Below 64 tokens waking a second thread costs more than the copies do.
  parallel_for(c.T, c.T < 64 ? 1 : threads, [&](int t, int) {
    if (c.slots[t] < 0) return;
    store(t, static_cast<const char*>(c.k) + t * c.k_token * size_of(c.k_type), c.k_type, c.k_head, c.k_cache,
          c.k_cache_type, c.k_page, c.k_cache_head, c.k_slot, c.k_scales, c.Hk, c.Dk);
    store(t, static_cast<const char*>(c.v) + t * c.v_token * size_of(c.v_type), c.v_type, c.v_head, c.v_cache,
          c.v_cache_type, c.v_page, c.v_cache_head, c.v_slot, c.v_scales, c.Hv, c.Dv);
  });
  return {};
}

}  // namespace anabranch
