// The table of field kernels for one instruction set; each field_*.cpp compiles it once under its own target options.
#pragma once

#include "field_numbers.h"
#include "field_product.h"
#include "field_transform.h"

namespace anabranch {

// Level has the classes of sums for each kind of prime (Of31, Of50, Of64), those of roots (Roots31, Roots64), Lanes and
// Reals.
template <class Level, class Body>
auto with_sums(Field field, Body&& body) {
  return with_field(field, [&](auto prime) {
    using Prime = decltype(prime);
    if constexpr (std::is_same_v<Prime, Prime31>) return body(typename Level::Of31(prime));
    else if constexpr (std::is_same_v<Prime, Prime50>) return body(typename Level::Of50(prime));
    else return body(typename Level::Of64(prime));
  });
}

template <class Level, class Body>
auto with_product(const FieldProduct& call, Body&& body) {
  return with_sums<Level>(call.field, [&](const auto& sums) {
    return body(ProductKernel<std::decay_t<decltype(sums)>>(call, sums));
  });
}

template <class Level, class Body>
auto with_transform(const TransformCall& call, Body&& body) {
  if (call.field == Field::goldilocks) {
    using Roots = typename Level::Roots64;
    return body(TransformKernel<Roots>(call, Roots(Prime64())), TransformRoots<uint64_t>());
  }
  using Roots = typename Level::Roots31;
  return body(TransformKernel<Roots>(call, Roots(prime31(call.field))), TransformRoots<uint32_t>());
}

template <class Level>
constexpr FieldKernels field_kernels_of() {
  return {
      [](const FieldProduct& call) {
        return with_product<Level>(call, [](const auto& kernel) { return kernel.factor_words(); });
      },
      [](const FieldProduct& call, uint64_t* factors) {
        with_product<Level>(call, [&](const auto& kernel) { kernel.prepare(factors); });
      },
      [](const FieldProduct& call) {
        return with_product<Level>(call, [](const auto& kernel) { return kernel.scratch_words(); });
      },
      [](const FieldProduct& call, const uint64_t* factors, int64_t begin, int64_t end, uint64_t* scratch) {
        with_product<Level>(call, [&](const auto& kernel) { kernel.columns(factors, begin, end, scratch); });
      },
      [](const FieldProduct& call) {
        return with_product<Level>(call, [](const auto& kernel) { return kernel.across_words(); });
      },
      [](const FieldProduct& call, int64_t begin, int64_t end, uint64_t* scratch, void* sums) {
        with_product<Level>(call, [&](const auto& kernel) { kernel.across(begin, end, scratch, sums); });
      },
      [](const TransformCall& call) {
        return with_transform<Level>(call, [](const auto& kernel, auto) { return kernel.scratch_words(); });
      },
      [](const TransformCall& call, const void* roots, int64_t begin, int64_t end, uint64_t* scratch) {
        with_transform<Level>(call, [&](const auto& kernel, auto type) {
          kernel.columns(*static_cast<const decltype(type)*>(roots), begin, end, scratch);
        });
      },
      [](const QuantiseCall& call, int64_t begin, int64_t end, int64_t* counts) {
        with_field(call.field, [&](const auto& prime) {
          const NumberKernel<typename Level::Reals, std::decay_t<decltype(prime)>> kernel{prime};
          with_real(call.type, [&](auto* type) {
            using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
            if (call.dither == nullptr) kernel.template quantise<T, false>(call, begin, end, counts);
            else kernel.template quantise<T, true>(call, begin, end, counts);
          });
        });
      },
      [](const DequantiseCall& call, int64_t begin, int64_t end) {
        with_field(call.field, [&](const auto& prime) {
          NumberKernel<typename Level::Reals, std::decay_t<decltype(prime)>>{prime}.dequantise(call, begin, end);
        });
      },
      [](const AcceptCall& call, int64_t begin, int64_t end) {
        return with_field(call.field, [&](const auto& prime) {
          return accept_words<typename Level::Lanes>(prime, call, begin, end);
        });
      },
  };
}

}  // namespace anabranch
