#include "activation/op.h"
#include "common/kernel.cuh"

namespace megalm::cuda {
namespace {

struct Point {
  float value, slope;
};

// value and 1 - value of 1 / (1 + exp(-v)), without the cancellation near 1.
__device__ __forceinline__ Point sigmoid_and_rest(float v) {
  const float e = expf(-fminf(fmaxf(v, -80.f), 80.f));
  const float s = 1.f / (1.f + e);
  return {v != v ? v : s, e * s};
}

struct Silu {
  __device__ static Point both(float a) {
    const Point s = sigmoid_and_rest(a);
    return {a * s.value, s.value * (1.f + a * s.slope)};
  }
};

struct Gelu {
  __device__ static Point both(float a) {
    const float cdf = 0.5f * (1.f + erff(a * 0.707106781f));
    return {a * cdf, cdf + a * 0.398942280f * expf(-0.5f * a * a)};
  }
};

// 1/2 (1 + tanh u) is sigmoid(2 u).
struct GeluTanh {
  __device__ static Point both(float a) {
    const Point s = sigmoid_and_rest(a * (1.59576912f + 0.0713548163f * (a * a)));
    return {a * s.value, s.value * (1.f + a * s.slope * (1.59576912f + 0.214064449f * (a * a)))};
  }
};

// Grid: rows along x, parts of a row along y.
template <typename T, int N, typename F, bool kGated>
__global__ void __launch_bounds__(256) forward_kernel(ActivationForward a) {
  const int64_t i = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (i >= a.size) return;
  const T* x = static_cast<const T*>(a.x) + int64_t(blockIdx.x) * a.size * (kGated ? 2 : 1) + i;
  const Words<T, N> first = load_words<N>(x);
  Pack<T, N> p;
  if constexpr (kGated) {
    const Words<T, N> second = load_words<N>(x + a.size);
    const Pack<T, N> up = widen(second);
    p = widen(first);
#pragma unroll
    for (int j = 0; j < N; ++j) p.v[j] = F::both(p.v[j]).value * up.v[j];
  } else {
    p = widen(first);
    if (a.bias) {
      const Pack<T, N> b = load_pack<N>(static_cast<const T*>(a.bias) + i);
#pragma unroll
      for (int j = 0; j < N; ++j) p.v[j] += b.v[j];
    }
#pragma unroll
    for (int j = 0; j < N; ++j) p.v[j] = F::both(p.v[j]).value;
  }
  store_pack(static_cast<T*>(a.y) + int64_t(blockIdx.x) * a.size + i, p);
}

template <typename T, int N, typename F, bool kGated>
__global__ void __launch_bounds__(256) backward_kernel(ActivationBackward a) {
  const int64_t i = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (i >= a.size) return;
  const int64_t at = int64_t(blockIdx.x) * a.size * (kGated ? 2 : 1) + i;
  const T* x = static_cast<const T*>(a.x) + at;
  T* dx = static_cast<T*>(a.dx) + at;
  Pack<T, N> g = load_pack<N>(static_cast<const T*>(a.dy) + int64_t(blockIdx.x) * a.size + i);
  Pack<T, N> p = load_pack<N>(x);
  if constexpr (kGated) {
    Pack<T, N> up = load_pack<N>(x + a.size);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Point f = F::both(p.v[j]);
      p.v[j] = g.v[j] * up.v[j] * f.slope;
      up.v[j] = g.v[j] * f.value;
    }
    store_pack(dx + a.size, up);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) p.v[j] = g.v[j] * F::both(p.v[j]).slope;
  }
  store_pack(dx, p);
}

