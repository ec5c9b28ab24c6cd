// Sums of products in the fields, in vector registers S (field_lanes_*.h) that multiply 32 by 32 bits. What every class
// of sums has, and what field_product.h relies on:
//
//   X, load           W elements of a row, cut in limbs; keep and kept: the same to and from a scratch of kWords words
//   Factor            what X is multiplied with: `broadcast` puts one element of the matrix in all lanes, from the kLimbs
//                     limbs that `prepare` made; `other` takes W elements, to be kept in kOtherWords
//   Sum, add          products are added without a carry; after kStep additions comes `fold`, after kTerms `reduce`
//   add_across        the same where lanes are to be added up in the end, into fewer registers: kAcross additions each
//   Y, reduce         W canonical elements; `again` and `plus` add them to earlier ones
//   finish            what a sum of products with `other` is to be multiplied with, multiplied
#pragma once

#include <cstdint>

#include "field.h"

namespace anabranch {
namespace {

// Asks for memory that is soon read, or written. Spelt out: GCC leaves out calls of functions that do nothing else.
inline void ask_for(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht0 %0" ::"m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p);
#endif
}
inline void ask_to_write(void* p) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" ::"m"(*static_cast<char*>(p)));
#else
  __builtin_prefetch(p, 1);
#endif
}

// Primes below 2^31: products of 62 bits, four to a lane, then the upper halves go to a sum of their own.
//
// X holds 2 W columns, even ones in the lower halves of `even`, odd ones in those of `odd`. Factors are in Montgomery
// form, so that one Montgomery reduction in the end gives the sum itself.
template <class S>
struct Sums31 {
  using V = typename S::V;
  using Element = uint32_t;
  static constexpr int W = 2 * S::W, kRows = S::kRows, kWords = 2 * S::W, kOtherWords = kWords, kLimbs = 1;
  static constexpr int kStep = 4, kAcross = 2, kTerms = 4096;
  struct X { V even, odd; };
  using Factor = X;
  struct Sum { V even, odd, even_high, odd_high; };
  struct Y { V y; };

  explicit Sums31(const Prime31& prime) : scalar(prime) {}

  X load(const Element* p) const {
    const V both = S::load(p);
    return {both, S::template right<32>(both)};  // products ignore the upper halves
  }
  static void keep(const X& x, uint64_t* to) { S::store(to, x.even), S::store(to + S::W, x.odd); }
  static X kept(const uint64_t* from) { return {S::load(from), S::load(from + S::W)}; }
  Factor other(const Element* p) const { return load(p); }
  static void keep_other(const Factor& f, uint64_t* to) { keep(f, to); }
  static Factor kept_other(const uint64_t* from) { return kept(from); }
  void prepare(Element m, uint64_t* limbs) const { *limbs = scalar.to_factor(m); }
  static Factor broadcast(const uint64_t* limbs) { return {S::set(*limbs), S::set(*limbs)}; }
  Element finish(Element sum) const { return scalar.to_factor(sum); }  // `other` factors are plain
  static Sum zero() { return {S::zero(), S::zero(), S::zero(), S::zero()}; }
  static void add(Sum& s, const X& x, const Factor& f) {
    s.even = S::add(s.even, S::mul(x.even, f.even));
    s.odd = S::add(s.odd, S::mul(x.odd, f.odd));
  }
  static void add_across(Sum& s, const X& x, const Factor& f) {
    s.even = S::add(s.even, S::mul(x.even, f.even));
    s.even = S::add(s.even, S::mul(x.odd, f.odd));
  }
  static void fold(Sum& s) { fold(s.even, s.even_high), fold(s.odd, s.odd_high); }
  Y reduce(Sum s) const {
    fold(s);
    const V even = narrow(s.even, s.even_high), odd = narrow(s.odd, s.odd_high);
    const V p = S::set_half(scalar.p), inverse = S::set(scalar.inverse);
    const V below_even = S::mul(S::mul(even, inverse), p), below_odd = S::mul(S::mul(odd, inverse), p);
    V high = S::upper_halves(even, odd);
    high = S::smaller_halves(high, S::sub_halves(high, p));
    const V t = S::sub_halves(high, S::upper_halves(below_even, below_odd));
    return {S::smaller_halves(t, S::add_halves(t, p))};
  }
  Y plus(const Y& a, const Y& b) const {
    const V s = S::add_halves(a.y, b.y);
    return {S::smaller_halves(s, S::sub_halves(s, S::set_half(scalar.p)))};
  }
  static Y again(const Element* p) { return {S::load(p)}; }
  static void store(Element* p, const Y& y) { S::store(p, y.y); }

