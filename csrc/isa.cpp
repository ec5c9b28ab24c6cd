#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace anabranch {

const Kernels& generic_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
const Kernels& amx_kernels();
const Kernels& avx512_bf16_emulated_kernels();
#endif

namespace {

#if defined(__x86_64__)
bool has_avx512_bf16() {
  // GCC 12's __builtin_cpu_supports knows the name only from some versions on; leaf 7.1, EAX bit 5 says it everywhere.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 5));
}

// Tiles, their bfloat16 and int8 products (leaf 7, EDX bits 24, 22, 25), and a system that saves tiles when it switches
// threads (XCR0 bits 17 and 18; a CPU with AVX-512 in use can tell).
bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned needed = 1u << 22 | 1u << 24 | 1u << 25;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & needed) != needed) return false;
  unsigned saved = 0, saved_high = 0;
  asm("xgetbv" : "=a"(saved), "=d"(saved_high) : "c"(0));
  return (saved >> 17 & 3) == 3;
}

// Linux lends tiles to a process that asks (https://docs.kernel.org/arch/x86/xstate.html); it may refuse.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

std::vector<Isa> find_isas() {
  std::vector<Isa> isas{Isa::generic};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2) isas.push_back(Isa::avx2);
  if (avx512) isas.push_back(Isa::avx512);
  const bool avx512_bf16 = avx512 && has_avx512_bf16();
  if (avx512_bf16) isas.push_back(Isa::avx512_bf16);
  if (avx512_bf16 && has_amx()) {
    static const bool allowed = may_use_tiles();  // for the whole process, so asked once
    if (allowed) isas.push_back(Isa::amx);
  }
#endif
  return isas;
}

}  // namespace

// CPUID is looked at once: in a virtual machine every question leaves it, for tens of microseconds.
const std::vector<Isa>& supported_isas() {
  static const std::vector<Isa> isas = find_isas();
  return isas;
}

bool is_supported(Isa isa) {
  const Isa needed = isa == Isa::avx512_bf16_emulated ? Isa::avx512 : isa;
  for (Isa have : supported_isas())
    if (have == needed) return true;
  return false;
}

const Kernels& kernels_for(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::avx2: return avx2_kernels();
    case Isa::avx512: return avx512_kernels();
    case Isa::avx512_bf16: return avx512_bf16_kernels();
    case Isa::amx: return amx_kernels();
    case Isa::avx512_bf16_emulated: return avx512_bf16_emulated_kernels();
    default: break;
  }
#endif
  return generic_kernels();
}

}  // namespace anabranch
