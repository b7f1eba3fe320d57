// All that Python sees of csrc: the ops and their sizes, and what the process chooses.
#include "activation/op.h"
#include "adamw/op.h"
#include "attention_logit/op.h"
#include "clean_lines/op.h"
#include "common/bind.h"
#include "cross_entropy/op.h"
#include "digest/op.h"
#include "dropout/op.h"
#include "gradient_norm/op.h"
#include "index/op.h"
#include "json_lines/op.h"
#include "minhash/op.h"
#include "moe_permute/op.h"
#include "moe_router/op.h"
#include "norm/op.h"
#include "quantize/op.h"
#include "rope/op.h"
#include "sequence/op.h"
#include "shingle/op.h"
#include "softmax/op.h"
#include "suffix/op.h"
#include "text_counts/op.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(MEGALM_EMULATED)
#include "emulator/engine.h"
#endif

namespace megalm {

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

// XXH3's long form is the only one there: it reads beyond the ends of fewer bytes.
void checked_copy_digest(const CopyDigest& args) {
  if (args.bytes <= 240) throw std::invalid_argument("copy_digest: bytes must be more than 240");
  copy_digest(args);
}

void bind_sizes(pybind11::module_& m) {
  m.attr("ACTIVATION_ROW_BLOCKS") = kActivationRowBlocks;
  m.attr("ACTIVATION_ROW_BLOCKS_CUDA") = kActivationRowBlocksCuda;
  m.attr("ADAMW_BLOCK") = kAdamWBlock;
  m.attr("AMAX_CHUNK") = kAmaxChunk;
  m.attr("ATTENTION_LOGIT_SIZE") = kAttentionLogitSize;
  m.attr("GRADIENT_NORM_BLOCK") = kGradientNormBlock;
  m.attr("NORM_ROW_BLOCKS") = kNormRowBlocks;
  m.attr("NORM_ROW_BLOCKS_CUDA") = kNormRowBlocksCuda;
  m.attr("NORM_SLACK") = kNormSlack;
  m.attr("ROUTER_EXPERTS") = kRouterExperts;
  m.attr("ROUTER_GROUPS") = kRouterGroups;
  m.attr("ROUTER_ROW_BLOCKS") = kRouterRowBlocks;
  m.attr("ROUTER_ROW_BLOCKS_CUDA") = kRouterRowBlocksCuda;
  m.attr("ROW_MAP_CHUNKS") = kRowMapChunks;
  m.attr("ROW_MAP_EXPERTS") = kRowMapExperts;
}

void bind_ops(pybind11::module_& m) {
  bind_op<activation_forward>(m, "activation_forward");
  bind_op<activation_backward>(m, "activation_backward");
  bind_op<adamw>(m, "adamw");
  bind_op<adamw_squares>(m, "adamw_squares");
  bind_op<attention_logit>(m, "attention_logit");
  bind_op<cross_entropy_forward>(m, "cross_entropy_forward");
  bind_op<cross_entropy_backward>(m, "cross_entropy_backward");
  bind_op<dropout_add>(m, "dropout_add");
  bind_op<gradient_norm>(m, "gradient_norm");
  bind_op<row_map>(m, "moe_row_map");
  bind_op<spread>(m, "moe_spread");
  bind_op<collect>(m, "moe_collect");
  bind_op<router_forward>(m, "router_forward");
  bind_op<router_backward>(m, "router_backward");
  bind_op<norm_forward>(m, "norm_forward");
  bind_op<norm_backward>(m, "norm_backward");
  bind_op<quantize>(m, "fp8_quantize");
  bind_op<amax>(m, "fp8_amax");
  bind_op<dequantize>(m, "fp8_dequantize");
  bind_op<rotary>(m, "rotary");
  bind_op<move>(m, "sequence_move");
  bind_op<sum_parts>(m, "sum_parts");
  bind_op<softmax_forward>(m, "softmax_forward");
  bind_op<softmax_backward>(m, "softmax_backward");

  // On the host alone.
  bind_op<checked_copy_digest, uint64_t>(m, "copy_digest");
  bind_op<fill>(m, "fill");
  bind_op<permute>(m, "permute");
  bind_op<deal>(m, "deal");
  bind_op<dealt>(m, "dealt");
  bind_op<greedy>(m, "greedy");
  bind_op<starts>(m, "starts");
  bind_op<json_lines, int64_t>(m, "json_lines");
  bind_op<minhash, bool>(m, "minhash");
  bind_op<intersections>(m, "intersections");
  bind_op<shingles, bool>(m, "word_shingles");
  bind_op<lower_case>(m, "lower_case");
  bind_op<suffix_array, bool>(m, "suffix_array");
  bind_op<repeats, int64_t>(m, "repeats");
  bind_op<text_counts>(m, "text_counts");
  bind_op<clean_lines>(m, "clean_lines");
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
  bind_sizes(m);
  bind_ops(m);
}
