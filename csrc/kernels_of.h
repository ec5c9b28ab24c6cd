// The table of kernels for one instruction set; each kernels_*.cpp compiles it once under its own target options.
#pragma once

#include "attention_kernel.h"
#include "coordinate_kernel.h"
#include "gram_kernel.h"
#include "gram_tiles.h"
#include "linear_kernel.h"
#include "linear_tiles.h"
#include "perceptron_kernel.h"
#include "rank_lora_kernel.h"

namespace anabranch {

// The highest float in memory: a read sweep whose result depends on every byte, for the roof of bandwidth. Eight streams
// beside each other, as they were the fastest of one to sixteen.
template <class S>
float read_all(const void* data, int64_t bytes) {
  constexpr int streams = 8;
  const float* floats = static_cast<const float*>(data);
  const int64_t length = bytes / 4 / streams / S::W * S::W;
  typename S::F highest[streams];
#pragma GCC unroll 8
  for (int j = 0; j < streams; ++j) highest[j] = S::zero();
  for (int64_t i = 0; i < length; i += S::W)
#pragma GCC unroll 8
    for (int j = 0; j < streams; ++j) {
      S::prefetch(reinterpret_cast<const char*>(floats + j * length + i) + 512);
      highest[j] = S::max(highest[j], S::load(floats + j * length + i));
    }
  float result = 0.0f;
  for (int j = 0; j < streams; ++j) result = std::max(result, S::highest(highest[j]));
  for (int64_t i = streams * length; i < bytes / 4; ++i) result = std::max(result, floats[i]);
  return result;
}

// Calls body with the kernel for this layer.
template <class S, class Body>
auto with_linear(const LinearCall& call, Body&& body) {
  if constexpr (S::tiles) {
    if (LinearTiles<S, bfloat16>::fits(call)) return body(LinearTiles<S, bfloat16>(call));
    if (LinearTiles<S, int8_t>::fits(call)) return body(LinearTiles<S, int8_t>(call));
  }
  return body(LinearKernel<S>(call));
}

// Null where a kernel has nothing to gain from what the instruction set adds to AVX-512, which is products.
template <class S>
constexpr decltype(Kernels::coordinate_plan) coordinate_plan_of() {
  if constexpr (S::pairs) return nullptr;
  else return [](const CoordinateCall& call) { return CoordinateKernel<S>(call).plan(); };
}

template <class S>
constexpr decltype(Kernels::coordinates) coordinates_of() {
  if constexpr (S::pairs) return nullptr;
  else return [](const CoordinateCall& call, int b, int64_t begin, int64_t end, const Exchange* exchanges,
                 int64_t count, float* scratch) {
    return CoordinateKernel<S>(call).run(b, begin, end, exchanges, count, scratch);
  };
}

template <class S>
constexpr PerceptronKernels perceptron_kernels_of() {
  if constexpr (S::pairs) {
    return {};
  } else {
    return {
        [](const Perceptron& net) { return PerceptronKernel<S>(net, nullptr).floats(); },
        [](const PerceptronCall& call, int64_t row, float* scratch) {
          PerceptronKernel<S>(call.net, scratch).epoch(call, row);
        },
        [](const Perceptron& net, float* state, const float* row, const float* velocity) {
          PerceptronKernel<S>(net, state).load(row, velocity);
        },
        [](const Perceptron& net, float* state, float* row, float* velocity) {
          PerceptronKernel<S>(net, state).unload(row, velocity);
        },
        [](const Perceptron& net, float* state, const float* x, int samples, float* logits, float* features) {
          PerceptronKernel<S>(net, state).forward_all(x, samples, logits, features);
        },
        [](const Perceptron& net, const Sgd& sgd, float* state, const float* logits, const float* features,
           int samples) {
          PerceptronKernel<S>(net, state).step_all(sgd, logits, features, samples);
        },
    };
  }
}

// Calls body with the kernel for so many rows.
template <class S, class Body>
auto with_gram(const GramCall& call, Body&& body) {
  if constexpr (S::tiles)
    if (GramTiles<S>::fits(call)) return body(GramTiles<S>(call));
  return body(GramKernel<S>(call));
}

template <class S>
constexpr Kernels kernels_of() {
  return {
      [](const AttentionCall& call, int groups, int tokens) {
        return AttentionKernel<S>::scratch_floats(call, groups, tokens);
      },
      [](const AttentionCall& call, const AttentionItem& item, const AttentionItem* after, float* scratch) {
        AttentionKernel<S>(call, item, scratch).attend(after);
      },
      [](const AttentionCall& call, const AttentionItem& item, float* scratch, float* scores, int64_t stride) {
        AttentionKernel<S>(call, item, scratch).score(scores, stride);
      },
      [](const LinearCall& call) {
        return with_linear<S>(call, [](const auto& kernel) { return kernel.packed_floats(); });
      },
      [](const LinearCall& call, float* packed, int group) {
        with_linear<S>(call, [&](const auto& kernel) { kernel.pack(packed, group); });
      },
      [](const LinearCall& call, const float* packed, int64_t begin, int64_t end) {
        with_linear<S>(call, [&](const auto& kernel) { kernel.rows(packed, begin, end); });
      },
      [](const GramCall& call) {
        return with_gram<S>(call, [](const auto& kernel) { return kernel.scratch_floats(); });
      },
      [](const GramCall& call, int b, int64_t begin, int64_t end, float* scratch, double* sums) {
        with_gram<S>(call, [&](const auto& kernel) { kernel.add(b, begin, end, scratch, sums); });
      },
      [] { return CombineKernel<S>::scratch_floats(); },
      [](const CombineCall& call, int b, const Addend* addends, int count, int64_t begin, int64_t end, float* scratch) {
        CombineKernel<S>(call).add(b, addends, count, begin, end, scratch);
      },
      coordinate_plan_of<S>(),
      coordinates_of<S>(),
      perceptron_kernels_of<S>(),
      RankLoraKernel<S>::dots,
      [](const RowTable& table, const int32_t* index, int first, const float* factors, int count, int begin, int end,
         void* y, Type y_type, bool add) {
        with_type(y_type, [&](auto* type) {
          using Y = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
          if constexpr (sizeof(Y) > 1)
            RankLoraKernel<S>::sums(table, index, first, factors, count, begin, end, static_cast<Y*>(y), add);
        });
      },
      RankLoraKernel<S>::route,
      read_all<S>,
  };
}

}  // namespace anabranch
