#include "common/bind.h"

#include "moe_router/op.h"

namespace megalm {
namespace {

void forward(int index, Address stream, int type, int score, bool normalize, int64_t rows, int64_t experts,
             int64_t top_k, int64_t groups, int64_t top_groups, int64_t group_scores, int64_t row_blocks, float scale,
             Address logits, Address bias, Address weights, Address chosen, Address log_z, Address probability,
             Address counts, Address partial, Address partial_counts) {
  router_forward({dtype(type),
                  static_cast<Score>(score),
                  normalize,
                  rows,
                  experts,
                  top_k,
                  groups,
                  top_groups,
                  group_scores,
                  row_blocks,
                  scale,
                  pointer(logits),
                  pointer<float>(bias),
                  pointer<float>(weights),
                  pointer<int64_t>(chosen),
                  pointer<float>(log_z),
                  pointer<float>(probability),
                  pointer<int64_t>(counts),
                  pointer<float>(partial),
                  pointer<int64_t>(partial_counts)},
                 device(index, stream));
}

void backward(int index, Address stream, int type, int score, bool normalize, int64_t rows, int64_t experts,
              int64_t top_k, float scale, Address dweights, Address dprobability, Address dlog_z, Address logits,
              Address chosen, Address log_z, Address dlogits) {
  router_backward({dtype(type), static_cast<Score>(score), normalize, rows, experts, top_k, scale,
                   pointer<float>(dweights), pointer<float>(dprobability), pointer<float>(dlog_z), pointer(logits),
                   pointer<int64_t>(chosen), pointer<float>(log_z), pointer(dlogits)},
                  device(index, stream));
}

}  // namespace

void register_moe_router(pybind11::module_& m) {
  m.attr("ROUTER_EXPERTS") = kRouterExperts;
  m.attr("ROUTER_GROUPS") = kRouterGroups;
  m.attr("ROUTER_ROW_BLOCKS") = kRouterRowBlocks;
  m.attr("ROUTER_ROW_BLOCKS_CUDA") = kRouterRowBlocksCuda;
  m.def("router_forward", &forward, Released());
  m.def("router_backward", &backward, Released());
}

}  // namespace megalm
