// Field kernels in plain C++, for any CPU.
#include "field_sums_generic.h"

#include "field_kernels_of.h"

namespace anabranch {
namespace {

struct Level {
  using Lanes = Lanes1;
  using Reals = Reals1;
  using Of31 = WideSums<Prime31>;
  using Of50 = WideSums<Prime50>;
  using Of64 = WideSums<Prime64>;
  using Roots31 = PlainRoots<Prime31>;
  using Roots64 = PlainRoots<Prime64>;
};

}  // namespace

const FieldKernels& field_generic_kernels() {
  static constexpr FieldKernels kernels = field_kernels_of<Level>();
  return kernels;
}

}  // namespace anabranch