// Plain with a bias. Grid: row blocks along x, parts of a row along y; each takes every gridDim.x-th row and sums its
// share of the bias' gradient in registers.
template <typename T, int N, typename F>
__global__ void __launch_bounds__(256) backward_bias_kernel(ActivationBackward a) {
  const int64_t i = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (i >= a.size) return;
  const Pack<T, N> bias = load_pack<N>(static_cast<const T*>(a.bias) + i);
  float sums[N] = {};
  // The next row's are on their way while one is worked on.
  Words<T, N> dy{}, x{};
  const auto fetch = [&](int64_t row) {
    if (row >= a.rows) return;
    dy = load_words<N>(static_cast<const T*>(a.dy) + row * a.size + i);
    x = load_words<N>(static_cast<const T*>(a.x) + row * a.size + i);
  };
  fetch(blockIdx.x);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const int64_t at = row * a.size + i;
    const Pack<T, N> g = widen(dy);
    Pack<T, N> p = widen(x);
    fetch(row + gridDim.x);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      p.v[j] = g.v[j] * F::both(p.v[j] + bias.v[j]).slope;
      sums[j] += p.v[j];
    }
    store_pack(static_cast<T*>(a.dx) + at, p);
  }
#pragma unroll
  for (int j = 0; j < N; ++j) a.partial[int64_t(blockIdx.x) * a.size + i + j] = sums[j];
}

template <typename Body>
void for_kind(Activation kind, bool gated, Body&& body) {
  const auto run = [&](auto f) {
    if (gated) {
      body(f, Constant<1>{});
    } else {
      body(f, Constant<0>{});
    }
  };
  switch (kind) {
    case Activation::kSilu:
      return run(Silu{});
    case Activation::kGelu:
      return run(Gelu{});
    case Activation::kGeluTanh:
      return run(GeluTanh{});
  }
}

template <int N>
dim3 grid_for(int64_t rows, int64_t size, int threads) {
  return dim3(unsigned(rows), unsigned((size / N + threads - 1) / threads));
}

}  // namespace

void activation_forward(const ActivationForward& a, void* stream) {
  if (a.rows == 0 || a.size == 0) return;
  for_dtype(
      a.dtype, [&](auto type) { return packable<decltype(type)>(a.size, a.x, a.bias, a.y); },
      [&](auto type, auto count) {
        constexpr int N = decltype(count)::value;
        for_kind(a.kind, a.gated, [&](auto f, auto gated) {
          const int threads = a.size / N < 256 ? threads_for(a.size / N, 1) : 256;
          LAUNCH((forward_kernel<decltype(type), N, decltype(f), decltype(gated)::value != 0>),
                 grid_for<N>(a.rows, a.size, threads), threads, stream, a);
        });
      });
}

void activation_backward(const ActivationBackward& a, void* stream) {
  if (a.size == 0 || (a.rows == 0 && !a.bias)) return;
  for_dtype(
      a.dtype, [&](auto type) { return packable<decltype(type)>(a.size, a.dy, a.x, a.bias, a.dx); },
      [&](auto type, auto count) {
        using T = decltype(type);
        constexpr int N = decltype(count)::value;
        const int64_t blocks = a.rows < a.row_blocks ? a.rows : a.row_blocks;
        for_kind(a.kind, a.gated, [&](auto f, auto gated) {
          constexpr bool kGated = decltype(gated)::value != 0;
          const int threads = a.size / N < 256 ? threads_for(a.size / N, 1) : 256;
          if constexpr (!kGated) {
            if (a.bias) {
              if (blocks) {
                LAUNCH((backward_bias_kernel<T, N, decltype(f)>), grid_for<N>(blocks, a.size, threads), threads, stream,
                       a);
              }
              const dim3 grid(unsigned((a.size + kWarp - 1) / kWarp)), block(kWarp, kSumRows);
              LAUNCH((sum_rows_kernel<T>), grid, block, stream, a.partial, blocks, a.size, int64_t(0), a.size,
                     static_cast<T*>(a.dbias), static_cast<T*>(nullptr));
              return;
            }
          }
          LAUNCH((backward_kernel<T, N, decltype(f), kGated>), grid_for<N>(a.rows, a.size, threads), threads, stream,
                 a);
        });
      });
}

}  // namespace megalm::cuda
