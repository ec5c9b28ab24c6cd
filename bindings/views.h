// How tensors cross from Python: addresses, types and strides, for both extensions.
#pragma once

#include <array>
#include <cstdint>

#include "paged_attention.h"

namespace anabranch {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// {address, type, strides of all dimensions but the last}
using Rows3 = std::array<int64_t, 4>;
using Cache = std::array<int64_t, 5>;

inline StoreCall store_call(const Rows3& k, const Rows3& v, const Cache& k_cache, const Cache& v_cache,
                            uintptr_t k_scales, uintptr_t v_scales, uintptr_t slots,
                            const std::array<int, 7>& sizes) {
  StoreCall c{};
  c.k = pointer<void>(k[0]), c.k_type = static_cast<Type>(k[1]), c.k_token = k[2], c.k_head = k[3];
  c.v = pointer<void>(v[0]), c.v_type = static_cast<Type>(v[1]), c.v_token = v[2], c.v_head = v[3];
  c.k_cache = pointer<void>(k_cache[0]), c.k_cache_type = static_cast<Type>(k_cache[1]);
  c.k_page = k_cache[2], c.k_cache_head = k_cache[3], c.k_slot = k_cache[4];
  c.v_cache = pointer<void>(v_cache[0]), c.v_cache_type = static_cast<Type>(v_cache[1]);
  c.v_page = v_cache[2], c.v_cache_head = v_cache[3], c.v_slot = v_cache[4];
  c.k_scales = pointer<float>(k_scales), c.v_scales = pointer<float>(v_scales), c.slots = pointer<int64_t>(slots);
  c.T = sizes[0], c.Hk = sizes[1], c.Hv = sizes[2], c.Dk = sizes[3], c.Dv = sizes[4], c.P = sizes[5], c.page = sizes[6];
  return c;
}

}  // namespace anabranch
