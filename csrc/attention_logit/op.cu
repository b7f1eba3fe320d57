#include "attention_logit/op.h"
#include "common/kernel.cuh"

namespace megalm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = kAttentionLogitTile;

// A float's bits as an integer of the same order; NaN comes last, -0 counts as 0.
__device__ __forceinline__ int ordered(float value) {
  value += 0.f;
  int bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) bits = 0x7fffffff;
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

struct MaxInt {
  __device__ static int join(int a, int b) { return a > b ? a : b; }
};

// The larger of *address and the float whose `ordered` is given: bits of two floats compare like integers where one is
// not negative, and the other way round, without a sign, where both are.
__device__ __forceinline__ void raise(float* address, int value) {
  if (value >= 0) {
    atomicMax(reinterpret_cast<int*>(address), value);
  } else {
    atomicMin(reinterpret_cast<unsigned*>(address), unsigned(value ^ 0x7fffffff));
  }
}

// One block for kThreads keys of a sequence and key head (blockIdx.x) and a tile of the queries that share it
// (blockIdx.y): whole heads, `together` of them. A thread has one key; the queries are in shared memory.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) logit_kernel(AttentionLogit a, int64_t chunks, int together) {
  SHARED(float, few, kTile* kAttentionLogitSize);
  SHARED(int, tops, kTile*(kThreads / kWarp));
  const int64_t group = blockIdx.x / chunks % a.groups, sequence = blockIdx.x / chunks / a.groups;
  const int64_t shared = a.heads / a.groups;
  const int64_t first_head = group * shared + int64_t(blockIdx.y) * together;
  const int64_t left = (group + 1) * shared - first_head;
  const int rows = int((left < together ? left : together) * a.queries), size = int(a.size);
  for (int i = threadIdx.x; i < kTile * size; i += kThreads) {
    const int row = i / size;
    float value = 0.f;
    if (row < rows) {
      const int64_t position = a.length - 1 - row % a.queries * a.every, head = first_head + row / a.queries;
      const T* q = static_cast<const T*>(a.q) + position * a.q_step + sequence * a.q_batch + head * size;
      value = static_cast<float>(q[i % size]);
    }
    few[i] = value;
  }
  __syncthreads();
  const int64_t key = blockIdx.x % chunks * kThreads + threadIdx.x;
  float sums[kTile] = {};
  if (key < a.length) {
    const T* k = static_cast<const T*>(a.k) + key * a.k_step + sequence * a.k_batch + group * size;
    for (int j = 0; j < size; j += N) {
      const Pack<T, N> p = load_pack<N>(k + j);
#pragma unroll
      for (int row = 0; row < kTile; ++row) {
#pragma unroll
        for (int n = 0; n < N; ++n) sums[row] += p.v[n] * few[row * size + j + n];
      }
    }
  }
  const uint8_t* mask = a.mask ? a.mask + sequence * a.mask_batch + key : nullptr;
#pragma unroll
  for (int row = 0; row < kTile; ++row) {
    const int64_t position = a.length - 1 - row % a.queries * a.every;
    const bool shown = row < rows && key <= position && (mask == nullptr || mask[position * a.mask_step]);
    const int top = warp_reduce<MaxInt>(shown ? ordered(sums[row] * a.scale) : ordered(-INFINITY));
    if (threadIdx.x % kWarp == 0) tops[threadIdx.x / kWarp * kTile + row] = top;
  }
  __syncthreads();
  if (int(threadIdx.x) >= rows) return;
  int top = tops[threadIdx.x];
  for (int warp = 1; warp < kThreads / kWarp; ++warp) top = MaxInt::join(top, tops[warp * kTile + threadIdx.x]);
  raise(a.largest + first_head + threadIdx.x / a.queries, top);
}

}  // namespace

void attention_logit(const AttentionLogit& a, void* stream) {
  const int together = int(kTile / a.queries);
  const int64_t chunks = (a.length + kThreads - 1) / kThreads;
  const int64_t tiles = (a.heads / a.groups + together - 1) / together;
  const dim3 grid(unsigned(chunks * a.groups * a.batch), unsigned(tiles), 1);
  if (grid.x == 0 || grid.y == 0) return;
  for_dtype(
      a.dtype,
      [&](auto type) {
        using T = decltype(type);
        const int64_t pack = 16 / sizeof(T);
        return packable<T>(a.size, a.k) && a.k_step % pack == 0 && a.k_batch % pack == 0;
      },
      [&](auto type, auto count) {
        LAUNCH((logit_kernel<decltype(type), decltype(count)::value>), grid, kThreads, stream, a, chunks, together);
      });
}

}  // namespace megalm::cuda
