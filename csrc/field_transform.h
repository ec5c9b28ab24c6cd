// Number-theoretic transforms of columns, for any roots A (below): several columns to a vector, a tile of columns in the
// first cache for all steps. Values at the subgroup become coefficients in bit-reversed order (decimation in frequency);
// these are multiplied with powers of the generator and spread over the larger size, where they already are the first
// steps' results, since all other coefficients are zero; what is left of the second transform (decimation in time) ends
// in natural order. So nothing is ever permuted.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "field_coding.h"
#include "field_sums.h"

namespace anabranch {
namespace {

// Primes below 2^31: 2 S::W columns to a vector, Montgomery products with roots in that form.
template <class S>
struct Roots31 {
  using V = typename S::V;
  using Element = uint32_t;
  static constexpr int W = 2 * S::W;
  struct Factor { V root; };

  explicit Roots31(const Prime31& prime) : p(S::set_half(prime.p)), inverse(S::set(prime.inverse)) {}

  static V load(const Element* p) { return S::load(p); }
  static void store(Element* p, V a) { S::store(p, a); }
  static Factor factor(Element root) { return {S::set(root)}; }
  V add(V a, V b) const {
    const V s = S::add_halves(a, b);
    return S::smaller_halves(s, S::sub_halves(s, p));
  }
  V sub(V a, V b) const {
    const V s = S::sub_halves(a, b);
    return S::smaller_halves(s, S::add_halves(s, p));
  }
  V mul(V a, const Factor& f) const {  // a below 2^32
    const V even = S::mul(a, f.root), odd = S::mul(S::template right<32>(a), f.root);
    const V below_even = S::mul(S::mul(even, inverse), p), below_odd = S::mul(S::mul(odd, inverse), p);
    // The lower halves are equal, so the difference of the upper ones is exact.
    const V t = S::upper_halves(S::sub(even, below_even), S::sub(odd, below_odd));
    return S::smaller_halves(t, S::add_halves(t, p));
  }
  V sub_mul(V a, V b, const Factor& f) const { return mul(S::add_halves(S::sub_halves(a, b), p), f); }

  V p, inverse;
};

// 2^64 - 2^32 + 1 by four products of halves.
template <class S>
struct Roots64 {
  using V = typename S::V;
  using Element = uint64_t;
  using Tail = Tail64<S>;
  static constexpr int W = S::W;
  struct Factor { V low, high; };

  explicit Roots64(const Prime64&) {}

  static V load(const Element* p) { return S::load(p); }
  static void store(Element* p, V a) { S::store(p, a); }
  static Factor factor(Element root) { return {S::set(root), S::set(root >> 32)}; }
  static V add(V a, V b) { return Tail::plus(a, b); }
  static V sub(V a, V b) { return Tail::minus(a, b); }
  static V mul(V a, const Factor& f) {
    const V high = S::template right<32>(a), half = S::set(0xffffffffu);
    const V low_low = S::mul(a, f.low), high_high = S::mul(high, f.high);
    const V middle = S::add(S::mul(high, f.low), S::template right<32>(low_low));  // below 2^64
    const V other = S::add(S::mul(a, f.high), S::both(middle, half));
    const V low = S::add(S::template left<32>(other), S::both(low_low, half));
    const V top = S::add(high_high, S::add(S::template right<32>(middle), S::template right<32>(other)));
    return Tail::reduce(top, Tail::canonical(low));
  }
  static V sub_mul(V a, V b, const Factor& f) { return mul(sub(a, b), f); }
};

// One element at a time.
template <class Prime>
struct PlainRoots {
  using Element = typename Prime::Element;
  using V = Element;
  using Factor = Element;
  static constexpr int W = 1;

  explicit PlainRoots(const Prime& prime) : scalar(prime) {}

  static V load(const Element* p) { return *p; }
  static void store(Element* p, V a) { *p = a; }
  static Factor factor(Element root) { return root; }
  V add(V a, V b) const { return scalar.add(a, b); }
  V sub(V a, V b) const { return scalar.sub(a, b); }
  V mul(V a, Factor f) const { return scalar.mul(a, f); }
  V sub_mul(V a, V b, Factor f) const { return mul(sub(a, b), f); }

  Prime scalar;
};

template <class A>
class TransformKernel {
  using Element = typename A::Element;
  static constexpr int W = A::W;
  static constexpr int64_t kTileBytes = 32768;

 public:
  TransformKernel(const TransformCall& call, const A& roots) : c_(call), a_(roots) {}

