#include "common/kernel.cuh"
#include "moe_permute/op.h"

namespace megalm::cuda {
namespace {

constexpr int kScanThreads = int(kRowMapExperts);

__device__ __forceinline__ int expert_of(const RowMap& a, int64_t slot) {
  const int64_t e = a.chosen[slot];
  return int(e >= 0 && e < a.experts ? e : a.experts);
}

__device__ __forceinline__ int population(unsigned bits) {
  bits -= bits >> 1 & 0x55555555u;
  bits = (bits & 0x33333333u) + (bits >> 2 & 0x33333333u);
  return int(((bits + (bits >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24);
}

// One warp a chunk of slots.
__global__ void __launch_bounds__(kWarp) histogram_kernel(RowMap a) {
  SHARED(int, histogram, kRowMapExperts + 1);
  const int columns = int(a.experts) + 1;
  for (int e = threadIdx.x; e < columns; e += kWarp) histogram[e] = 0;
  __syncwarp(kFullMask);
  const int64_t begin = a.slots * blockIdx.x / a.chunks, end = a.slots * (blockIdx.x + 1) / a.chunks;
  for (int64_t slot = begin + threadIdx.x; slot < end; slot += kWarp) atomicAdd(&histogram[expert_of(a, slot)], 1);
  __syncwarp(kFullMask);
  for (int e = threadIdx.x; e < columns; e += kWarp) a.partial[int64_t(blockIdx.x) * columns + e] = histogram[e];
}

// Histograms become places: of each expert, chunk after chunk. One thread an expert; the dropped come last.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(RowMap a) {
  SHARED(int64_t, ends, kScanThreads);
  const int e = int(threadIdx.x), experts = int(a.experts);
  const int64_t columns = a.experts + 1;
  int64_t total = 0;
  if (e < experts) {
    for (int64_t c = 0; c < a.chunks; ++c) total += a.partial[c * columns + e];
    a.counts[e] = total;
  }
  ends[e] = total;
  __syncthreads();
  for (int distance = 1; distance < kScanThreads; distance *= 2) {
    const int64_t before = e >= distance ? ends[e - distance] : 0;
    __syncthreads();
    ends[e] += before;
    __syncthreads();
  }
  const auto place = [&](int column, int64_t at) {
    for (int64_t c = 0; c < a.chunks; ++c) {
      const int64_t count = a.partial[c * columns + column];
      a.partial[c * columns + column] = at;
      at += count;
    }
  };
  if (e < experts) place(e, ends[e] - total);
  if (e == kScanThreads - 1) place(experts, ends[e]);
}

// One warp a chunk; a slot's rank among the warp's slots of its expert keeps their order.
__global__ void __launch_bounds__(kWarp) place_kernel(RowMap a) {
  SHARED(int64_t, place, kRowMapExperts + 2);
  const int columns = int(a.experts) + 1, lane = int(threadIdx.x);
  for (int e = lane; e < columns; e += kWarp) place[e] = a.partial[int64_t(blockIdx.x) * columns + e];
  if (lane == 0) place[columns] = 0;
  __syncwarp(kFullMask);
  const int64_t begin = a.slots * blockIdx.x / a.chunks, end = a.slots * (blockIdx.x + 1) / a.chunks;
  for (int64_t first = begin; first < end; first += kWarp) {
    const int64_t slot = first + lane;
    const int e = slot < end ? expert_of(a, slot) : columns;  // lanes behind the end have a column of their own
    const unsigned equals = __match_any_sync(kFullMask, unsigned(e));
    const int rank = population(equals & ((1u << lane) - 1u));
    const int64_t row = place[e] + rank;
    __syncwarp(kFullMask);
    if (rank == 0) place[e] += population(equals);
    __syncwarp(kFullMask);
    if (slot < end) {
      a.rows[slot] = e < a.experts ? row : -1 - row;
      a.sources[row] = slot;
    }
  }
}

// One block a token: its row is read once and written top_k times.
template <typename T, int N>
__global__ void __launch_bounds__(256) spread_kernel(Spread a) {
  const int64_t token = blockIdx.x, total = a.tokens * a.top_k;
  const T* x = static_cast<const T*>(a.x) + token * a.size;
  for (int64_t i = int64_t(threadIdx.x) * N; i < a.size; i += int64_t(blockDim.x) * N) {
    const Pack<T, N> p = load_pack<N>(x + i);
    for (int64_t slot = token * a.top_k; slot < (token + 1) * a.top_k; ++slot) {
      const int64_t code = a.rows[slot], row = code < 0 ? -1 - code : code;
      if (row >= total) continue;
      const float w = a.weights ? a.weights[slot] : 1.f;
      Pack<T, N> scaled;
#pragma unroll
      for (int j = 0; j < N; ++j) scaled.v[j] = code < 0 ? 0.f : p.v[j] * w;
      store_pack(static_cast<T*>(a.out) + row * a.size + i, scaled);
    }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(256) spread_dot_kernel(Spread a) {
  SHARED(float, scratch, kWarp);
  const int64_t token = blockIdx.x, total = a.tokens * a.top_k;
  const T* x = static_cast<const T*>(a.x) + token * a.size;
  for (int64_t slot = token * a.top_k; slot < (token + 1) * a.top_k; ++slot) {
    const int64_t code = a.rows[slot], row = code < 0 ? -1 - code : code;
    const float w = a.weights ? a.weights[slot] : 1.f;
    float dot = 0.f;
    if (row < total) {
      const T* y = static_cast<const T*>(a.y) + row * a.size;
      T* out = static_cast<T*>(a.out) + row * a.size;
      for (int64_t i = int64_t(threadIdx.x) * N; i < a.size; i += int64_t(blockDim.x) * N) {
        Pack<T, N> p{};
        if (code >= 0) {
          p = load_pack<N>(x + i);
          const Pack<T, N> q = load_pack<N>(y + i);
#pragma unroll
          for (int j = 0; j < N; ++j) {
            dot += p.v[j] * q.v[j];
            p.v[j] *= w;
          }
        }
        store_pack(out + i, p);
      }
    }
    dot = block_reduce<Sum>(dot, scratch);
    if (threadIdx.x == 0) a.dweights[slot] = dot;
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(256) collect_kernel(Collect a) {
  const int64_t token = blockIdx.x, total = a.tokens * a.top_k;
  T* out = static_cast<T*>(a.out) + token * a.size;
  for (int64_t i = int64_t(threadIdx.x) * N; i < a.size; i += int64_t(blockDim.x) * N) {
    Pack<T, N> sums{};
    for (int64_t slot = token * a.top_k; slot < (token + 1) * a.top_k; ++slot) {
      const int64_t row = a.rows[slot];
      if (row < 0 || row >= total) continue;
      const float w = a.weights ? a.weights[slot] : 1.f;
      const Pack<T, N> p = load_pack<N>(static_cast<const T*>(a.x) + row * a.size + i);
#pragma unroll
      for (int j = 0; j < N; ++j) sums.v[j] += p.v[j] * w;
    }
    store_pack(out + i, sums);
  }
}

template <int N>
int threads_of(int64_t size) {
  const int threads = threads_for(size / N, 1);
  return threads < 256 ? threads : 256;
}

}  // namespace

void row_map(const RowMap& a, void* stream) {
  if (a.chunks > 0) LAUNCH(histogram_kernel, unsigned(a.chunks), kWarp, stream, a);
  if (a.experts > 0) LAUNCH(scan_kernel, 1u, kScanThreads, stream, a);
  if (a.chunks > 0) LAUNCH(place_kernel, unsigned(a.chunks), kWarp, stream, a);
}

void spread(const Spread& a, void* stream) {
  if (a.tokens == 0 || a.top_k == 0) return;
  for_dtype(
      a.dtype, [&](auto type) { return packable<decltype(type)>(a.size, a.x, a.y, a.out); },
      [&](auto type, auto count) {
        constexpr int N = decltype(count)::value;
        if (a.y) {
          LAUNCH((spread_dot_kernel<decltype(type), N>), unsigned(a.tokens), threads_of<N>(a.size), stream, a);
        } else {
          LAUNCH((spread_kernel<decltype(type), N>), unsigned(a.tokens), threads_of<N>(a.size), stream, a);
        }
      });
}

void collect(const Collect& a, void* stream) {
  if (a.tokens == 0 || a.size == 0) return;
  for_dtype(
      a.dtype, [&](auto type) { return packable<decltype(type)>(a.size, a.x, a.out); },
      [&](auto type, auto count) {
        constexpr int N = decltype(count)::value;
        LAUNCH((collect_kernel<decltype(type), N>), unsigned(a.tokens), threads_of<N>(a.size), stream, a);
      });
}

}  // namespace megalm::cuda
