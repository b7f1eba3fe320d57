#include "common/kernel.cuh"
#include "gradient_norm/op.h"

namespace megalm::cuda {
namespace {

constexpr int kThreads = 256;

// One block for each kGradientNormBlock elements.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) block_kernel(GradientNorm a) {
  SHARED(double, scratch, 2 * kWarp);
  const int64_t begin = int64_t(blockIdx.x) * kGradientNormBlock;
  const int64_t end = begin + kGradientNormBlock < a.size ? begin + kGradientNormBlock : a.size;
  const T* x = static_cast<const T*>(a.x);
  float squares = 0.f;
  int bad = 0;
  for (int64_t i = begin + int64_t(threadIdx.x) * N; i < end; i += kThreads * N) {
    const Pack<T, N> p = load_pack<N>(x + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      squares += p.v[j] * p.v[j];
      bad += !(fabsf(p.v[j]) <= 3.40282347e38f);
    }
  }
  const double total = block_reduce<Sum>(double(squares), scratch);
  const double count = block_reduce<Sum>(double(bad), scratch + kWarp);
  if (threadIdx.x == 0) {
    a.partial[2 * blockIdx.x] = total;
    a.partial[2 * blockIdx.x + 1] = count;
  }
}

// One block adds all partial sums in a fixed order.
__global__ void __launch_bounds__(kThreads) join_kernel(const double* partial, int64_t blocks, double* result) {
  SHARED(double, scratch, 2 * kWarp);
  double total = 0., count = 0.;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
    total += partial[2 * i];
    count += partial[2 * i + 1];
  }
  total = block_reduce<Sum>(total, scratch);
  count = block_reduce<Sum>(count, scratch + kWarp);
  if (threadIdx.x == 0) {
    result[0] += total;
    result[1] += count;
  }
}

}  // namespace

void gradient_norm(const GradientNorm& a, void* stream) {
  const int64_t blocks = (a.size + kGradientNormBlock - 1) / kGradientNormBlock;
  if (blocks == 0) return;
  for_dtype(
      a.dtype, [&](auto type) { return packable<decltype(type)>(a.size, a.x); },
      [&](auto type, auto count) {
        LAUNCH((block_kernel<decltype(type), decltype(count)::value>), unsigned(blocks), kThreads, stream, a);
      });
  LAUNCH(join_kernel, 1, kThreads, stream, a.partial, blocks, a.result);
}

}  // namespace megalm::cuda