  Prime31 scalar;

 private:
  static void fold(V& low, V& high) {
    high = S::add(high, S::template right<32>(low));
    low = S::both(low, S::set(0xffffffffu));
  }
  // low + high * 2^32 for low < 2^32 and high < 2^42, to below 2^63 + 2^42
  V narrow(V low, V high) const {
    const V first = S::mul(high, S::set(scalar.power_32));
    const V second = S::mul(S::template right<32>(high), S::set(scalar.power_64));
    return S::add(low, S::add(first, second));
  }
};

// What all sums modulo 2^50 - 27 end with.
template <class S>
struct Tail50 {
  using V = typename S::V;
  static V times_27(V a) {
    return S::sub(S::template left<5>(a), S::add(S::template left<2>(a), a));
  }
  static V split(V a) {  // to below 2^50 + 27 * 2^14, in the same class
    return S::add(S::both(a, S::set((uint64_t{1} << 50) - 1)), times_27(S::template right<50>(a)));
  }
  static V canonical(V a) {  // for any a
    a = split(split(a));     // the second time adds 0 or 27
    return S::smaller(a, S::sub(a, S::set(Prime50::p)));
  }
  static V plus(V a, V b) {
    const V s = S::add(a, b);
    return S::smaller(s, S::sub(s, S::set(Prime50::p)));
  }
};

// 2^50 - 27 by Karatsuba's three products of 25 and 26 bits.
template <class S>
struct Sums50 {
  using V = typename S::V;
  using Element = uint64_t;
  static constexpr int W = S::W, kRows = S::kRows, kWords = 3 * S::W, kOtherWords = kWords, kLimbs = 3;
  static constexpr int kStep = 1, kAcross = 1, kTerms = 4096;
  struct X { V low, high, sum; };
  using Factor = X;
  struct Sum { V low, high, sum; };
  struct Y { V y; };

  explicit Sums50(const Prime50&) {}

  static X load(const Element* p) {
    const V x = S::load(p), low = S::both(x, S::set((1u << 25) - 1)), high = S::template right<25>(x);
    return {low, high, S::add(low, high)};
  }
  static void keep(const X& x, uint64_t* to) {
    S::store(to, x.low), S::store(to + W, x.high), S::store(to + 2 * W, x.sum);
  }
  static X kept(const uint64_t* from) { return {S::load(from), S::load(from + W), S::load(from + 2 * W)}; }
  static Factor other(const Element* p) { return load(p); }
  static void keep_other(const Factor& f, uint64_t* to) { keep(f, to); }
  static Factor kept_other(const uint64_t* from) { return kept(from); }
  static void prepare(Element m, uint64_t* limbs) {
    limbs[0] = m & ((1u << 25) - 1), limbs[1] = m >> 25, limbs[2] = limbs[0] + limbs[1];
  }
  static Factor broadcast(const uint64_t* limbs) { return {S::set(limbs[0]), S::set(limbs[1]), S::set(limbs[2])}; }
  static Element finish(Element sum) { return sum; }
  static Sum zero() { return {S::zero(), S::zero(), S::zero()}; }
  static void add(Sum& s, const X& x, const Factor& f) {
    s.low = S::add(s.low, S::mul(x.low, f.low));
    s.high = S::add(s.high, S::mul(x.high, f.high));
    s.sum = S::add(s.sum, S::mul(x.sum, f.sum));
  }
  static void add_across(Sum& s, const X& x, const Factor& f) { add(s, x, f); }
  static void fold(Sum&) {}
  Y reduce(const Sum& s) const {
    using Tail = Tail50<S>;
    const V middle = S::sub(s.sum, S::add(s.low, s.high));  // times 2^25
    V total = S::add(Tail::split(s.low), Tail::times_27(Tail::split(s.high)));
    total = S::add(total, S::template left<25>(S::both(middle, S::set((1u << 25) - 1))));
    total = S::add(total, Tail::times_27(S::template right<25>(middle)));
    return {Tail::canonical(total)};
  }
  static Y plus(const Y& a, const Y& b) { return {Tail50<S>::plus(a.y, b.y)}; }
  static Y again(const Element* p) { return {S::load(p)}; }
  static void store(Element* p, const Y& y) { S::store(p, y.y); }

  Prime50 scalar;
};

