// What every op's contract (op.h) is written with.
//
// An op is a plain struct of sizes and raw pointers and a function on it. The function exists once for each CPU
// instruction set (op.cpp is compiled once for each; the machine's best is chosen at run time, so that a wheel built on
// one machine runs on another) and once for CUDA (op.cu).
#pragma once

#include <cstdint>

namespace megalm {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The instruction set in use: the best that this CPU has, unless set_isa chose a lesser one.
Isa current_isa();
// Chooses an instruction set; throws std::invalid_argument where the CPU or the build lacks it.
void set_isa(Isa isa);
Isa best_isa();

// Where an op runs: index < 0 is the CPU, otherwise a CUDA device and one of its streams.
struct Device {
  int index;
  void* stream;
};

// Makes a CUDA device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
};

[[noreturn]] void throw_without_cuda();

}  // namespace megalm

#if defined(MEGALM_ISA_VARIANTS)
#define MEGALM_DECLARE_CPU(name, Args) \
  namespace baseline {                 \
  void name(const Args&);              \
  }                                    \
  namespace avx2 {                     \
  void name(const Args&);              \
  }                                    \
  namespace avx512 {                   \
  void name(const Args&);              \
  }
#define MEGALM_RUN_CPU(name, args) \
  switch (current_isa()) {         \
    case Isa::kAvx512:             \
      return avx512::name(args);   \
    case Isa::kAvx2:               \
      return avx2::name(args);     \
    default:                       \
      return baseline::name(args); \
  }
#else
#define MEGALM_DECLARE_CPU(name, Args) \
  namespace baseline {                 \
  void name(const Args&);              \
  }
#define MEGALM_RUN_CPU(name, args) return baseline::name(args)
#endif

#if defined(MEGALM_CUDA)
#define MEGALM_RUN_CUDA(name, args, device)   \
  {                                           \
    const DeviceGuard guard((device).index);  \
    return cuda::name(args, (device).stream); \
  }
#else
#define MEGALM_RUN_CUDA(name, args, device) throw_without_cuda();
#endif

// Declares name(args, device), which runs the op where the device says.
#define MEGALM_DECLARE_OP(name, Args)                          \
  MEGALM_DECLARE_CPU(name, Args)                               \
  namespace cuda {                                             \
  void name(const Args&, void* stream);                        \
  }                                                            \
  inline void name(const Args& args, Device device) {          \
    if (device.index >= 0) MEGALM_RUN_CUDA(name, args, device) \
    MEGALM_RUN_CPU(name, args);                                \
  }
