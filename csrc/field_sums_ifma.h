// The same sums with AVX-512's products of 52 by 52 bits, whose lower and upper 52 bits are added to two registers:
// nothing is reduced, folded or carried in the loop. Include only where the compiler may use avx512ifma as well.
#pragma once

#include "field_lanes_avx512.h"
#include "field_sums.h"

namespace anabranch {
namespace {

using V512 = Lanes512::V;

inline void add_low(V512& sum, V512 a, V512 b) { sum = _mm512_madd52lo_epu64(sum, a, b); }
inline void add_high(V512& sum, V512 a, V512 b) { sum = _mm512_madd52hi_epu64(sum, a, b); }

struct Sum52 {
  V512 low, high;
  static Sum52 zero() { return {Lanes512::zero(), Lanes512::zero()}; }
  void add(V512 a, V512 b) { add_low(low, a, b), add_high(high, a, b); }
  // Moves what is above 52 bits from low to high.
  void carry() {
    high = Lanes512::add(high, Lanes512::right<52>(low));
    low = Lanes512::both(low, Lanes512::set((uint64_t{1} << 52) - 1));
  }
};

struct IfmaSums31 {
  using S = Lanes512;
  using Element = uint32_t;
  static constexpr int W = 16, kRows = 4, kWords = 16, kOtherWords = 16, kLimbs = 1, kStep = 1;
  static constexpr int kAcross = 2, kTerms = 4096;
  struct X { V512 even, odd; };
  using Factor = X;
  struct Sum { Sum52 even, odd; };
  struct Y { V512 y; };

  explicit IfmaSums31(const Prime31& prime) : scalar(prime) {}

  static X load(const Element* p) {
    const V512 both = S::load(p);
    return {S::both(both, S::set(0xffffffffu)), S::right<32>(both)};
  }
  static void keep(const X& x, uint64_t* to) { S::store(to, x.even), S::store(to + 8, x.odd); }
  static X kept(const uint64_t* from) { return {S::load(from), S::load(from + 8)}; }
  void prepare(Element m, uint64_t* limbs) const { *limbs = scalar.to_factor(m); }
  static Factor broadcast(const uint64_t* limbs) { return {S::set(*limbs), S::set(*limbs)}; }
  static Factor other(const Element* p) { return load(p); }
  static void keep_other(const Factor& f, uint64_t* to) { keep(f, to); }
  static Factor kept_other(const uint64_t* from) { return kept(from); }
  Element finish(Element sum) const { return scalar.to_factor(sum); }  // `other` factors are plain
  static Sum zero() { return {Sum52::zero(), Sum52::zero()}; }
  static void add(Sum& s, const X& x, const Factor& f) { s.even.add(x.even, f.even), s.odd.add(x.odd, f.odd); }
  static void add_across(Sum& s, const X& x, const Factor& f) {
    s.even.add(x.even, f.even), s.even.add(x.odd, f.odd);
  }
  static void fold(Sum&) {}
  Y reduce(const Sum& s) const {
    const V512 even = narrow(s.even), odd = narrow(s.odd);
    const V512 p = S::set_half(scalar.p), inverse = S::set(scalar.inverse);
    const V512 below_even = S::mul(S::mul(even, inverse), p), below_odd = S::mul(S::mul(odd, inverse), p);
    // The lower halves are equal, so the difference of the upper ones is exact.
    const V512 t = S::upper_halves(S::sub(even, below_even), S::sub(odd, below_odd));
    return {S::smaller_halves(t, S::add_halves(t, p))};
  }
  Y plus(const Y& a, const Y& b) const { return {Sums31<S>(scalar).plus({a.y}, {b.y}).y}; }
  static Y again(const Element* p) { return {S::load(p)}; }
  static void store(Element* p, const Y& y) { S::store(p, y.y); }

  Prime31 scalar;

 private:
  V512 narrow(Sum52 s) const {  // to below 2^55, since high is below 2^23
    s.carry();
    return S::add(s.low, S::mul(s.high, S::set(scalar.power_52)));
  }
};

// Two vectors side by side: eight sums and more hide the latency of four cycles.
struct IfmaSums50 {
  using S = Lanes512;
  using Element = uint64_t;
  static constexpr int W = 16, kRows = 4, kWords = 16, kOtherWords = 16, kLimbs = 1, kStep = 1;
  static constexpr int kAcross = 2, kTerms = 4096;
  struct X { V512 first, second; };
  using Factor = X;
  struct Sum { Sum52 first, second; };
  struct Y { V512 first, second; };

  explicit IfmaSums50(const Prime50&) {}

  static X load(const Element* p) { return {S::load(p), S::load(p + 8)}; }
  static void keep(const X& x, uint64_t* to) { S::store(to, x.first), S::store(to + 8, x.second); }
  static X kept(const uint64_t* from) { return load(from); }
  static void prepare(Element m, uint64_t* limbs) { *limbs = m; }
  static Factor broadcast(const uint64_t* limbs) { return {S::set(*limbs), S::set(*limbs)}; }
  static Factor other(const Element* p) { return load(p); }
  static void keep_other(const Factor& f, uint64_t* to) { keep(f, to); }
  static Factor kept_other(const uint64_t* from) { return kept(from); }
  static Element finish(Element sum) { return sum; }
  static Sum zero() { return {Sum52::zero(), Sum52::zero()}; }
  static void add(Sum& s, const X& x, const Factor& f) { s.first.add(x.first, f.first), s.second.add(x.second, f.second); }
  static void add_across(Sum& s, const X& x, const Factor& f) {
    s.first.add(x.first, f.first), s.first.add(x.second, f.second);
  }
  static void fold(Sum&) {}
  static Y reduce(const Sum& s) { return {reduce(s.first), reduce(s.second)}; }
  static Y plus(const Y& a, const Y& b) {
    return {Tail50<S>::plus(a.first, b.first), Tail50<S>::plus(a.second, b.second)};
  }
  static Y again(const Element* p) { return {S::load(p), S::load(p + 8)}; }
  static void store(Element* p, const Y& y) { S::store(p, y.first), S::store(p + 8, y.second); }

