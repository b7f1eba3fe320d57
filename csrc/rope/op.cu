#include "common/kernel.cuh"
#include "rope/op.h"

namespace megalm::cuda {
namespace {

// One block a token; a thread turns the pairs of one access (half layout: N pairs, interleaved: N / 2) of one head.
template <typename T, int N, bool kInterleaved>
__global__ void __launch_bounds__(256) rotary_kernel(Rotary a) {
  const int64_t token = blockIdx.x, s = token / a.batch, b = token % a.batch;
  const T* x = static_cast<const T*>(a.x) + s * a.sequence_stride + b * a.batch_stride;
  T* y = static_cast<T*>(a.y) + s * a.y_sequence_stride + b * a.y_batch_stride;
  const float* cos = a.cos + s * a.table_sequence_stride + b * a.table_batch_stride;
  const float* sin = a.sin + s * a.table_sequence_stride + b * a.table_batch_stride;
  const float sign = a.inverse ? -1.f : 1.f;
  const int each = int(kInterleaved ? a.pairs * 2 / N : a.pairs / N);  // accesses of a head
  for (int i = threadIdx.x; i < each * a.heads; i += blockDim.x) {
    const int64_t head = i / each;
    const int at = i % each * N;
    const T* in = x + head * a.head_stride + at;
    T* out = y + head * a.y_head_stride + at;
    if constexpr (kInterleaved) {
      Pack<T, N> p = load_pack<N>(in);
#pragma unroll
      for (int j = 0; j < N; j += 2) {
        const float c = cos[(at + j) / 2], w = sign * sin[(at + j) / 2], first = p.v[j], second = p.v[j + 1];
        p.v[j] = first * c - second * w;
        p.v[j + 1] = second * c + first * w;
      }
      store_pack(out, p);
    } else {
      Pack<T, N> first = load_pack<N>(in), second = load_pack<N>(in + a.pairs);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float c = cos[at + j], w = sign * sin[at + j], kept = first.v[j];
        first.v[j] = kept * c - second.v[j] * w;
        second.v[j] = second.v[j] * c + kept * w;
      }
      store_pack(out, first);
      store_pack(out + a.pairs, second);
    }
  }
  const int rest = int(a.size - 2 * a.pairs);
  if (x == y) return;
  for (int i = threadIdx.x; i < rest * a.heads; i += blockDim.x) {
    const int64_t head = i / rest, at = 2 * a.pairs + i % rest;
    y[head * a.y_head_stride + at] = x[head * a.head_stride + at];
  }
}

template <typename T, int N>
void launch(const Rotary& a, void* stream) {
  const int threads = threads_for(a.pairs * a.heads / N, 1);
  const unsigned tokens = unsigned(a.sequence * a.batch);
  if (a.interleaved) {
    LAUNCH((rotary_kernel<T, (N > 1 ? N : 2), true>), tokens, threads > 256 ? 256 : threads, stream, a);
  } else {
    LAUNCH((rotary_kernel<T, N, false>), tokens, threads > 256 ? 256 : threads, stream, a);
  }
}

// A pair of the interleaved layout is one access at least: its two elements must be aligned together. Where they are
// not, single elements are read.
template <typename T>
__global__ void __launch_bounds__(256) rotary_unaligned_kernel(Rotary a) {
  const int64_t token = blockIdx.x, s = token / a.batch, b = token % a.batch;
  const T* x = static_cast<const T*>(a.x) + s * a.sequence_stride + b * a.batch_stride;
  T* y = static_cast<T*>(a.y) + s * a.y_sequence_stride + b * a.y_batch_stride;
  const int64_t table = s * a.table_sequence_stride + b * a.table_batch_stride;
  for (int64_t i = threadIdx.x; i < a.size * a.heads; i += blockDim.x) {
    const int64_t head = i / a.size, at = i % a.size;
    const T* in = x + head * a.head_stride;
    T* out = y + head * a.y_head_stride;
    if (at >= 2 * a.pairs) {
      out[at] = in[at];
    } else if (at % 2 == 0) {
      const float c = a.cos[table + at / 2], w = a.inverse ? -a.sin[table + at / 2] : a.sin[table + at / 2];
      const float first = static_cast<float>(in[at]), second = static_cast<float>(in[at + 1]);
      out[at] = static_cast<T>(first * c - second * w);
      out[at + 1] = static_cast<T>(second * c + first * w);
    }
  }
}

}  // namespace

void rotary(const Rotary& a, void* stream) {
  if (a.sequence * a.batch * a.heads * a.size == 0) return;
  const auto strides_fit = [&](int64_t n) {
    return a.size % n == 0 && a.sequence_stride % n == 0 && a.batch_stride % n == 0 && a.head_stride % n == 0 &&
           a.y_sequence_stride % n == 0 && a.y_batch_stride % n == 0 && a.y_head_stride % n == 0;
  };
  for_dtype(
      a.dtype,
      [&](auto type) {
        constexpr int64_t n = 16 / sizeof(type);
        return packable<decltype(type)>(a.interleaved ? 2 * a.pairs : a.pairs, a.x, a.y) && strides_fit(n);
      },
      [&](auto type, auto count) {
        using T = decltype(type);
        const unsigned long pair_bytes = 2 * sizeof(T);
        const bool pairs_aligned = strides_fit(2) && reinterpret_cast<uintptr_t>(a.x) % pair_bytes == 0 &&
                                   reinterpret_cast<uintptr_t>(a.y) % pair_bytes == 0;
        if (a.interleaved && !pairs_aligned) {
          LAUNCH((rotary_unaligned_kernel<T>), unsigned(a.sequence * a.batch), 256, stream, a);
        } else {
          launch<T, decltype(count)::value>(a, stream);
        }
      });
}

}  // namespace megalm::cuda
