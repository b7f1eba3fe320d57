// What the CUDA kernels share: packed loads and stores, reductions over a warp and a block, dispatch on the dtype.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/op.h"
#include "common/portable_cuda.h"

namespace megalm::cuda {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarp = 32;

// kCount elements that are loaded and stored in one access of up to 16 bytes, as floats.
template <typename T, int kCount>
struct Pack {
  static_assert(kCount * sizeof(T) <= 16 && (kCount & (kCount - 1)) == 0);
  float v[kCount];
};

template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) RawPack {
  T v[kCount];
};

// The same as it lies in memory, in whole registers: they stay untouched while the load is on its way. (16-bit elements
// are split right behind the load, which waits for it.)
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Words {
  using Word = std::conditional_t<kCount * sizeof(T) % 4 == 0, uint32_t, uint16_t>;
  Word v[kCount * sizeof(T) / sizeof(Word)];
};

template <int kCount, typename T>
__device__ __forceinline__ Words<T, kCount> load_words(const T* address) {
  CHECK_ALIGNED(address, kCount * sizeof(T));
  return *reinterpret_cast<const Words<T, kCount>*>(address);
}

template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> widen(const Words<T, kCount>& words) {
  RawPack<T, kCount> raw;
  memcpy(&raw, &words, sizeof raw);
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.v[i] = static_cast<float>(raw.v[i]);
  return pack;
}

template <int kCount, typename T>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* address) {
  return widen(load_words<kCount>(address));
}

template <typename T, int kCount>
__device__ __forceinline__ void store_pack(T* address, const Pack<T, kCount>& pack) {
  CHECK_ALIGNED(address, kCount * sizeof(T));
  RawPack<T, kCount> raw;
#pragma unroll
  for (int i = 0; i < kCount; ++i) raw.v[i] = static_cast<T>(pack.v[i]);
  *reinterpret_cast<RawPack<T, kCount>*>(address) = raw;
}

struct Sum {
  template <typename V>
  __device__ static V join(V a, V b) {
    return a + b;
  }
};
struct Max {
  __device__ static float join(float a, float b) { return a > b ? a : b; }
};

template <typename Join, typename V>
__device__ __forceinline__ V warp_reduce(V value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = Join::join(value, __shfl_xor_sync(kFullMask, value, distance));
  }
  return value;
}

// The same result in every thread. `scratch` holds one V for each warp of the block; it may be used again at once.
template <typename Join, typename V>
__device__ __forceinline__ V block_reduce(V value, V* scratch) {
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  value = warp_reduce<Join>(value);
  __syncthreads();  // the last use of scratch is over
  if (threadIdx.x % kWarp == 0) scratch[warp] = value;
  __syncthreads();
  value = scratch[0];
  for (int i = 1; i < warps; ++i) value = Join::join(value, scratch[i]);
  return value;
}

// Whether rows of `size` elements, each beginning at a multiple of it, can be read in packs of 16 bytes.
template <typename T, typename... Pointers>
bool packable(int64_t size, Pointers... pointers) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return size % int64_t(16 / sizeof(T)) == 0 && (aligned(pointers) && ...);
}

constexpr int kSumRows = 16;

// Sums over blocks of rows of `partial`, `stride` apart: columns [0, size) to `first`, and with gridDim.y = 2 columns
// [next, next + size) to `second`. 32 columns a block; kSumRows threads share a column; the order is fixed.
template <typename T>
__global__ void __launch_bounds__(kWarp* kSumRows) sum_rows_kernel(const float* partial, int64_t blocks, int64_t stride,
                                                                   int64_t next, int64_t size, T* first, T* second) {
  SHARED(float, sums, kSumRows* kWarp);
  const int64_t column = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  const float* from = partial + (blockIdx.y ? next : 0);
  T* to = blockIdx.y ? second : first;
  float total = 0.f;
  if (column < size) {
#pragma unroll 4
    for (int64_t b = threadIdx.y; b < blocks; b += kSumRows) total += from[b * stride + column];
  }
  sums[threadIdx.y * kWarp + threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y == 0 && column < size) {
    for (int i = 1; i < kSumRows; ++i) total += sums[i * kWarp + threadIdx.x];
    to[column] = static_cast<T>(total);
  }
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls body(T{}, Constant<elements of an access>{}) with the device's type for dtype; pack(T{}) says whether packed
// access is possible.
template <typename Pack, typename Body>
void for_dtype(DType dtype, Pack&& pack, Body&& body) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    if (pack(type)) {
      body(type, Constant<16 / sizeof(T)>{});
    } else {
      body(type, Constant<1>{});
    }
  };
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kBFloat16:
      return run(__nv_bfloat16{});
    case DType::kFloat16:
      return run(__half{});
  }
}

// Threads of a block for a row of `packs` accesses: whole warps, `each` accesses a thread, at most 1024.
inline int threads_for(int64_t packs, int each) {
  int64_t threads = (packs + each - 1) / each;
  threads = (threads + kWarp - 1) / kWarp * kWarp;
  return int(threads < kWarp ? kWarp : threads > 1024 ? 1024 : threads);
}

}  // namespace megalm::cuda