  Prime50 scalar;

 private:
  // low + high * 2^52 = low + (high mod 2^50) * 108 + (high / 2^50) * 108 * 27, high below 2^61
  static V512 reduce(Sum52 s) {
    s.carry();
    const V512 high = Tail50<S>::split(s.high), four = S::left<2>(high);
    return Tail50<S>::canonical(S::add(s.low, Tail50<S>::times_27(four)));
  }
};

// x in two halves a + b * 2^32; m and m * 2^32 in 52 and 12 bits: of six products four meet at 2^52.
struct IfmaSums64 {
  using S = Lanes512;
  using Element = uint64_t;
  static constexpr int W = 16, kRows = 4, kWords = 32, kOtherWords = 64, kLimbs = 4, kStep = 1;
  static constexpr int kAcross = 2, kTerms = 2048;
  struct Half { V512 a, b; };
  struct X { Half first, second; };
  struct Limbs { V512 a, a_top, b, b_top; };
  struct Factor { Limbs first, second; };
  struct Sum { Sum52 first, second; };
  struct Y { V512 first, second; };

  explicit IfmaSums64(const Prime64&) {}

  static X load(const Element* p) { return {halves(S::load(p)), halves(S::load(p + 8))}; }
  static void keep(const X& x, uint64_t* to) {
    S::store(to, x.first.a), S::store(to + 8, x.first.b), S::store(to + 16, x.second.a), S::store(to + 24, x.second.b);
  }
  static X kept(const uint64_t* l) { return {{S::load(l), S::load(l + 8)}, {S::load(l + 16), S::load(l + 24)}}; }
  static void prepare(Element m, uint64_t* limbs) {
    constexpr uint64_t mask = (uint64_t{1} << 52) - 1;
    const Element shifted = Prime64::mul(m, uint64_t{1} << 32);
    limbs[0] = m & mask, limbs[1] = m >> 52, limbs[2] = shifted & mask, limbs[3] = shifted >> 52;
  }
  static Factor broadcast(const uint64_t* l) {
    const Limbs limbs{S::set(l[0]), S::set(l[1]), S::set(l[2]), S::set(l[3])};
    return {limbs, limbs};
  }
  static Factor other(const Element* p) { return {limbs(S::load(p)), limbs(S::load(p + 8))}; }
  static void keep_other(const Factor& f, uint64_t* to) {
    for (const Limbs& l : {f.first, f.second})
      for (V512 limb : {l.a, l.a_top, l.b, l.b_top}) S::store(to, limb), to += 8;
  }
  static Factor kept_other(const uint64_t* from) { return {kept_limbs(from), kept_limbs(from + 32)}; }
  static Element finish(Element sum) { return sum; }
  static Sum zero() { return {Sum52::zero(), Sum52::zero()}; }
  static void add(Sum& s, const X& x, const Factor& f) {
    add(s.first, x.first, f.first), add(s.second, x.second, f.second);
  }
  static void add_across(Sum& s, const X& x, const Factor& f) {
    add(s.first, x.first, f.first), add(s.first, x.second, f.second);
  }
  static void fold(Sum&) {}
  static Y reduce(const Sum& s) { return {reduce(s.first), reduce(s.second)}; }
  static Y plus(const Y& a, const Y& b) {
    return {Tail64<S>::plus(a.first, b.first), Tail64<S>::plus(a.second, b.second)};
  }
  static Y again(const Element* p) { return {S::load(p), S::load(p + 8)}; }
  static void store(Element* p, const Y& y) { S::store(p, y.first), S::store(p + 8, y.second); }

  Prime64 scalar;

 private:
  static Half halves(V512 x) { return {S::both(x, S::set(0xffffffffu)), S::right<32>(x)}; }
  static Limbs limbs(V512 m) {
    const V512 mask = S::set((uint64_t{1} << 52) - 1);
    const V512 shifted = Tail64<S>::reduce(S::right<32>(m), Tail64<S>::canonical(S::left<32>(m)));
    return {S::both(m, mask), S::right<52>(m), S::both(shifted, mask), S::right<52>(shifted)};
  }
  static Limbs kept_limbs(const uint64_t* l) {
    return {S::load(l), S::load(l + 8), S::load(l + 16), S::load(l + 24)};
  }
  static void add(Sum52& s, const Half& x, const Limbs& f) {
    s.add(x.a, f.a), s.add(x.b, f.b);
    add_low(s.high, x.a, f.a_top), add_low(s.high, x.b, f.b_top);
  }
  static V512 reduce(const Sum52& s) {
    const V512 shifted = Tail64<S>::reduce(S::right<12>(s.high), Tail64<S>::canonical(S::left<52>(s.high)));
    return Tail64<S>::plus(Tail64<S>::canonical(s.low), shifted);
  }
};

}  // namespace
}  // namespace anabranch
