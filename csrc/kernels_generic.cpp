// Kernels in plain C++, for any CPU.
#include "kernels_of.h"
#include "simd_generic.h"

namespace anabranch {

const Kernels& generic_kernels() {
  static constexpr Kernels kernels = kernels_of<Generic>();
  return kernels;
}

}  // namespace anabranch
