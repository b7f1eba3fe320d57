#include "common/kernel.cuh"
#include "norm/op.h"

namespace megalm::cuda {
namespace {

// Accesses of a row that a thread holds in registers; what is beyond them is read again.
constexpr int kHeld = 4;

template <typename T, int N>
struct Row {
  const T* x;
  const T* residual;
  T* h;

  __device__ Pack<T, N> first_load(int i) const {
    Pack<T, N> a = load_pack<N>(x + int64_t(i) * N);
    if (residual) {
      const Pack<T, N> b = load_pack<N>(residual + int64_t(i) * N);
#pragma unroll
      for (int j = 0; j < N; ++j) a.v[j] = float(T(a.v[j] + b.v[j]));
      store_pack(h + int64_t(i) * N, a);
    }
    return a;
  }
  __device__ Pack<T, N> load_again(int i) const { return load_pack<N>((residual ? h : x) + int64_t(i) * N); }
};

// One block a row.
template <typename T, int N, bool kLayerNorm>
__global__ void __launch_bounds__(1024) forward_kernel(NormForward a) {
  SHARED(float, scratch, kWarp);
  const int packs = int(a.size / N), step = int(blockDim.x), me = int(threadIdx.x);
  const int64_t at = int64_t(blockIdx.x) * a.size;
  const Row<T, N> row{static_cast<const T*>(a.x) + at, a.residual ? static_cast<const T*>(a.residual) + at : nullptr,
                      a.residual ? static_cast<T*>(a.h) + at : nullptr};
  Pack<T, N> held[kHeld];
  float total = 0.f, squares = 0.f;
  const auto add = [&](const Pack<T, N>& p) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      total += p.v[j];
      squares += p.v[j] * p.v[j];
    }
  };
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int i = me + k * step;
    if (i < packs) {
      held[k] = row.first_load(i);
      add(held[k]);
    }
  }
  for (int i = me + kHeld * step; i < packs; i += step) add(row.first_load(i));
  float mean = 0.f;
  if constexpr (kLayerNorm) {
    // The deviations are summed apart: no cancellation when |mean| is large.
    mean = block_reduce<Sum>(total, scratch) / float(a.size);
    squares = 0.f;
    const auto deviate = [&](const Pack<T, N>& p) {
#pragma unroll
      for (int j = 0; j < N; ++j) squares += (p.v[j] - mean) * (p.v[j] - mean);
    };
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (me + k * step < packs) deviate(held[k]);
    }
    for (int i = me + kHeld * step; i < packs; i += step) deviate(row.load_again(i));
  }
  const float rstd = rsqrtf(block_reduce<Sum>(squares, scratch) / float(a.size) + a.eps);
  if (threadIdx.x == 0) {
    a.rstd[blockIdx.x] = rstd;
    if (kLayerNorm) a.mean[blockIdx.x] = mean;
  }
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  T* y = static_cast<T*>(a.y) + at;
  const auto write = [&](int i, Pack<T, N> p) {
    const Pack<T, N> w = load_pack<N>(weight + int64_t(i) * N);
#pragma unroll
    for (int j = 0; j < N; ++j) p.v[j] = (p.v[j] - mean) * rstd * w.v[j];
    if (bias) {
      const Pack<T, N> b = load_pack<N>(bias + int64_t(i) * N);
#pragma unroll
      for (int j = 0; j < N; ++j) p.v[j] += b.v[j];
    }
    store_pack(y + int64_t(i) * N, p);
  };
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int i = me + k * step;
    if (i < packs) write(i, held[k]);
  }
  for (int i = me + kHeld * step; i < packs; i += step) write(i, row.load_again(i));
}

