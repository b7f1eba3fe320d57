#include "common/bind.h"

#include "attention_logit/op.h"

namespace megalm {
namespace {

void run(int index, Address stream, int type, int64_t length, int64_t batch, int64_t heads, int64_t groups,
         int64_t size, int64_t queries, int64_t every, float scale, Address q, Address k, int64_t q_step,
         int64_t q_batch, int64_t k_step, int64_t k_batch, Address mask, int64_t mask_step, int64_t mask_batch,
         Address largest) {
  attention_logit(
      {dtype(type), length, batch, heads, groups, size, queries, every, scale, pointer(q), pointer(k), q_step, q_batch,
       k_step, k_batch, pointer<uint8_t>(mask), mask_step, mask_batch, pointer<float>(largest)},
      device(index, stream));
}

}  // namespace

void register_attention_logit(pybind11::module_& m) {
  m.attr("ATTENTION_LOGIT_SIZE") = kAttentionLogitSize;
  m.def("attention_logit", &run, Released());
}

}  // namespace megalm