  int64_t scratch_words() const { return (c_.coset_order * stride() * int64_t{sizeof(Element)} + 7) / 8 + 8; }

  void columns(const TransformRoots<Element>& roots, int64_t begin, int64_t end, uint64_t* scratch) const {
    Element* rows = reinterpret_cast<Element*>(scratch);
    for (int64_t column = begin; column < end; column += tile()) {
      const int64_t width = std::min(tile(), end - column), vectors = (width + W - 1) / W;
      load(rows, column, width);
      for (int64_t length = c_.order; length > 1; length /= 2) down(rows, length, roots.inverse.data(), vectors);
      spread(rows, roots.twist.data(), vectors);
      for (int64_t length = 2 * (c_.coset_order / c_.order); length <= c_.coset_order; length *= 2)
        up(rows, length, roots.forward.data(), vectors);
      for (int64_t n = 0; n < c_.N; ++n)
        std::memcpy(static_cast<Element*>(c_.out) + n * c_.L + column, rows + n * stride(), width * sizeof(Element));
    }
  }

 private:
  int64_t tile() const {
    const int64_t row = kTileBytes / (c_.coset_order * int64_t{sizeof(Element)});
    return std::clamp<int64_t>(row / W * W, W, 8 * W);
  }

  // A vector more: rows that meet must not lie 4096 bytes apart, or loads wait for stores they have nothing to do with.
  int64_t stride() const { return tile() + W; }

  void load(Element* rows, int64_t column, int64_t width) const {
    for (int64_t u = 0; u < c_.order; ++u) {
      Element* to = rows + u * stride();
      const Element* from = static_cast<const Element*>(c_.x) + u * c_.x_row + column;
      if (u < c_.U) {
        std::memcpy(to, from, width * sizeof(Element));
        for (int64_t k = 0; k < width; k += 64 / sizeof(Element)) ask_for(from + width + k);  // the next tile
      }
      std::fill(to + (u < c_.U ? width : 0), to + tile(), Element{0});
    }
  }

  // (a, b) -> (a + b, (a - b) root), pairs length / 2 apart
  [[gnu::noinline]] void down(Element* rows, int64_t length, const Element* roots, int64_t vectors) const {
    const A a_ = this->a_;  // in registers: the rows that are written could alias it
    const int64_t half = length / 2, step = c_.order / length, stride = this->stride();
    for (int64_t j = 0; j < half; ++j) {
      const auto factor = A::factor(roots[j * step]);
      for (int64_t row = j; row < c_.order; row += length) {
        Element *first = rows + row * stride, *second = first + half * stride;
        for (int64_t v = 0; v < vectors * W; v += W) {
          const auto a = A::load(first + v), b = A::load(second + v);
          A::store(first + v, a_.add(a, b));
          A::store(second + v, j == 0 ? a_.sub(a, b) : a_.sub_mul(a, b, factor));
        }
      }
    }
  }

  // (a, b) -> (a + b root, a - b root)
  [[gnu::noinline]] void up(Element* rows, int64_t length, const Element* roots, int64_t vectors) const {
    const A a_ = this->a_;
    const int64_t half = length / 2, step = c_.coset_order / length, stride = this->stride();
    for (int64_t j = 0; j < half; ++j) {
      const auto factor = A::factor(roots[j * step]);
      for (int64_t row = j; row < c_.coset_order; row += length) {
        Element *first = rows + row * stride, *second = first + half * stride;
        for (int64_t v = 0; v < vectors * W; v += W) {
          const auto a = A::load(first + v), b = A::load(second + v), t = j == 0 ? b : a_.mul(b, factor);
          A::store(first + v, a_.add(a, t));
          A::store(second + v, a_.sub(a, t));
        }
      }
    }
  }

  [[gnu::noinline]] void spread(Element* rows, const Element* twist, int64_t vectors) const {
    const A a_ = this->a_;
    const int64_t copies = c_.coset_order / c_.order, stride = this->stride();
    for (int64_t m = c_.order - 1; m >= 0; --m) {  // from the end, so that none is overwritten before it is read
      const auto factor = A::factor(twist[m]);
      for (int64_t v = 0; v < vectors * W; v += W) {
        const auto value = a_.mul(A::load(rows + m * stride + v), factor);
        for (int64_t copy = 0; copy < copies; ++copy) A::store(rows + (m * copies + copy) * stride + v, value);
      }
    }
  }

  const TransformCall& c_;
  const A a_;
};

}  // namespace
}  // namespace anabranch
