#include "common/kernel.cuh"
#include "softmax/op.h"

namespace megalm::cuda {
namespace {

constexpr int kThreads = 256;

// The keys that a row's query sees.
struct Window {
  int64_t begin, end;
};

template <typename Args>
__device__ __forceinline__ Window window(const Args& a, int64_t row) {
  const int64_t position = a.keys - a.queries + row % a.queries;
  const int64_t sequence = row / (a.heads * a.queries);
  return {a.starts ? a.starts[sequence * a.keys + position] : 0, position + 1};
}

// One block a row. The whole row is written, zeros outside of the window; only packs that touch it are read.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) forward_kernel(SoftmaxForward a) {
  SHARED(float, scratch, 2 * kWarp);
  const int64_t row = blockIdx.x;
  const Window w = window(a, row);
  const T* x = static_cast<const T*>(a.x) + row * a.keys;
  T* y = static_cast<T*>(a.y) + row * a.keys;
  const float slope = a.slopes ? a.slopes[row / a.queries % a.heads] : 0.f;
  const int64_t step = int64_t(blockDim.x) * N, first = w.begin / N * N + int64_t(threadIdx.x) * N;
  const auto value = [&](float raw, int64_t k) {
    return k >= w.begin && k < w.end ? raw * a.scale + slope * float(k - w.end) : -INFINITY;
  };
  float peak = -INFINITY, total = 0.f;
  for (int64_t i = first; i < w.end; i += step) {
    const Pack<T, N> p = load_pack<N>(x + i);
    float top = -INFINITY;
#pragma unroll
    for (int j = 0; j < N; ++j) top = fmaxf(top, value(p.v[j], i + j));
    if (top > peak) {
      total *= expf(peak - top);
      peak = top;
    }
    if (peak != -INFINITY) {
#pragma unroll
      for (int j = 0; j < N; ++j) total += expf(value(p.v[j], i + j) - peak);
    }
  }
  const float highest = block_reduce<Max>(peak, scratch);
  const float own = total == 0.f ? 0.f : total * expf(peak - highest);
  const float inverse = 1.f / block_reduce<Sum>(own, scratch + kWarp);
  const float shift = highest == -INFINITY ? 0.f : highest;
  for (int64_t i = int64_t(threadIdx.x) * N; i < a.keys; i += step) {
    Pack<T, N> p{};
    if (i + N > w.begin && i < w.end) {
      p = load_pack<N>(x + i);
#pragma unroll
      for (int j = 0; j < N; ++j) p.v[j] = expf(value(p.v[j], i + j) - shift) * inverse;
    }
    store_pack(y + i, p);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) backward_kernel(SoftmaxBackward a) {
  SHARED(float, scratch, kWarp);
  const int64_t row = blockIdx.x;
  const Window w = window(a, row);
  const T* dy = static_cast<const T*>(a.dy) + row * a.keys;
  const T* y = static_cast<const T*>(a.y) + row * a.keys;
  T* dx = static_cast<T*>(a.dx) + row * a.keys;
  const int64_t step = int64_t(blockDim.x) * N;
  float dot = 0.f;
  // What lies outside of the window in a pack does not count, whatever dy holds there.
  for (int64_t i = w.begin / N * N + int64_t(threadIdx.x) * N; i < w.end; i += step) {
    const Pack<T, N> g = load_pack<N>(dy + i), p = load_pack<N>(y + i);
#pragma unroll
    for (int j = 0; j < N; ++j) dot += i + j >= w.begin && i + j < w.end ? g.v[j] * p.v[j] : 0.f;
  }
  dot = block_reduce<Sum>(dot, scratch);
  for (int64_t i = int64_t(threadIdx.x) * N; i < a.keys; i += step) {
    Pack<T, N> p{};
    if (i + N > w.begin && i < w.end) {
      const Pack<T, N> g = load_pack<N>(dy + i);
      p = load_pack<N>(y + i);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        p.v[j] = i + j >= w.begin && i + j < w.end ? a.scale * p.v[j] * (g.v[j] - dot) : 0.f;
      }
    }
    store_pack(dx + i, p);
  }
}

}  // namespace

void softmax_forward(const SoftmaxForward& a, void* stream) {
  const int64_t rows = a.batch * a.heads * a.queries;
  if (rows == 0) return;
  for_dtype(
      a.dtype, [&](auto type) { return packable<decltype(type)>(a.keys, a.x, a.y); },
      [&](auto type, auto count) {
        constexpr int N = decltype(count)::value;
        const int threads = threads_for(a.keys / N, 1);
        LAUNCH((forward_kernel<decltype(type), N>), unsigned(rows), threads < kThreads ? threads : kThreads, stream, a);
      });
}

void softmax_backward(const SoftmaxBackward& a, void* stream) {
  const int64_t rows = a.batch * a.heads * a.queries;
  if (rows == 0) return;
  for_dtype(
      a.dtype, [&](auto type) { return packable<decltype(type)>(a.keys, a.dy, a.y, a.dx); },
      [&](auto type, auto count) {
        constexpr int N = decltype(count)::value;
        const int threads = threads_for(a.keys / N, 1);
        LAUNCH((backward_kernel<decltype(type), N>), unsigned(rows), threads < kThreads ? threads : kThreads, stream,
               a);
      });
}

}  // namespace megalm::cuda
