// Sixteen lanes of AVX-512 and, beside them, the tiles of AMX: matrices of sixteen rows of 64 bytes. Include only where
// the compiler may use amx-tile, amx-bf16, amx-int8 and what simd_avx512.h asks for.
//
// The instructions are spelt out because GCC 12's intrinsics do not tell it that loads read memory: what was stored just
// before might not be there yet.
#pragma once

#include "simd_avx512.h"

namespace anabranch {
namespace {  // internal linkage: no other file may end up with this one's instructions

struct Amx : Avx512Pairs<true> {
  static constexpr bool tiles = true;

  // Lets this thread use tiles 0 to 7, at first undefined, while it lives; no other may live on the thread. Afterwards
  // the tiles are given up, so that the system does not have to save them for threads that do other work.
  class Tiles {
   public:
    Tiles() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } const config;
      static_assert(sizeof config == 64, "as the instruction reads it");
      asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
  };

  template <int tile>
  static void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
  }
  template <int tile>
  static void tile_load(const void* rows, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(row_bytes), "i"(tile) : "memory");
  }
  template <int tile>
  static void tile_store(void* rows, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(row_bytes), "i"(tile) : "memory");
  }
  // Float32 c[16][16] += a[16][32] · b[32][16]: rows of a are bfloat16 as they lie, rows of b sixteen pairs along k.
  template <int c, int a, int b>
  static void tile_dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
};

}  // namespace
}  // namespace anabranch
