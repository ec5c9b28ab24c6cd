// anabranch_kernels._C: hands pointers to csrc with the GIL released, nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "coordinate_rules.h"
#include "geometric_median.h"
#include "isa.h"
#include "paged_attention.h"
#include "parallel.h"
#include "perceptron_sgd.h"
#include "rank_lora.h"
#include "skinny_linear.h"
#include "views.h"

namespace py = pybind11;
using namespace anabranch;

void bind_field_coding(py::module_& m);  // field_coding.cpp

namespace {

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::generic: return "generic";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::amx: return "amx";
    case Isa::avx512_bf16_emulated: return "avx512_bf16_emulated";
  }
  return "";
}

Isa isa_of(const std::string& name) {
  for (Isa isa : {Isa::generic, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx, Isa::avx512_bf16_emulated})
    if (name == name_of(isa)) {
      if (!is_supported(isa)) throw py::value_error("this CPU cannot run " + name);
      return isa;
    }
  throw py::value_error("unknown instruction set '" + name + "'");
}

void raise_if(const std::string& wrong) {
  if (!wrong.empty()) throw py::value_error(wrong);
}

void attend(const Rows3& q, const Cache& k, const Cache& v, uintptr_t k_scales, uintptr_t v_scales,
            const std::array<int64_t, 2>& page_table, uintptr_t seq_lens, uintptr_t cu_seqlens_q, uintptr_t out,
            uintptr_t lse, const std::array<int, 10>& sizes, float scale, int window, int v_top_k, bool renormalise,
            const std::string& isa, int threads) {
  AttentionCall c{};
  c.q = pointer<void>(q[0]), c.q_type = static_cast<Type>(q[1]), c.q_token = q[2], c.q_head = q[3];
  c.k = pointer<void>(k[0]), c.k_type = static_cast<Type>(k[1]), c.k_page = k[2], c.k_head = k[3], c.k_slot = k[4];
  c.v = pointer<void>(v[0]), c.v_type = static_cast<Type>(v[1]), c.v_page = v[2], c.v_head = v[3], c.v_slot = v[4];
  c.k_scales = pointer<float>(k_scales), c.v_scales = pointer<float>(v_scales);
  c.page_table = pointer<int32_t>(page_table[0]), c.table_row = page_table[1];
  c.seq_lens = pointer<int32_t>(seq_lens), c.cu_seqlens_q = pointer<int32_t>(cu_seqlens_q);
  c.out = pointer<void>(out), c.lse = pointer<float>(lse);
  c.T = sizes[0], c.B = sizes[1], c.Hq = sizes[2], c.Hk = sizes[3], c.Hv = sizes[4], c.Dk = sizes[5], c.Dv = sizes[6];
  c.P = sizes[7], c.page = sizes[8], c.max_pages = sizes[9];
  c.scale = scale, c.window = window, c.v_top_k = v_top_k, c.renormalise = renormalise;
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  const std::string wrong = paged_attention(c, chosen, threads);
  py::gil_scoped_acquire acquire;
  raise_if(wrong);
}

void store(const Rows3& k, const Rows3& v, const Cache& k_cache, const Cache& v_cache, uintptr_t k_scales,
           uintptr_t v_scales, uintptr_t slots, const std::array<int, 7>& sizes, int threads) {
  const StoreCall c = store_call(k, v, k_cache, v_cache, k_scales, v_scales, slots, sizes);
  py::gil_scoped_release release;
  const std::string wrong = store_kv(c, threads);
  py::gil_scoped_acquire acquire;
  raise_if(wrong);
}

void linear(uintptr_t x, int x_type, int64_t x_row, uintptr_t weight, int weight_type, int64_t weight_row,
            uintptr_t scales, uintptr_t bias, uintptr_t y, int M, int in, int out, const std::string& isa,
            int threads) {
  const LinearCall c{pointer<void>(x),     static_cast<Type>(x_type), x_row, pointer<void>(weight),
                     static_cast<Type>(weight_type), weight_row, pointer<float>(scales), pointer<void>(bias),
                     pointer<void>(y),     M, in, out};
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  skinny_linear(c, chosen, threads);
}

