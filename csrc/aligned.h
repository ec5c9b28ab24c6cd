// Uninitialised floats on a cache-line boundary, and sizes that are multiples of something.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace anabranch {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

class AlignedFloats {
 public:
  explicit AlignedFloats(int64_t size)
      : data_(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>((size * 4 + 64) / 64 * 64)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  AlignedFloats(const AlignedFloats&) = delete;
  AlignedFloats& operator=(const AlignedFloats&) = delete;
  ~AlignedFloats() { std::free(data_); }
  float* data() const { return data_; }

 private:
  float* data_;
};

}  // namespace anabranch
