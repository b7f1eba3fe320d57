#include "common/kernel.cuh"
#include "dropout/op.h"

namespace megalm::cuda {
namespace {

__device__ __forceinline__ uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

__device__ __forceinline__ uint32_t mix(uint32_t h, uint32_t key) {
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h = ((h ^ (h >> 15)) + key) * 0x846CA68Bu;
  return h ^ (h >> 16);
}

// Grid: rows along x, parts of a row along y.
template <typename T, int N>
__global__ void __launch_bounds__(256) dropout_kernel(DropoutAdd a) {
  const int64_t i = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * N, row = blockIdx.x;
  if (i >= a.size) return;
  const uint64_t id = uint64_t(a.row_ids ? a.row_ids[row] : row);
  const uint64_t state = mix(a.seed + kDropoutGolden * (id + 1));
  const uint32_t low = uint32_t(state), high = uint32_t(state >> 32);
  const int64_t at = row * a.size + i;
  Pack<T, N> p = load_pack<N>(static_cast<const T*>(a.x) + at);
  if (a.bias) {
    const Pack<T, N> b = load_pack<N>(static_cast<const T*>(a.bias) + i);
#pragma unroll
    for (int j = 0; j < N; ++j) p.v[j] += b.v[j];
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const uint32_t column = a.first_column + uint32_t(i + j);
    p.v[j] = mix(low + column * kDropoutColumn, high) >= a.threshold ? p.v[j] * a.scale : 0.f;
  }
  if (a.residual) {
    const Pack<T, N> r = load_pack<N>(static_cast<const T*>(a.residual) + at);
#pragma unroll
    for (int j = 0; j < N; ++j) p.v[j] += r.v[j];
  }
  store_pack(static_cast<T*>(a.y) + at, p);
}

}  // namespace

void dropout_add(const DropoutAdd& a, void* stream) {
  if (a.rows == 0 || a.size == 0) return;
  for_dtype(
      a.dtype, [&](auto type) { return packable<decltype(type)>(a.size, a.x, a.bias, a.residual, a.y); },
      [&](auto type, auto count) {
        constexpr int N = decltype(count)::value;
        const int threads = a.size / N < 256 ? threads_for(a.size / N, 1) : 256;
        const dim3 grid(unsigned(a.rows), unsigned((a.size / N + threads - 1) / threads));
        LAUNCH((dropout_kernel<decltype(type), N>), grid, threads, stream, a);
      });
}

}  // namespace megalm::cuda
