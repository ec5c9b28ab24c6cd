// The part of anabranch_kernels._C that calls field_coding.
#include "field_coding.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "views.h"

namespace py = pybind11;
using namespace anabranch;

namespace {

const char* name_of(FieldIsa isa) {
  switch (isa) {
    case FieldIsa::generic: return "generic";
    case FieldIsa::avx2: return "avx2";
    case FieldIsa::avx512: return "avx512";
    case FieldIsa::avx512_ifma: return "avx512_ifma";
  }
  return "";
}

FieldIsa isa_of(const std::string& name) {
  for (FieldIsa isa : supported_field_isas())
    if (name == name_of(isa)) return isa;
  throw py::value_error("this CPU cannot run '" + name + "'");
}

void multiply(int field, const std::array<int64_t, 3>& matrix, const std::array<int64_t, 3>& x, uintptr_t out,
              const std::array<int64_t, 3>& sizes, const std::string& isa, int threads) {
  const FieldProduct call{static_cast<Field>(field), pointer<void>(matrix[0]), matrix[1], matrix[2],
                          pointer<void>(x[0]),       x[1],                     x[2],      pointer<void>(out),
                          sizes[0],                  sizes[1],                 sizes[2]};
  const FieldIsa chosen = isa_of(isa);
  py::gil_scoped_release release;
  field_multiply(call, chosen, threads);
}

std::pair<int64_t, int64_t> quantise(int field, uintptr_t x, int type, uintptr_t dither, uintptr_t out, int64_t size,
                                     double clip, double scale, const std::string& isa, int threads) {
  const QuantiseCall call{static_cast<Field>(field), pointer<void>(x), static_cast<Real>(type), pointer<double>(dither),
                          pointer<void>(out),        size,             clip,                    scale};
  const FieldIsa chosen = isa_of(isa);
  py::gil_scoped_release release;
  const Counts counts = field_quantise(call, chosen, threads);
  return {counts.clipped, counts.not_finite};
}

void dequantise(int field, uintptr_t x, uintptr_t out, int64_t size, double divisor, const std::string& isa,
                int threads) {
  const DequantiseCall call{static_cast<Field>(field), pointer<void>(x), pointer<double>(out), size, divisor};
  const FieldIsa chosen = isa_of(isa);
  py::gil_scoped_release release;
  field_dequantise(call, chosen, threads);
}

int64_t accept(int field, uintptr_t stream, uintptr_t out, int64_t words, const std::string& isa, int threads) {
  const AcceptCall call{static_cast<Field>(field), pointer<void>(stream), pointer<void>(out), words};
  const FieldIsa chosen = isa_of(isa);
  py::gil_scoped_release release;
  return field_accept(call, chosen, threads);
}

void transform(int field, uintptr_t x, int64_t x_row, uintptr_t out, const std::array<int64_t, 5>& sizes,
               const std::string& isa, int threads) {
  const TransformCall call{static_cast<Field>(field), pointer<void>(x), x_row,    pointer<void>(out), sizes[0],
                           sizes[1],                  sizes[2],         sizes[3], sizes[4]};
  const FieldIsa chosen = isa_of(isa);
  py::gil_scoped_release release;
  field_transform(call, chosen, threads);
}

}  // namespace

void bind_field_coding(py::module_& m) {
  m.def("supported_field_isas", [] {
    std::vector<std::string> names;
    for (FieldIsa isa : supported_field_isas()) names.push_back(name_of(isa));
    return names;
  });
  m.def("field_multiply", &multiply);
  m.def("field_quantise", &quantise);
  m.def("field_dequantise", &dequantise);
  m.def("field_accept", &accept);
  m.def("field_transform", &transform);
}
