#include <atomic>
#include <stdexcept>

#include "common/op.h"

#if defined(MEGALM_ISA_VARIANTS)
#include <cpuid.h>
#endif

namespace megalm {
namespace {

#if defined(MEGALM_ISA_VARIANTS)
// Conversion of fp16; not every compiler's __builtin_cpu_supports knows its name.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1u);
}
#endif

Isa detect() {
#if defined(MEGALM_ISA_VARIANTS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{detect()};
  return isa;
}

}  // namespace

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

void set_isa(Isa isa) {
  if (isa < Isa::kBaseline || isa > best_isa()) {
    throw std::invalid_argument("this CPU or this build of megalm._C does not have the instruction set asked for");
  }
  chosen().store(isa, std::memory_order_relaxed);
}

void throw_without_cuda() {
  throw std::runtime_error(
      "megalm._C was built without CUDA: rebuild it on a machine with nvcc and a CUDA build of torch");
}

}  // namespace megalm
