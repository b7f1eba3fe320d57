#include <pybind11/pybind11.h>

#include "common/op.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(MEGALM_EMULATED)
#include "emulator/engine.h"
#endif

namespace megalm {

void register_activation(pybind11::module_& m);
void register_adamw(pybind11::module_& m);
void register_attention_logit(pybind11::module_& m);
void register_cross_entropy(pybind11::module_& m);
void register_dropout(pybind11::module_& m);
void register_gradient_norm(pybind11::module_& m);
void register_index(pybind11::module_& m);
void register_json_lines(pybind11::module_& m);
void register_minhash(pybind11::module_& m);
void register_moe_permute(pybind11::module_& m);
void register_moe_router(pybind11::module_& m);
void register_norm(pybind11::module_& m);
void register_quantize(pybind11::module_& m);
void register_digest(pybind11::module_& m);
void register_sequence(pybind11::module_& m);
void register_rope(pybind11::module_& m);
void register_shingle(pybind11::module_& m);
void register_softmax(pybind11::module_& m);
void register_suffix(pybind11::module_& m);

namespace {

// Lets the C library keep freed memory instead of handing it back to the system: a large output then costs no page
// faults after the first step. Returns whether this system has such a setting.
bool keep_freed_memory() {
#if defined(__GLIBC__)
  constexpr int kNever = 0x7fffffff;
  return mallopt(M_MMAP_THRESHOLD, kNever) == 1 && mallopt(M_TRIM_THRESHOLD, kNever) == 1;
#else
  return false;
#endif
}

}  // namespace
}  // namespace megalm

PYBIND11_MODULE(_C, m) {
  using namespace megalm;
  m.doc() = "megalm's kernels. Use megalm.ops: it checks what these functions take on trust.";
#if defined(MEGALM_CUDA)
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
#if defined(MEGALM_EMULATED)
  m.attr("emulated") = true;
  m.def("set_emulator_order", [](unsigned order) { emulator::Engine::instance().order = order; });
  m.def("emulator_launches", [] { return emulator::Engine::instance().launches; });
#else
  m.attr("emulated") = false;
#endif
  // What these functions expect, as csrc/contract.py sums it up: a build from other sources is told apart by it.
  m.attr("contract") = MEGALM_CONTRACT;
  m.def("cpu_isa", [] { return static_cast<int>(current_isa()); });
  m.def("best_cpu_isa", [] { return static_cast<int>(best_isa()); });
  m.def("set_cpu_isa", [](int isa) { set_isa(static_cast<Isa>(isa)); });
  m.def("keep_freed_memory", &keep_freed_memory);
  register_activation(m);
  register_adamw(m);
  register_attention_logit(m);
  register_cross_entropy(m);
  register_dropout(m);
  register_gradient_norm(m);
  register_index(m);
  register_json_lines(m);
  register_minhash(m);
  register_moe_permute(m);
  register_moe_router(m);
  register_norm(m);
  register_quantize(m);
  register_digest(m);
  register_sequence(m);
  register_rope(m);
  register_shingle(m);
  register_softmax(m);
  register_suffix(m);
}
