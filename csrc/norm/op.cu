#include "common/kernel.cuh"
#include "norm/op.h"

namespace megalm::cuda {
namespace {

constexpr int kThreads = 512;
// Accesses of a row that a thread holds in registers; what is beyond them is read again.
constexpr int kHeld = 4;

template <typename T, int N>
struct Row {
  const T* x;
  const T* residual;
  T* h;

  // x with the residual, rounded; h is written.
  __device__ Pack<T, N> join(int i, const Words<T, N>& mine, const Words<T, N>& other) const {
    Pack<T, N> a = widen(mine);
    if (residual) {
      const Pack<T, N> b = widen(other);
#pragma unroll
      for (int j = 0; j < N; ++j) a.v[j] = float(T(a.v[j] + b.v[j]));
      store_pack(h + int64_t(i) * N, a);
    }
    return a;
  }
  __device__ Words<T, N> load_x(int i) const { return load_words<N>(x + int64_t(i) * N); }
  __device__ Words<T, N> load_residual(int i) const {
    return residual ? load_words<N>(residual + int64_t(i) * N) : Words<T, N>{};
  }
  __device__ Pack<T, N> load_again(int i) const { return load_pack<N>((residual ? h : x) + int64_t(i) * N); }
};

// One block a row.
template <typename T, int N, bool kLayerNorm>
__global__ void __launch_bounds__(kThreads) forward_kernel(NormForward a) {
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
  // Two accesses, which is what a thread has of a row of up to 16 KB, are on their way before the first is used and
  // before anything is stored.
#pragma unroll
  for (int first = 0; first < kHeld; first += 2) {
    Words<T, N> mine[2], other[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = me + (first + k) * step;
      if (i < packs) {
        mine[k] = row.load_x(i);
        other[k] = row.load_residual(i);
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = me + (first + k) * step;
      if (i < packs) {
        held[first + k] = row.join(i, mine[k], other[k]);
        add(held[first + k]);
      }
    }
  }
  for (int i = me + kHeld * step; i < packs; i += step) add(row.join(i, row.load_x(i), row.load_residual(i)));
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

// Adds a pack's part to the row's two sums that dx needs: of dy w (h - mean) rstd, and of dy w.
template <typename T, int N>
__device__ void add_sums(const Pack<T, N>& h, const Pack<T, N>& dy, const Pack<T, N>& weight, float mean, float rstd,
                         float& dot, float& g_mean) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float g = dy.v[j] * weight.v[j];
    dot += g * (h.v[j] - mean) * rstd;
    g_mean += g;
  }
}

// A block takes every gridDim.x-th row and sums its share of dweight and dbias. A row has at most kAhead accesses of a
// thread, which stay in registers from the first use to the last, and the next row's are on their way meanwhile:
// between them a block always waits for a reduction. The bound's 1 lets the compiler take the registers that it needs.
constexpr int kAhead = 2;

template <typename T, int N, bool kLayerNorm>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(NormBackward a) {
  SHARED(float, scratch, 2 * kWarp);
  const int packs = int(a.size / N), step = int(blockDim.x), me = int(threadIdx.x);
  const T* const dy = static_cast<const T*>(a.dy);
  const T* const h = static_cast<const T*>(a.h);
  const T* const dh = static_cast<const T*>(a.dh);
  Words<T, N> weight[kAhead] = {}, next_h[kAhead] = {}, next_dy[kAhead] = {};
  float lane_rstd = 0.f, lane_mean = 0.f;
  float sum_weight[kAhead][N] = {}, sum_bias[kLayerNorm ? kAhead : 1][N] = {};
  const auto fetch = [&](int64_t row) {
    if (row >= a.rows) return;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = me + k * step;
      if (i < packs) {
        next_h[k] = load_words<N>(h + row * a.size + int64_t(i) * N);
        next_dy[k] = load_words<N>(dy + row * a.size + int64_t(i) * N);
      }
    }
  };
#pragma unroll
  for (int k = 0; k < kAhead; ++k) {
    if (me + k * step < packs) weight[k] = load_words<N>(static_cast<const T*>(a.weight) + int64_t(me + k * step) * N);
  }
  fetch(blockIdx.x);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x, ++turn) {
    // Each lane has the statistics of one of the next 32 rows: a load for each row would be waited for at once.
    if (turn % kWarp == 0) {
      const int64_t mine = row + int64_t(me % kWarp) * gridDim.x;
      if (mine < a.rows) {
        lane_rstd = a.rstd[mine];
        if (kLayerNorm) lane_mean = a.mean[mine];
      }
    }
    Words<T, N> row_h[kAhead], row_dy[kAhead], row_dh[kAhead] = {};
    const float rstd = __shfl_sync(kFullMask, lane_rstd, turn % kWarp);
    const float mean = kLayerNorm ? __shfl_sync(kFullMask, lane_mean, turn % kWarp) : 0.f;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      row_h[k] = next_h[k];
      row_dy[k] = next_dy[k];
      const int i = me + k * step;
      if (dh && i < packs) row_dh[k] = load_words<N>(dh + row * a.size + int64_t(i) * N);
    }
    fetch(row + gridDim.x);
    float dot = 0.f, g_mean = 0.f;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (me + k * step >= packs) continue;
      const Pack<T, N> hp = widen(row_h[k]), gp = widen(row_dy[k]), wp = widen(weight[k]);
      add_sums(hp, gp, wp, mean, rstd, dot, g_mean);
    }
    dot = block_reduce<Sum>(dot, scratch) / float(a.size);
    g_mean = kLayerNorm ? block_reduce<Sum>(g_mean, scratch + kWarp) / float(a.size) : 0.f;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = me + k * step;
      if (i >= packs) continue;
      Pack<T, N> hp = widen(row_h[k]);
      const Pack<T, N> gp = widen(row_dy[k]), wp = widen(weight[k]), through = widen(row_dh[k]);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float hat = (hp.v[j] - mean) * rstd;
        sum_weight[k][j] += gp.v[j] * hat;
        if (kLayerNorm) sum_bias[kLayerNorm ? k : 0][j] += gp.v[j];
        hp.v[j] = rstd * (gp.v[j] * wp.v[j] - g_mean - hat * dot);
        if (dh) hp.v[j] += through.v[j];
      }
      store_pack(static_cast<T*>(a.dx) + row * a.size + int64_t(i) * N, hp);
    }
  }
  float* dweight = a.partial + int64_t(blockIdx.x) * 2 * (a.size + kNormSlack);
  float* dbias = dweight + a.size + kNormSlack;
