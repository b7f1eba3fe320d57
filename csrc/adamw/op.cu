#include "adamw/op.h"
#include "common/kernel.cuh"

namespace megalm::cuda {
namespace {

constexpr int kThreads = 256;

// The segment that element i lies in.
__device__ __forceinline__ int64_t segment_of(const int64_t* ends, int64_t segments, int64_t i) {
  int64_t low = 0, high = segments - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (i < ends[middle]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

template <typename T, int N, bool kSegments>
__global__ void __launch_bounds__(kThreads) adamw_kernel(AdamW a) {
  if (a.skip && *a.skip != 0.f) return;
  const float scale = a.grad_scale_pointer ? *a.grad_scale_pointer : a.grad_scale;
  const float root = rsqrtf(a.correction2);
  const int64_t step = int64_t(gridDim.x) * blockDim.x * N;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < a.size; i += step) {
    const Pack<float, N> g = load_pack<N>(a.grad + i);
    Pack<float, N> w = load_pack<N>(a.master + i), m = load_pack<N>(a.exp_avg + i), v = load_pack<N>(a.exp_avg_sq + i);
    Pack<T, N> out;
    int64_t segment = kSegments ? segment_of(a.segment_ends, a.segments, i) : 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float lr = a.lr;
      if constexpr (kSegments) {
        while (i + j >= a.segment_ends[segment]) ++segment;
        lr *= a.segment_rates[segment];
      }
      const float scaled = g.v[j] * scale;
      m.v[j] = a.beta1 * m.v[j] + (1.f - a.beta1) * scaled;
      v.v[j] = a.beta2 * v.v[j] + (1.f - a.beta2) * (scaled * scaled);
      w.v[j] = w.v[j] * (1.f - lr * a.weight_decay) - lr / a.correction1 * m.v[j] / (sqrtf(v.v[j]) * root + a.eps);
      out.v[j] = w.v[j];
    }
    store_pack(a.master + i, w);
    store_pack(a.exp_avg + i, m);
    store_pack(a.exp_avg_sq + i, v);
    if (a.out) store_pack(static_cast<T*>(a.out) + i, out);
  }
}

// One block for each kAdamWBlock elements of a segment.
__global__ void __launch_bounds__(kThreads) squares_kernel(AdamWSquares a) {
  SHARED(double, scratch, kWarp);
  const int64_t block = blockIdx.x;
  int64_t segment = 0, high = a.segments - 1;
  while (segment < high) {
    const int64_t middle = (segment + high) / 2;
    if (block < a.block_starts[middle + 1]) {
      high = middle;
    } else {
      segment = middle + 1;
    }
  }
  const int64_t start = segment ? a.segment_ends[segment - 1] : 0;
  const int64_t begin = start + (block - a.block_starts[segment]) * kAdamWBlock;
  const int64_t last = a.segment_ends[segment];
  const int64_t end = begin + kAdamWBlock < last ? begin + kAdamWBlock : last;
  const float scale = a.grad_scale_pointer ? *a.grad_scale_pointer : a.grad_scale;
  const float floor = a.eps * a.eps, corrected = 1.f / a.correction2;
  float ratios = 0.f;
  // A segment begins anywhere: single elements, several of them in flight.
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const float g = a.grad[i] * scale, square = g * g;
    const float second = (a.beta2 * a.exp_avg_sq[i] + (1.f - a.beta2) * square) * corrected;
    ratios += square / (second < floor ? floor : second);
  }
  const double total = block_reduce<Sum>(double(ratios), scratch);
  if (threadIdx.x == 0) a.partial[block] = total;
}

// One block a segment adds its blocks in a fixed order.
__global__ void __launch_bounds__(kThreads) join_kernel(AdamWSquares a) {
  SHARED(double, scratch, kWarp);
  double total = 0.;
  for (int64_t i = a.block_starts[blockIdx.x] + threadIdx.x; i < a.block_starts[blockIdx.x + 1]; i += kThreads) {
    total += a.partial[i];
  }
  total = block_reduce<Sum>(total, scratch);
  if (threadIdx.x == 0) a.result[blockIdx.x] = total;
}

template <typename T, int N>
void launch(const AdamW& a, void* stream) {
  const int64_t wanted = (a.size / N + kThreads - 1) / kThreads;
  const unsigned blocks = unsigned(wanted < 1 ? 1 : wanted > 1 << 20 ? 1 << 20 : wanted);
  if (a.segments) {
    LAUNCH((adamw_kernel<T, N, true>), blocks, kThreads, stream, a);
  } else {
    LAUNCH((adamw_kernel<T, N, false>), blocks, kThreads, stream, a);
  }
}

}  // namespace

void adamw(const AdamW& a, void* stream) {
  if (a.size == 0) return;
  const bool packed = packable<float>(a.size, a.master, a.grad, a.exp_avg, a.exp_avg_sq, a.out);
  for_dtype(
      a.out ? a.out_dtype : DType::kFloat32, [](auto) { return true; },
      [&](auto type, auto) {
        using T = decltype(type);
        if (packed) {
          launch<T, 4>(a, stream);
        } else {
          launch<T, 1>(a, stream);
        }
      });
}

void adamw_squares(const AdamWSquares& a, void* stream) {
  if (a.segments == 0) return;
  if (a.blocks) LAUNCH(squares_kernel, unsigned(a.blocks), kThreads, stream, a);
  LAUNCH(join_kernel, unsigned(a.segments), kThreads, stream, a);
}

}  // namespace megalm::cuda