void gram(const Rows3& points, const std::array<int64_t, 2>& centre, uintptr_t to, int B, int N, int64_t D,
          const std::string& isa, int threads) {
  const GramCall c{pointer<void>(points[0]), static_cast<Type>(points[1]), points[2], points[3],
                   pointer<void>(centre[0]), centre[1], pointer<double>(to), B, N, D};
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  centred_gram(c, chosen, threads);
}

void sum_of_rows(const Rows3& points, uintptr_t coefficients, const std::array<int64_t, 2>& centre, uintptr_t out,
                 int B, int N, int64_t D, const std::string& isa, int threads) {
  const CombineCall c{pointer<void>(points[0]), static_cast<Type>(points[1]), points[2], points[3],
                      pointer<double>(coefficients), pointer<void>(centre[0]), centre[1], pointer<void>(out), B, N, D};
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  combine(c, chosen, threads);
}

bool coordinates(const Rows3& points, uintptr_t out, int rule, int f, int B, int N, int64_t D, const std::string& isa,
                 int threads) {
  const CoordinateCall c{pointer<void>(points[0]), static_cast<Type>(points[1]), points[2], points[3],
                         pointer<void>(out), static_cast<Rule>(rule), f, B, N, D};
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  return coordinate_rule(c, chosen, threads);
}

Perceptron perceptron_of(const std::vector<int>& widths, int batch) {
  Perceptron net{};
  net.layers = static_cast<int>(widths.size()) - 1, net.batch = batch;
  std::copy(widths.begin(), widths.end(), net.widths);
  return net;
}

Sgd sgd_of(const std::array<float, 3>& sgd) { return {sgd[0], sgd[1], sgd[2]}; }

void train_perceptrons(const std::vector<int>& widths, uintptr_t rows, uintptr_t velocity, uintptr_t x, uintptr_t index,
                       uintptr_t y, uintptr_t counts, const std::array<int64_t, 3>& sizes, int batch,
                       const std::array<float, 3>& sgd, const std::string& isa, int threads) {
  PerceptronCall c{};
  c.net = perceptron_of(widths, batch), c.sgd = sgd_of(sgd);
  c.rows = pointer<float>(rows), c.velocity = pointer<float>(velocity), c.x = pointer<float>(x);
  c.index = pointer<int64_t>(index), c.y = pointer<int64_t>(y), c.counts = pointer<int64_t>(counts);
  c.N = sizes[0], c.M = sizes[1], c.n = sizes[2];
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  const std::string wrong = perceptron_sgd(c, chosen, threads);
  py::gil_scoped_acquire acquire;
  raise_if(wrong);
}

// The states of N perceptrons, in memory of the caller's.
struct Steps : PerceptronSteps {
  Steps(const std::vector<int>& widths, int batch, int64_t N, const std::string& isa)
      : PerceptronSteps{perceptron_of(widths, batch), nullptr, 0, N, isa_of(isa)} {
    floats = perceptron_state_floats(net, this->isa);
  }
};

using Rows = std::array<int64_t, 4>;  // {address, type, stride of rows, width}

RowTable table_of(const Rows& rows) {
  return {pointer<void>(rows[0]), static_cast<Type>(rows[1]), rows[2], static_cast<int>(rows[3])};
}

void adapters(const Rows& x, const Rows& a, const Rows& b, const Rows& router, uintptr_t bias, uintptr_t places,
              uintptr_t scales, uintptr_t adapter_of, const std::array<int64_t, 6>& out,
              const std::array<int, 6>& sizes, bool add, const std::string& isa, int threads) {
  RankLoraCall c{};
  c.x = table_of(x), c.a = table_of(a), c.b = table_of(b), c.router = table_of(router);
  c.bias = pointer<float>(bias), c.places = pointer<AdapterPlace>(places), c.scales = pointer<float>(scales);
  c.adapter_of = pointer<int32_t>(adapter_of);
  c.y = pointer<void>(out[0]), c.y_row = out[1], c.counts = pointer<int64_t>(out[2]);
  c.picked = pointer<int32_t>(out[3]), c.gates = pointer<float>(out[4]), c.h = pointer<float>(out[5]);
  c.T = sizes[0], c.adapters = sizes[1], c.ranks = sizes[2], c.groups = sizes[3], c.chosen = sizes[4];
  c.active = sizes[5], c.add = add;
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  const std::string wrong = rank_lora(c, chosen, threads);
  py::gil_scoped_acquire acquire;
  raise_if(wrong);
}

