// The names of CUDA C++ that the kernels use, on the emulator's engine.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "emulator/engine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using dim3 = megalm::emulator::Size3;
using cudaStream_t = void*;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

#define threadIdx (megalm::emulator::Engine::instance().current->index)
#define blockIdx (megalm::emulator::Engine::instance().block_index)
#define blockDim (megalm::emulator::Engine::instance().block)
#define gridDim (megalm::emulator::Engine::instance().grid)

#define __syncthreads() megalm::emulator::Engine::instance().barrier(__LINE__)
#define __syncwarp(...) megalm::emulator::SyncWarp{__LINE__}(__VA_ARGS__)
#define __shfl_sync(...) megalm::emulator::shuffle(__LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) megalm::emulator::shuffle_xor(__LINE__, __VA_ARGS__)
#define __ballot_sync(mask, vote) megalm::emulator::ballot(__LINE__, mask, vote)
#define __match_any_sync(mask, value) megalm::emulator::match_any(__LINE__, mask, value)

namespace megalm::emulator {

struct SyncWarp {
  int line;
  void operator()(unsigned mask = 0xffffffffu) const {
    Engine::instance().collective(Collective::kSync, mask, 0, 0, line);
  }
};

template <typename T>
T shuffle(int line, unsigned mask, T value, unsigned lane) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = Engine::instance().collective(Collective::kShuffle, mask, bits, lane % kWarpSize, line);
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
T shuffle_xor(int line, unsigned mask, T value, unsigned distance) {
  return shuffle(line, mask, value, Engine::instance().current->lane() ^ distance);
}

inline unsigned ballot(int line, unsigned mask, bool vote) {
  return unsigned(Engine::instance().collective(Collective::kBallot, mask, vote, 0, line));
}

template <typename T>
unsigned match_any(int line, unsigned mask, T value) {
  return unsigned(Engine::instance().collective(Collective::kMatch, mask, uint64_t(value), 0, line));
}

}  // namespace megalm::emulator

// Two threads never run at once, so a plain read and write is atomic.
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  if (value > old) *address = value;
  return old;
}
template <typename T>
T atomicMin(T* address, T value) {
  const T old = *address;
  if (value < old) *address = value;
  return old;
}

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }

struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {  // to nearest, ties to even
    uint32_t u;
    memcpy(&u, &value, 4);
    bits = (u & 0x7fffffffu) > 0x7f800000u ? uint16_t(0x7fff) : uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
  }
  explicit operator float() const {
    const uint32_t u = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &u, 4);
    return value;
  }
};

using __half = _Float16;
