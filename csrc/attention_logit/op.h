// The largest attention logit of each head, over a few queries of every sequence and all keys that they may see.
//
//   largest[a] = max(largest[a], scale q[s, b, a] . k[j, b, a / (heads / groups)])
//                over b, the queries s = length - 1 - i every (i < queries) and the keys j <= s that the mask shows
//
// A NaN among the logits makes that head's number NaN. Products are summed in fp32; the order does not matter to a
// maximum, so that neither threads nor blocks change the result.
// Layout: q [length, batch, heads, size] and k [length, batch, groups, size], the last two dims dense, the first two
// q_step, q_batch, k_step and k_batch elements apart; mask nullptr or bytes, one of [length, length] (key last, dense)
// for each sequence, rows mask_step and sequences mask_batch apart (0: one for all); largest fp32 [heads].
// Source: Wortsman et al. 2023 (arXiv:2309.14322), section 3.1.1, for what the number foretells.
#pragma once

#include "common/op.h"

namespace megalm {

// The most queries of a sequence, and those that are handled at once: one to a lane, or to a row of shared memory.
constexpr int kAttentionLogitTile = 16;
// The most elements of a head.
constexpr int64_t kAttentionLogitSize = 256;

struct AttentionLogit {
  DType dtype;
  int64_t length, batch, heads, groups, size;
  int64_t queries, every;
  float scale;
  const void* q;
  const void* k;
  int64_t q_step, q_batch, k_step, k_batch;
  const uint8_t* mask;
  int64_t mask_step, mask_batch;
  float* largest;
};

MEGALM_DECLARE_OP(attention_logit, AttentionLogit)

}  // namespace megalm
