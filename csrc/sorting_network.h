// Sorting networks: a fixed list of exchanges that sorts n values whatever they are, so that vectors of values are
// sorted lane by lane. Batcher's merge exchange (Knuth, The Art of Computer Programming 3, 5.2.2, algorithm M).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace anabranch {

// The lower of two values goes to place `low`, the higher to `high`.
struct Exchange {
  int32_t low, high;
};

// The exchanges that sort n values of which those `sorted` places apart, a power of two, are sorted already; none are
// if that is n or more.
template <class Visit>
constexpr void each_exchange(int n, int sorted, Visit&& visit) {
  int top = 1;
  while (top < n) top *= 2;
  for (int p = (sorted < n ? sorted : top) / 2; p > 0; p /= 2)
    for (int q = top / 2, r = 0, d = p;; d = q - p, q /= 2, r = p) {
      for (int i = 0; i < n - d; ++i)
        if ((i & p) == r) visit(Exchange{i, i + d});
      if (q == p) break;
    }
}

// The exchanges that sort n values, for compilers to unroll.
template <int n>
struct SortingNetwork {
  static constexpr int count() {
    int count = 0;
    each_exchange(n, n, [&](Exchange) { ++count; });
    return count;
  }
  static constexpr std::array<Exchange, count()> list() {
    std::array<Exchange, count()> list{};
    size_t size = 0;
    each_exchange(n, n, [&](Exchange exchange) { list[size++] = exchange; });
    return list;
  }
  static constexpr std::array<Exchange, count()> exchanges = list();
};

}  // namespace anabranch
