#include "common/kernel.cuh"
#include "sequence/op.h"

namespace megalm::cuda {
namespace {

constexpr int kThreads = 256, kTogether = 4;

// Grid: rows [n0, n1] along x, parts of the n2 runs along y. W: the widest access that every run begins and ends on.
template <typename W>
__global__ void __launch_bounds__(kThreads) move_kernel(Move a) {
  const int64_t i = blockIdx.x / a.n[1], j = blockIdx.x % a.n[1], packs = a.run / int64_t(sizeof(W));
  const char* from = a.from + i * a.from_stride[0] + j * a.from_stride[1];
  char* to = a.to + i * a.to_stride[0] + j * a.to_stride[1];
  // From access to access by addition: a division of 64 bits takes longer than the copy.
  const int64_t step = int64_t(gridDim.y) * blockDim.x, runs = step / packs, rest = step % packs;
  const int64_t start = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
  int64_t k = start / packs, pack = start % packs;
  // kTogether accesses are on their way before the first is used.
  while (k < a.n[2]) {
    W words[kTogether];
    char* places[kTogether];
    int count = 0;
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      if (k >= a.n[2]) break;
      const char* source = from + k * a.from_stride[2] + pack * int64_t(sizeof(W));
      places[n] = to + k * a.to_stride[2] + pack * int64_t(sizeof(W));
      CHECK_ALIGNED(source, sizeof(W));
      CHECK_ALIGNED(places[n], sizeof(W));
      words[n] = *reinterpret_cast<const W*>(source);
      ++count;
      k += runs;
      pack += rest;
      if (pack >= packs) {
        pack -= packs;
        ++k;
      }
    }
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      if (n < count) *reinterpret_cast<W*>(places[n]) = words[n];
    }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) sum_kernel(SumParts a) {
  const T* x = static_cast<const T*>(a.x);
  for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N; i < a.count;
       i += int64_t(gridDim.x) * kThreads * N) {
    Pack<T, N> total{};
    for (int64_t p = 0; p < a.parts; ++p) {
      const Pack<T, N> part = load_pack<N>(x + p * a.count + i);
#pragma unroll
      for (int j = 0; j < N; ++j) total.v[j] += part.v[j];
    }
    store_pack(static_cast<T*>(a.out) + i, total);
  }
}

}  // namespace

void move(const Move& a, void* stream) {
  const int64_t rows = a.n[0] * a.n[1];
  if (rows * a.n[2] * a.run == 0) return;
  uint64_t bits = uint64_t(a.run) | reinterpret_cast<uintptr_t>(a.from) | reinterpret_cast<uintptr_t>(a.to);
  for (int d = 0; d < 3; ++d) bits |= uint64_t(a.from_stride[d]) | uint64_t(a.to_stride[d]);
  const auto run = [&](auto word) {
    const int64_t packs = a.n[2] * a.run / int64_t(sizeof(word));
    int64_t parts = (packs + kTogether * kThreads - 1) / (kTogether * kThreads);
    parts = parts < 65535 ? parts : 65535;
    LAUNCH((move_kernel<decltype(word)>), dim3(unsigned(rows), unsigned(parts)), kThreads, stream, a);
  };
  if (bits % 16 == 0) return run(uint4{});
  if (bits % 8 == 0) return run(uint64_t{});
  if (bits % 4 == 0) return run(uint32_t{});
  if (bits % 2 == 0) return run(uint16_t{});
  run(uint8_t{});
}

void sum_parts(const SumParts& a, void* stream) {
  if (a.count == 0) return;
  for_dtype(
      a.dtype, [&](auto type) { return packable<decltype(type)>(a.count, a.x, a.out); },
      [&](auto type, auto count) {
        constexpr int N = decltype(count)::value;
        const int64_t blocks = (a.count / N + kThreads - 1) / kThreads;
        LAUNCH((sum_kernel<decltype(type), N>), unsigned(blocks < 65535 ? blocks : 65535), kThreads, stream, a);
      });
}

}  // namespace megalm::cuda
