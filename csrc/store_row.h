// How a float becomes an int8 of the cache: one formula for the CPU and CUDA.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define ANABRANCH_ON_BOTH __host__ __device__
#else
#define ANABRANCH_ON_BOTH
#endif

namespace anabranch {

ANABRANCH_ON_BOTH inline float quantisation_scale(float largest_magnitude) { return largest_magnitude / 127.0f; }

// Rounds to the nearest, ties to even. A row of zeros has scale 0 and stays zeros.
ANABRANCH_ON_BOTH inline int8_t quantise(float value, float scale) {
  const float quotient = std::nearbyint(value / (scale == 0.0f ? 1.0f : scale));
  return static_cast<int8_t>(std::fmin(127.0f, std::fmax(-127.0f, quotient)));
}

}  // namespace anabranch
