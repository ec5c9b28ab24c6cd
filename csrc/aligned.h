// Uninitialised floats on a cache-line boundary.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace anabranch {

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