// What all sums modulo 2^64 - 2^32 + 1 end with.
template <class S>
struct Tail64 {
  using V = typename S::V;
  static V epsilon() { return S::set(Prime64::epsilon); }
  static V canonical(V a) { return S::smaller(a, S::add(a, epsilon())); }
  static V plus(V a, V b) {  // of canonical ones
    const V s = S::add(a, b);
    return canonical(S::add(s, S::where_less(s, a, epsilon())));
  }
  static V minus(V a, V b) { return S::sub(S::sub(a, b), S::where_less(a, b, epsilon())); }
  // (high * 2^64 + low), low canonical
  static V reduce(V high, V low) {
    const V h = S::both(high, epsilon());
    return plus(minus(low, S::template right<32>(high)), S::sub(S::template left<32>(h), h));
  }
};

// 2^64 - 2^32 + 1: x in two halves; m and m * 2^32 in three limbs of 22, 21 and 21 bits, which need the same places.
template <class S>
struct Sums64 {
  using V = typename S::V;
  using Element = uint64_t;
  static constexpr int W = S::W, kRows = S::kRows, kWords = 2 * S::W, kOtherWords = 6 * S::W, kLimbs = 6;
  static constexpr int kStep = 1, kAcross = 1, kTerms = 512;
  struct X { V low, high; };
  struct Factor { V low[3], high[3]; };
  struct Sum { V place[3]; };
  struct Y { V y; };

  explicit Sums64(const Prime64&) {}

  static X load(const Element* p) {
    const V x = S::load(p);
    return {x, S::template right<32>(x)};  // products ignore the upper halves
  }
  static void keep(const X& x, uint64_t* to) { S::store(to, x.low), S::store(to + W, x.high); }
  static X kept(const uint64_t* from) { return {S::load(from), S::load(from + W)}; }
  static void prepare(Element m, uint64_t* limbs) {
    for (Element part : {m, Prime64::mul(m, uint64_t{1} << 32)}) {
      *limbs++ = part & ((1u << 22) - 1);
      *limbs++ = part >> 22 & ((1u << 21) - 1);
      *limbs++ = part >> 43;
    }
  }
  static Factor broadcast(const uint64_t* l) {
    return {{S::set(l[0]), S::set(l[1]), S::set(l[2])}, {S::set(l[3]), S::set(l[4]), S::set(l[5])}};
  }
  static Factor other(const Element* p) {
    const V m = S::load(p), h = S::template right<32>(m);
    const V shifted = Tail64<S>::reduce(h, Tail64<S>::canonical(S::template left<32>(m)));
    return {{limb<0, 22>(m), limb<22, 21>(m), limb<43, 21>(m)},
            {limb<0, 22>(shifted), limb<22, 21>(shifted), limb<43, 21>(shifted)}};
  }
  static void keep_other(const Factor& f, uint64_t* to) {
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) S::store(to + i * W, f.low[i]), S::store(to + (3 + i) * W, f.high[i]);
  }
  static Factor kept_other(const uint64_t* l) {
    return {{S::load(l), S::load(l + W), S::load(l + 2 * W)},
            {S::load(l + 3 * W), S::load(l + 4 * W), S::load(l + 5 * W)}};
  }
  static Element finish(Element sum) { return sum; }
  static Sum zero() { return {{S::zero(), S::zero(), S::zero()}}; }
  static void add(Sum& s, const X& x, const Factor& f) {
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i)
      s.place[i] = S::add(s.place[i], S::add(S::mul(x.low, f.low[i]), S::mul(x.high, f.high[i])));
  }
  static void add_across(Sum& s, const X& x, const Factor& f) { add(s, x, f); }
  static void fold(Sum&) {}
  Y reduce(const Sum& s) const {
    using Tail = Tail64<S>;
    V total = Tail::canonical(s.place[0]);
    total = Tail::plus(total, shifted<22>(s.place[1]));
    return {Tail::plus(total, shifted<43>(s.place[2]))};
  }
  static Y plus(const Y& a, const Y& b) { return {Tail64<S>::plus(a.y, b.y)}; }
  static Y again(const Element* p) { return {S::load(p)}; }
  static void store(Element* p, const Y& y) { S::store(p, y.y); }

  Prime64 scalar;

 private:
  template <int from, int bits>
  static V limb(V a) {
    return S::both(S::template right<from>(a), S::set((uint64_t{1} << bits) - 1));
  }
  template <int n>
  static V shifted(V a) {
    return Tail64<S>::reduce(S::template right<64 - n>(a), Tail64<S>::canonical(S::template left<n>(a)));
  }
};

}  // namespace
}  // namespace anabranch
