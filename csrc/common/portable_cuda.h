// The one include of every kernel file: CUDA under nvcc, the emulator under a plain C++ compiler.
//
//   LAUNCH(kernel, grid, block, stream, arguments...)   a kernel with commas in its name goes in parentheses
//   SHARED(T, name, count)                              static shared memory
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define LAUNCH(kernel, grid, block, stream, ...)                                              \
  do {                                                                                        \
    kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);               \
    const cudaError_t launch_error = cudaGetLastError();                                      \
    if (launch_error != cudaSuccess) {                                                        \
      throw std::runtime_error(std::string(#kernel ": ") + cudaGetErrorString(launch_error)); \
    }                                                                                         \
  } while (false)
#define SHARED(T, name, count) __shared__ T name[count]
#define CHECK_ALIGNED(address, bytes)

#else

#include "emulator/cuda.h"

#define LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), megalm::emulator::Engine::instance().launch(grid, block, 0, [&] { kernel(__VA_ARGS__); }))
#define SHARED(T, name, count)         \
  static const char name##_key = 0;    \
  T(&name)                             \
  [count] = *static_cast<T(*)[count]>( \
      megalm::emulator::Engine::instance().shared(&name##_key, sizeof(T) * (count), __LINE__))
#define CHECK_ALIGNED(address, bytes) megalm::emulator::Engine::instance().check_aligned(address, bytes, __LINE__)

#endif
