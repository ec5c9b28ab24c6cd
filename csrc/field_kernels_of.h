// The table of field kernels for one instruction set; each field_*.cpp compiles it once under its own target options.
#pragma once

#include "field_product.h"

namespace anabranch {

// Level has the class of sums for each kind of prime: Of31, Of50, Of64.
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
  };
}

}  // namespace anabranch
