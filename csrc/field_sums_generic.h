// The same in plain C++: sums of 128 bits, and for the largest prime the carries beyond them.
#pragma once

#include <cmath>

#include "field_sums.h"
#include "scalar.h"

namespace anabranch {
namespace {

struct Reals1 {
  static constexpr int W = 1;
  using R = double;

  static R set(double x) { return x; }
  static R load(const double* p) { return *p; }
  template <class T>
  static R load(const T* p) { return static_cast<double>(to_float(*p)); }
  static void store(double* p, R a) { *p = a; }
  static R mul(R a, R b) { return a * b; }
  static R add(R a, R b) { return a + b; }
  static R div(R a, R b) { return a / b; }
  static R magnitude(R a) { return std::fabs(a); }
  static R clamp(R a, R limit) { return a > limit ? limit : a < -limit ? -limit : a; }
  static R nearest(R a) { return std::nearbyint(a); }
  static R floor(R a) { return std::floor(a); }
  static int64_t count_above(R a, R b) { return a > b; }
  static int64_t count_not_below(R a, R b) { return !(a < b); }
  template <class Element>
  static void store_element(R a, Element p, Element* to) {
    const int64_t v = static_cast<int64_t>(a);
    *to = static_cast<Element>(v) + (p & (Element{0} - static_cast<Element>(static_cast<uint64_t>(v) >> 63)));
  }
  static R load_element(const uint32_t* from, uint32_t p) {
    return static_cast<double>(static_cast<int32_t>(*from - (p & (0u - (*from > p / 2)))));
  }
  static R load_element(const uint64_t* from, uint64_t p) {
    return static_cast<double>(static_cast<int64_t>(*from - (p & (0u - uint64_t{*from > p / 2}))));
  }
};

template <class Prime>
struct WideSums {
  using Element = typename Prime::Element;
  using Wide = unsigned __int128;
  static constexpr int W = 1, kRows = 2, kWords = 1, kOtherWords = 1, kLimbs = 1, kStep = 1;
  static constexpr int kAcross = 1, kTerms = 4096;
  struct X { Element x; };
  struct Factor { Element m; };
  struct Sum { Wide sum; uint64_t carries; };
  struct Y { Element y; };

  explicit WideSums(const Prime& prime) : scalar(prime) {}

  static X load(const Element* p) { return {*p}; }
  static void keep(const X& x, uint64_t* to) { *to = x.x; }
  static X kept(const uint64_t* from) { return {static_cast<Element>(*from)}; }
  void prepare(Element m, uint64_t* limbs) const {
    if constexpr (sizeof(Element) == 4) *limbs = scalar.to_factor(m);
    else *limbs = m;
  }
  static Factor broadcast(const uint64_t* limbs) { return {static_cast<Element>(*limbs)}; }
  static Factor other(const Element* p) { return {*p}; }
  static void keep_other(const Factor& f, uint64_t* to) { *to = f.m; }
  static Factor kept_other(const uint64_t* from) { return broadcast(from); }
  Element finish(Element sum) const {
    if constexpr (sizeof(Element) == 4) return scalar.to_factor(sum);
    return sum;
  }
  static Sum zero() { return {0, 0}; }
  static void add(Sum& s, const X& x, const Factor& f) {
    const Wide product = static_cast<Wide>(x.x) * f.m;
    s.sum += product;
    if constexpr (std::is_same_v<Prime, Prime64>) s.carries += s.sum < product;
  }
  static void add_across(Sum& s, const X& x, const Factor& f) { add(s, x, f); }
  static void fold(Sum&) {}
  Y reduce(const Sum& s) const {
    const uint64_t low = static_cast<uint64_t>(s.sum), high = static_cast<uint64_t>(s.sum >> 64);
    if constexpr (std::is_same_v<Prime, Prime31>) {  // high < 2^10
      const uint64_t middle = low >> 32;
      const uint64_t total = (low & 0xffffffffu) + middle * scalar.power_32 + high * scalar.power_64;
      const uint64_t limit = uint64_t{scalar.p} << 32;  // total < 2^63 + 2^42 < 2 * limit
      return {scalar.reduce(total < total - limit ? total : total - limit)};
    } else if constexpr (std::is_same_v<Prime, Prime50>) {
      return {scalar.reduce(s.sum)};
    } else {
      return {Prime64::sub(Prime64::reduce(high, low), s.carries << 32)};  // 2^128 = -2^32
    }
  }
  Y plus(const Y& a, const Y& b) const { return {scalar.add(a.y, b.y)}; }
  static Y again(const Element* p) { return {*p}; }
  static void store(Element* p, const Y& y) { *p = y.y; }

  Prime scalar;
};

}  // namespace
}  // namespace anabranch
