// anabranch_kernels._cuda: the optional second extension, for GPUs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "views.h"

namespace py = pybind11;
using namespace anabranch;

PYBIND11_MODULE(_cuda, m) {
  m.attr("source_hash") = ANABRANCH_SOURCE_HASH;
  m.def("store_kv", [](const Rows3& k, const Rows3& v, const Cache& k_cache, const Cache& v_cache, uintptr_t k_scales,
                       uintptr_t v_scales, uintptr_t slots, const std::array<int, 7>& sizes, uintptr_t stream) {
    const StoreCall c = store_call(k, v, k_cache, v_cache, k_scales, v_scales, slots, sizes);
    const std::string wrong = store_kv_cuda(c, pointer<void>(stream));
    if (!wrong.empty()) throw std::runtime_error("storing keys and values failed: " + wrong);
  });
}
