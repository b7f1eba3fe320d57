#include "common/kernel.cuh"
#include "cross_entropy/op.h"

namespace megalm::cuda {
namespace {

constexpr int kThreads = 512;
constexpr float kLog2E = 1.44269504f;

// e^d for d <= 0. exp2f is half of expf's instructions, of which reading 16-bit logits at full speed leaves about a
// dozen for each; its error grows with -d, as the term itself fades.
__device__ __forceinline__ float power(float d) { return exp2f(d * kLog2E); }

// A largest value and a sum of exponentials relative to it.
struct Running {
  float peak, total;

  __device__ __forceinline__ void add(float value) {
    if (value > peak) {
      total = total * power(peak - value) + 1.f;
      peak = value;
    } else if (value != -INFINITY) {
      total += power(value - peak);
    }
  }
};

// One block a row, one reading.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) forward_kernel(CrossEntropyForward a) {
  SHARED(float, scratch, 3 * kWarp);
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(a.logits) + row * a.stride;
  Running running{-INFINITY, 0.f};
  float plain = 0.f;
  const int64_t whole = a.columns / N * N;
  const auto take = [&](const Pack<T, N>& p) {
    float top = p.v[0];
#pragma unroll
    for (int j = 0; j < N; ++j) top = fmaxf(top, p.v[j]);
    if (a.sum) {
#pragma unroll
      for (int j = 0; j < N; ++j) plain += p.v[j];
    }
    // One rescaling for the pack, not one for each element.
    if (top > running.peak) {
      running.total *= power(running.peak - top);
      running.peak = top;
    }
    if (running.peak != -INFINITY) {
#pragma unroll
      for (int j = 0; j < N; ++j) running.total += power(p.v[j] - running.peak);
    }
  };
  // Two accesses are on their way before the first is used.
  const int64_t step = int64_t(blockDim.x) * N;
  for (int64_t i = int64_t(threadIdx.x) * N; i < whole; i += 2 * step) {
    const bool more = i + step < whole;
    const Words<T, N> first = load_words<N>(x + i);
    Words<T, N> second{};
    if (more) second = load_words<N>(x + i + step);
    take(widen(first));
    if (more) take(widen(second));
  }
  for (int64_t i = whole + threadIdx.x; i < a.columns; i += blockDim.x) {
    const float value = static_cast<float>(x[i]);
    running.add(value);
    plain += value;
  }
  const float peak = block_reduce<Max>(running.peak, scratch);
  const float own = running.total == 0.f ? 0.f : running.total * expf(running.peak - peak);
  const float total = block_reduce<Sum>(own, scratch + kWarp);
  if (a.sum) plain = block_reduce<Sum>(plain, scratch + 2 * kWarp);
  if (threadIdx.x == 0) {
    const int64_t label = a.labels[row] - a.first;
    a.peak[row] = peak;
    a.total[row] = total;
    a.target[row] = label >= 0 && label < a.columns ? static_cast<float>(x[label]) : 0.f;
    if (a.sum) a.sum[row] = plain;
  }
}

// Grid: rows along x, parts of a row along y. Every element is read and written by one thread: gradient may be logits.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) backward_kernel(CrossEntropyBackward a) {
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(a.logits) + row * a.stride;
  T* out = static_cast<T*>(a.gradient) + row * a.stride;
  const float log_z = a.log_z[row], scale = a.scale[row], weight = a.weight[row];
  const float uniform = weight * a.uniform, hit = weight * (1.f - a.smoothing);
  const int64_t label = a.labels[row] - a.first;
  const int64_t step = int64_t(gridDim.y) * blockDim.x * N;
  const bool any = scale != 0.f || weight != 0.f;
  const auto write = [&](int64_t i, Pack<T, N> p) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float value = scale * expf(p.v[j] - log_z) - uniform - (i + j == label ? hit : 0.f);
      p.v[j] = any && i + j < a.columns ? value : 0.f;
    }
    store_pack(out + i, p);
  };
  // Two accesses are on their way before the first is used.
  for (int64_t i = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * N; i < a.stride; i += 2 * step) {
    const int64_t next = i + step;
    Words<T, N> first{}, second{};
    if (any && i < a.columns) first = load_words<N>(x + i);
    if (any && next < a.columns) second = load_words<N>(x + next);
    write(i, widen(first));
    if (next < a.stride) write(next, widen(second));
  }
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& a, void* stream) {
  if (a.rows == 0) return;
  for_dtype(
      a.dtype, [&](auto type) { return packable<decltype(type)>(a.stride, a.logits); },
      [&](auto type, auto count) {
        constexpr int N = decltype(count)::value;
        const int64_t threads = threads_for(a.columns / N, 1);
        LAUNCH((forward_kernel<decltype(type), N>), unsigned(a.rows), int(threads < kThreads ? threads : kThreads),
               stream, a);
      });
}

void cross_entropy_backward(const CrossEntropyBackward& a, void* stream) {
  if (a.rows == 0 || a.stride == 0) return;
  for_dtype(
      a.dtype, [&](auto type) { return packable<decltype(type)>(a.stride, a.logits, a.gradient); },
      [&](auto type, auto count) {
        constexpr int N = decltype(count)::value;
        int64_t threads = threads_for(a.stride / N, 1);
        threads = threads < kThreads ? threads : kThreads;
        int64_t parts = (a.stride / N + threads * 4 - 1) / (threads * 4);  // about four accesses a thread
        parts = parts < 1 ? 1 : parts > 65535 ? 65535 : parts;
        LAUNCH((backward_kernel<decltype(type), N>), dim3(unsigned(a.rows), unsigned(parts)), unsigned(threads), stream,
               a);
      });
}

}  // namespace megalm::cuda
