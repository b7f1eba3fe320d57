// One kernel for each class of bug, and its correct form: the emulator must catch the first and let the second pass.
//
//   planted_bugs NAME ORDER     exit status 0 and "ok", or 1 and what was found; AddressSanitizer stops with its own
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/portable_cuda.h"

namespace {

constexpr unsigned kFull = 0xffffffffu;

// Sums 64 numbers through shared memory.
template <bool kBarrier>
__global__ void sum_kernel(const float* x, float* y) {
  SHARED(float, values, 64);
  values[63 - threadIdx.x] = x[threadIdx.x];
  if (kBarrier) __syncthreads();
  float total = 0.f;
  for (int i = 0; i < 64; ++i) total += values[i];
  y[threadIdx.x] = total;
}

template <bool kWrong>
__global__ void uninitialised_kernel(const float* x, float* y) {
  SHARED(float, values, 64);
  if (!kWrong || threadIdx.x < 63) values[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = values[63];
}

template <bool kWrong>
__global__ void divergent_kernel(float* y) {
  if (kWrong && threadIdx.x >= 40) return;
  __syncthreads();
  y[threadIdx.x] = 1.f;
}

template <bool kWrong>
__global__ void two_barriers_kernel(float* y) {
  if (kWrong && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 1.f;
}

template <bool kWrong>
__global__ void shuffle_kernel(float* y) {
  const bool active = !kWrong || threadIdx.x % 32 < 16;
  float value = float(threadIdx.x);
  if (active) value += __shfl_xor_sync(kWrong ? 0x0000ffffu : kFull, value, 16);
  y[threadIdx.x] = value;
}

template <bool kWrong>
__global__ void mask_kernel(float* y) {
  float value = 1.f;
  if (!kWrong || threadIdx.x % 32 < 16) value += __shfl_xor_sync(kFull, value, 1);
  y[threadIdx.x] = value;
}

template <bool kWrong>
__global__ void not_in_mask_kernel(float* y) {
  y[threadIdx.x] = float(__ballot_sync(kWrong ? 0x7fffffffu : kFull, threadIdx.x % 2 == 0));
}

template <bool kWrong>
__global__ void misaligned_kernel(const float* x, float* y) {
  const float* address = x + (kWrong ? 1 : 4);
  CHECK_ALIGNED(address, 16);
  y[threadIdx.x] = address[0];
}

template <bool kWrong>
__global__ void bounds_kernel(const float* x, float* y) {
  const unsigned i = threadIdx.x + (kWrong ? 1 : 0);
  y[i] = x[i];  // out of bounds
}

__global__ void empty_kernel() {}

int run(const std::string& name, bool wrong) {
  std::vector<float> x(64, 1.f), y(64, 0.f);
  const float* in = x.data();
  float* out = y.data();
  const auto pick = [&](auto good, auto bad) { wrong ? bad() : good(); };
  if (name == "barrier") {
    pick([&] { LAUNCH((sum_kernel<true>), 1, 64, nullptr, in, out); },
         [&] { LAUNCH((sum_kernel<false>), 1, 64, nullptr, in, out); });
    for (float v : y) {
      if (v != 64.f) throw std::runtime_error("wrong sum");
    }
  } else if (name == "uninitialised") {
    pick([&] { LAUNCH((uninitialised_kernel<false>), 1, 64, nullptr, in, out); },
         [&] { LAUNCH((uninitialised_kernel<true>), 1, 64, nullptr, in, out); });
    if (y[0] != 1.f) throw std::runtime_error("not a number");
  } else if (name == "divergent") {
    pick([&] { LAUNCH((divergent_kernel<false>), 1, 64, nullptr, out); },
         [&] { LAUNCH((divergent_kernel<true>), 1, 64, nullptr, out); });
  } else if (name == "two_barriers") {
    pick([&] { LAUNCH((two_barriers_kernel<false>), 1, 64, nullptr, out); },
         [&] { LAUNCH((two_barriers_kernel<true>), 1, 64, nullptr, out); });
  } else if (name == "shuffle") {
    pick([&] { LAUNCH((shuffle_kernel<false>), 1, 64, nullptr, out); },
         [&] { LAUNCH((shuffle_kernel<true>), 1, 64, nullptr, out); });
  } else if (name == "mask") {
    pick([&] { LAUNCH((mask_kernel<false>), 1, 64, nullptr, out); },
         [&] { LAUNCH((mask_kernel<true>), 1, 64, nullptr, out); });
  } else if (name == "not_in_mask") {
    pick([&] { LAUNCH((not_in_mask_kernel<false>), 1, 64, nullptr, out); },
         [&] { LAUNCH((not_in_mask_kernel<true>), 1, 64, nullptr, out); });
  } else if (name == "misaligned") {
    pick([&] { LAUNCH((misaligned_kernel<false>), 1, 32, nullptr, in, out); },
         [&] { LAUNCH((misaligned_kernel<true>), 1, 32, nullptr, in, out); });
  } else if (name == "bounds") {
    pick([&] { LAUNCH((bounds_kernel<false>), 1, 64, nullptr, in, out); },
         [&] { LAUNCH((bounds_kernel<true>), 1, 64, nullptr, in, out); });
  } else if (name == "limits") {
    LAUNCH(empty_kernel, 1, wrong ? 1025 : 1024, nullptr);
  } else if (name == "grid") {
    LAUNCH(empty_kernel, dim3(1, wrong ? 65536 : 65535), 1, nullptr);
  } else {
    throw std::invalid_argument("unknown bug: " + name);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  megalm::emulator::Engine::instance().order = unsigned(atoi(argv[3]));
  try {
    run(argv[1], std::string(argv[2]) == "bug");
    run(argv[1], false);  // the emulator goes on after a failed launch, and finds nothing where nothing is
    puts("ok");
    return 0;
  } catch (const std::exception& error) {
    puts(error.what());
    run(argv[1], false);
    return 1;
  }
}
