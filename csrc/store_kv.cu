// New keys and values into their pages: one warp for each token and head, K and V in one launch.
//
// The Triton kernel does the same; what this one saves is time on the host, where launching through Python costs more
// than the copy of a decode step takes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "paged_attention.h"
#include "store_row.h"

namespace anabranch {
namespace {

constexpr int kWarp = 32, kWarpsOfBlock = 4;

// One of the two tensors; strides count elements.
struct Rows {
  const void* from;
  int64_t from_token, from_head;
  void* to;
  int64_t to_page, to_head, to_slot;
  float* scales;
  int H, D;
};

template <class From, class To>
__device__ void store_row(const Rows& rows, int64_t t, int h, int64_t page, int slot, int page_size) {
  const From* from = static_cast<const From*>(rows.from) + t * rows.from_token + h * rows.from_head;
  To* to = static_cast<To*>(rows.to) + page * rows.to_page + h * rows.to_head + slot * rows.to_slot;
  const int lane = threadIdx.x % kWarp;
  if constexpr (std::is_same_v<To, int8_t>) {
    float most = 0.0f;
    for (int d = lane; d < rows.D; d += kWarp) most = fmaxf(most, fabsf(static_cast<float>(from[d])));
    for (int apart = kWarp / 2; apart > 0; apart /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, apart));
    const float scale = quantisation_scale(most);
    for (int d = lane; d < rows.D; d += kWarp) to[d] = quantise(static_cast<float>(from[d]), scale);
    if (lane == 0) rows.scales[(page * rows.H + h) * page_size + slot] = scale;
  } else {
    for (int d = lane; d < rows.D; d += kWarp) to[d] = static_cast<To>(static_cast<float>(from[d]));
  }
}

template <class From, class ToK, class ToV>
__global__ void store_kernel(Rows k, Rows v, const int64_t* slots, int T, int P, int page_size) {
  const int64_t warp = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp;
  const int64_t t = warp / (k.H + v.H);
  const int h = static_cast<int>(warp % (k.H + v.H));
  if (t >= T || slots[t] < 0 || slots[t] >= int64_t{P} * page_size) return;
  const int64_t page = slots[t] / page_size;
  const int slot = static_cast<int>(slots[t] % page_size);
  if (h < k.H)
    store_row<From, ToK>(k, t, h, page, slot, page_size);
  else
    store_row<From, ToV>(v, t, h - k.H, page, slot, page_size);
}

template <class Body>
void with_cuda_type(Type type, Body&& body) {
  switch (type) {
    case Type::f32: return body(float{});
    case Type::f16: return body(__half{});
    case Type::bf16: return body(__nv_bfloat16{});
    case Type::i8: return body(int8_t{});
  }
}

}  // namespace

std::string store_kv_cuda(const StoreCall& c, void* stream) {
  const Rows k{c.k, c.k_token, c.k_head, c.k_cache, c.k_page, c.k_cache_head, c.k_slot, c.k_scales, c.Hk, c.Dk};
  const Rows v{c.v, c.v_token, c.v_head, c.v_cache, c.v_page, c.v_cache_head, c.v_slot, c.v_scales, c.Hv, c.Dv};
  const int64_t warps = int64_t{c.T} * (c.Hk + c.Hv);
  if (warps == 0) return {};
  const auto blocks = static_cast<unsigned>((warps + kWarpsOfBlock - 1) / kWarpsOfBlock);
  with_cuda_type(c.k_type, [&](auto from) {
    using From = decltype(from);
    if constexpr (!std::is_same_v<From, int8_t>) {
      with_cuda_type(c.k_cache_type, [&](auto to_k) {
        with_cuda_type(c.v_cache_type, [&](auto to_v) {
          store_kernel<From, decltype(to_k), decltype(to_v)>
              <<<blocks, kWarp * kWarpsOfBlock, 0, static_cast<cudaStream_t>(stream)>>>(k, v, c.slots, c.T, c.P, c.page);
        });
      });
    }
  });
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? std::string() : cudaGetErrorString(error);
}

}  // namespace anabranch