#pragma unroll
  for (int k = 0; k < kAhead; ++k) {
    const int i = me + k * step;
    if (i >= packs) continue;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      dweight[int64_t(i) * N + j] = sum_weight[k][j];
      if (kLayerNorm) dbias[int64_t(i) * N + j] = sum_bias[kLayerNorm ? k : 0][j];
    }
  }
}

// Rows longer than that: read twice, the second time from the cache. The first kHeld accesses of a thread are summed in
// registers, those beyond in `partial`, where each address belongs to one thread.
template <typename T, int N, bool kLayerNorm>
__global__ void __launch_bounds__(kThreads, 1) backward_long_kernel(NormBackward a) {
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
      add_sums(hp, gp, wp, mean, rstd, dot, g_mean);
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
        int threads = threads_for(a.size / N, 2);
        threads = threads > kThreads ? kThreads : threads;
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
        int threads = threads_for(a.size / N, kAhead);
        threads = threads > kThreads ? kThreads : threads;
        const auto run = [&](auto layer_norm) {
          constexpr bool kLayerNorm = decltype(layer_norm)::value != 0;
          if (a.size / N <= kAhead * threads) {
            LAUNCH((backward_kernel<T, N, kLayerNorm>), unsigned(blocks), threads, stream, a);
          } else {
            LAUNCH((backward_long_kernel<T, N, kLayerNorm>), unsigned(blocks), threads, stream, a);
          }
        };
        if (blocks == 0) {
          // No rows: the sums below are over nothing.
        } else if (a.layer_norm) {
          run(Constant<1>{});
        } else {
          run(Constant<0>{});
        }
        const dim3 grid(unsigned((a.size + kWarp - 1) / kWarp), a.dbias ? 2 : 1), block(kWarp, kSumRows);
        LAUNCH((sum_rows_kernel<T>), grid, block, stream, a.partial, blocks, 2 * (a.size + kNormSlack),
               a.size + kNormSlack, a.size, static_cast<T*>(a.dweight), static_cast<T*>(a.dbias));
      });
}

}  // namespace megalm::cuda