// A block takes every gridDim.x-th row and sums its share of dweight and dbias: the first kHeld accesses of a thread in
// registers, those beyond in `partial`, where each address belongs to one thread. The bound's 1 lets the compiler take
// the registers that it needs: left to itself it spilled for more blocks at a time.
template <typename T, int N, bool kLayerNorm>
__global__ void __launch_bounds__(512, 1) backward_kernel(NormBackward a) {
  SHARED(float, scratch, 2 * kWarp);
  const int packs = int(a.size / N), step = int(blockDim.x), me = int(threadIdx.x);
  const T* weight = static_cast<const T*>(a.weight);
  float* dweight = a.partial + int64_t(blockIdx.x) * 2 * (a.size + kNormSlack);
  float* dbias = dweight + a.size + kNormSlack;
  float held_weight[kHeld][N] = {}, held_bias[kLayerNorm ? kHeld : 1][N] = {};
  for (int i = me + kHeld * step; i < packs; i += step) {
    for (int j = 0; j < N; ++j) dweight[int64_t(i) * N + j] = dbias[int64_t(i) * N + j] = 0.f;
  }
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.size;
    const T* h = static_cast<const T*>(a.h) + row * a.size;
    const T* dh = a.dh ? static_cast<const T*>(a.dh) + row * a.size : nullptr;
    T* dx = static_cast<T*>(a.dx) + row * a.size;
    const float rstd = a.rstd[row], mean = kLayerNorm ? a.mean[row] : 0.f;
    float dot = 0.f, g_mean = 0.f;
    for (int i = me; i < packs; i += step) {
      const Pack<T, N> hp = load_pack<N>(h + int64_t(i) * N), gp = load_pack<N>(dy + int64_t(i) * N),
                       wp = load_pack<N>(weight + int64_t(i) * N);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float g = gp.v[j] * wp.v[j];
        dot += g * (hp.v[j] - mean) * rstd;
        g_mean += g;
      }
    }
    dot = block_reduce<Sum>(dot, scratch) / float(a.size);
    g_mean = kLayerNorm ? block_reduce<Sum>(g_mean, scratch + kWarp) / float(a.size) : 0.f;
    // The second reading comes from the cache.
    const auto finish = [&](int i, float* sum_weight, float* sum_bias) {
      Pack<T, N> hp = load_pack<N>(h + int64_t(i) * N);
      const Pack<T, N> gp = load_pack<N>(dy + int64_t(i) * N), wp = load_pack<N>(weight + int64_t(i) * N);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float hat = (hp.v[j] - mean) * rstd;
        sum_weight[j] += gp.v[j] * hat;
        if (kLayerNorm) sum_bias[j] += gp.v[j];
        hp.v[j] = rstd * (gp.v[j] * wp.v[j] - g_mean - hat * dot);
      }
      if (dh) {
        const Pack<T, N> through = load_pack<N>(dh + int64_t(i) * N);
#pragma unroll
        for (int j = 0; j < N; ++j) hp.v[j] += through.v[j];
      }
      store_pack(dx + int64_t(i) * N, hp);
    };
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int i = me + k * step;
      if (i < packs) finish(i, held_weight[k], held_bias[kLayerNorm ? k : 0]);
    }
    for (int i = me + kHeld * step; i < packs; i += step) {
      finish(i, dweight + int64_t(i) * N, dbias + int64_t(i) * N);
    }
  }
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int i = me + k * step;
    if (i < packs) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        dweight[int64_t(i) * N + j] = held_weight[k][j];
        if (kLayerNorm) dbias[int64_t(i) * N + j] = held_bias[kLayerNorm ? k : 0][j];
      }
    }
  }
}

}  // namespace

void norm_forward(const NormForward& a, void* stream) {
  if (a.rows == 0) return;
  for_dtype(
      a.dtype, [&](auto type) { return packable<decltype(type)>(a.size, a.x, a.residual, a.weight, a.bias, a.h, a.y); },
      [&](auto type, auto count) {
        using T = decltype(type);
        constexpr int N = decltype(count)::value;
        const int threads = threads_for(a.size / N, 2);
        if (a.layer_norm) {
          LAUNCH((forward_kernel<T, N, true>), unsigned(a.rows), threads, stream, a);
        } else {
          LAUNCH((forward_kernel<T, N, false>), unsigned(a.rows), threads, stream, a);
        }
      });
}

void norm_backward(const NormBackward& a, void* stream) {
  for_dtype(
      a.dtype, [&](auto type) { return packable<decltype(type)>(a.size, a.dy, a.dh, a.h, a.weight, a.dx); },
      [&](auto type, auto count) {
        using T = decltype(type);
        constexpr int N = decltype(count)::value;
        const int64_t blocks = a.rows < a.row_blocks ? a.rows : a.row_blocks;
        int threads = threads_for(a.size / N, 2);
        threads = threads > 512 ? 512 : threads;
        if (blocks == 0) {
          // No rows: the sums below are over nothing.
        } else if (a.layer_norm) {
          LAUNCH((backward_kernel<T, N, true>), unsigned(blocks), threads, stream, a);
        } else {
          LAUNCH((backward_kernel<T, N, false>), unsigned(blocks), threads, stream, a);
        }
        const dim3 grid(unsigned((a.size + kWarp - 1) / kWarp), a.dbias ? 2 : 1), block(kWarp, kSumRows);
        LAUNCH((sum_rows_kernel<T>), grid, block, stream, a.partial, blocks, 2 * (a.size + kNormSlack),
               a.size + kNormSlack, a.size, static_cast<T*>(a.dweight), static_cast<T*>(a.dbias));
      });
}

}  // namespace megalm::cuda