RowLists lists_of(const Rows& rows, uintptr_t offsets, uintptr_t index, int lists) {
  return {table_of(rows), pointer<int64_t>(offsets), pointer<int32_t>(index), lists};
}

void dots(const Rows& rows, uintptr_t offsets, uintptr_t index, int lists, const Rows& x, uintptr_t to,
          const std::string& isa, int threads) {
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  listed_dots(lists_of(rows, offsets, index, lists), table_of(x), pointer<float>(to), chosen, threads);
}

void sums(const Rows& rows, uintptr_t offsets, uintptr_t index, int lists, uintptr_t factors, uintptr_t y,
          const std::string& isa, int threads) {
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  listed_sums(lists_of(rows, offsets, index, lists), pointer<float>(factors), pointer<float>(y), chosen, threads);
}

float read_memory(uintptr_t data, int64_t bytes, const std::string& isa, int threads) {
  const Kernels& kernels = kernels_for(isa_of(isa));
  py::gil_scoped_release release;
  constexpr int64_t chunk = 1 << 20;
  std::vector<float> highest((bytes + chunk - 1) / chunk);
  parallel_for(static_cast<int>(highest.size()), threads, [&](int task, int) {
    const int64_t begin = task * chunk;
    highest[task] = kernels.read(pointer<char>(data) + begin, std::min(chunk, bytes - begin));
  });
  return *std::max_element(highest.begin(), highest.end());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("source_hash") = ANABRANCH_SOURCE_HASH;
  m.def("supported_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : supported_isas()) names.push_back(name_of(isa));
    return names;
  });
  m.def("paged_attention", &attend);
  m.def("store_kv", &store);
  m.def("skinny_linear", &linear);
  m.def("centred_gram", &gram);
  m.def("combine", &sum_of_rows);
  m.def("coordinate_rule", &coordinates);
  m.def("perceptron_sgd", &train_perceptrons);
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<Steps>(m, "PerceptronSteps")
      .def(py::init<const std::vector<int>&, int, int64_t, const std::string&>())
      .def_readonly("floats", &Steps::floats)
      .def("load", [](Steps& s, uintptr_t states, uintptr_t rows, uintptr_t velocity, int threads) {
        s.states = pointer<float>(states);
        perceptron_load(s, pointer<float>(rows), pointer<float>(velocity), threads);
      }, Release())
      .def("unload", [](const Steps& s, uintptr_t rows, uintptr_t velocity, int threads) {
        perceptron_unload(s, pointer<float>(rows), pointer<float>(velocity), threads);
      }, Release())
      .def("forward", [](const Steps& s, uintptr_t x, int64_t M, int B, uintptr_t logits, uintptr_t features,
                         int threads) {
        perceptron_forward(s, pointer<float>(x), M, B, pointer<float>(logits), pointer<float>(features), threads);
      }, Release())
      .def("step", [](const Steps& s, const std::array<float, 3>& sgd, uintptr_t logits, uintptr_t features,
                      uintptr_t live, int64_t M, int B, int threads) {
        perceptron_step(s, sgd_of(sgd), pointer<float>(logits), pointer<float>(features), pointer<bool>(live), M, B,
                        threads);
      }, Release());
  m.def("rank_lora", &adapters);
  m.def("listed_dots", &dots);
  m.def("listed_sums", &sums);
  m.def("read_memory", &read_memory);
  bind_field_coding(m);
}
