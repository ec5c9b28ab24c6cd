// Between real numbers, bytes and elements of a field, in vectors of float64 (R) and of elements (S). No element decides
// a branch or an address; where words of a stream are refused, how many says nothing about those that are kept.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "field_coding.h"

namespace anabranch {
namespace {

struct Lanes1 {
  template <class Element>
  static Element* keep_below(Element a, Element p, Element* to) {
    *to = a;
    return to + (a < p);
  }
};

// W numbers from `p` on, of which `count` exist; the others are zero.
template <class T, int W, class Body>
[[gnu::always_inline]] inline void with_whole(const T* p, int64_t count, Body&& body) {
  if (__builtin_expect(count >= W, 1)) return body(p);
  T some[W] = {};
  for (int64_t k = 0; k < W; ++k)
    if (k < count) some[k] = p[k];
  body(some);
}

template <class R, class Prime>
struct NumberKernel {
  using Element = typename Prime::Element;
  static constexpr int W = R::W;
  const Prime& prime;

  template <class T, bool dithered>
  void quantise(const QuantiseCall& call, int64_t begin, int64_t end, int64_t* counts) const {
    const auto clip = R::set(call.clip), scale = R::set(call.scale);
    const auto infinity = R::set(std::numeric_limits<double>::infinity());
    const T* x = static_cast<const T*>(call.x);
    Element* out = static_cast<Element*>(call.out);
    int64_t clipped = 0, not_finite = 0;
    for (int64_t i = begin; i < end; i += W) {
      const auto number = [&](const T* from) __attribute__((always_inline)) {
        typename R::R value = R::load(from);
        const auto magnitude = R::magnitude(value);
        clipped += R::count_above(magnitude, clip);
        not_finite += R::count_not_below(magnitude, infinity);
        value = R::mul(R::clamp(value, clip), scale);
        if constexpr (dithered)
          with_whole<double, W>(call.dither + i, end - i, [&](const double* dither) __attribute__((always_inline)) {
            value = R::floor(R::add(value, R::load(dither)));
          });
        else
          value = R::nearest(value);
        if (__builtin_expect(end - i >= W, 1)) return R::store_element(value, prime.p, out + i);
        Element some[W];
        R::store_element(value, prime.p, some);
        std::copy_n(some, end - i, out + i);
      };
      with_whole<T, W>(x + i, end - i, number);
    }
    counts[0] += clipped, counts[1] += not_finite;
  }

  void dequantise(const DequantiseCall& call, int64_t begin, int64_t end) const {
    const auto divisor = R::set(call.divisor);
    const Element* x = static_cast<const Element*>(call.x);
    for (int64_t i = begin; i < end; i += W)
      with_whole<Element, W>(x + i, end - i, [&](const Element* from) __attribute__((always_inline)) {
        const auto value = R::div(R::load_element(from, prime.p), divisor);
        if (__builtin_expect(end - i >= W, 1)) return R::store(call.out + i, value);
        double some[W];
        R::store(some, value);
        std::copy_n(some, end - i, call.out + i);
      });
  }
};

// Words [begin, end) of the stream that are below p once masked, from out + begin on; returns how many. Whole vectors are
// written: never beyond out + end, since no more words are kept than were read.
template <class S, class Prime>
int64_t accept_words(const Prime& prime, const AcceptCall& call, int64_t begin, int64_t end) {
  using Element = typename Prime::Element;
  constexpr Element mask = Prime::bits == 8 * sizeof(Element) ? ~Element{0} : (Element{1} << Prime::bits) - 1;
  const char* words = static_cast<const char*>(call.stream);
  Element* const out = static_cast<Element*>(call.out) + begin;
  Element* to = out;
  int64_t i = begin;
  if constexpr (!std::is_same_v<S, Lanes1>) {
    constexpr int W = S::W * 8 / sizeof(Element);
    const auto masks = sizeof(Element) == 4 ? S::set_half(static_cast<uint32_t>(mask)) : S::set(mask);
    for (; i + W <= end; i += W)
      to = S::keep_below(S::both(S::load(words + i * sizeof(Element)), masks), static_cast<Element>(prime.p), to);
  }
  for (; i < end; ++i) {
    Element word;
    std::memcpy(&word, words + i * sizeof(Element), sizeof(Element));
    to = Lanes1::keep_below(static_cast<Element>(word & mask), static_cast<Element>(prime.p), to);
  }
  return to - out;
}

// Calls body with a null pointer to the type of the numbers.
template <class Body>
void with_real(Real type, Body&& body) {
  switch (type) {
    case Real::f64: return body(static_cast<const double*>(nullptr));
    case Real::f32: return body(static_cast<const float*>(nullptr));
    case Real::bf16: return body(static_cast<const bfloat16*>(nullptr));
    case Real::f16: return body(static_cast<const float16*>(nullptr));
  }
}

}  // namespace
}  // namespace anabranch
