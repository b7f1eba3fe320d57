// The router of a mixture of experts: each token's top_k experts and their weights, and what the balance losses need.
//
//   s      = softmax(logits)          q = s                     (softmax scores)
//          = sigmoid(logits)          q = s / sum_e s           (sigmoid scores)
//   chosen = the top_k experts by s + bias; of equals the first. bias only chooses: it has no part in the weights and
//            no gradient. With `groups` > 0 the experts are `groups` runs of equal length, a run's score is the sum of
//            its `group_scores` largest s + bias, and experts outside the best `top_groups` runs are never chosen.
//   weight = scale * s[chosen]                              or, normalised,
//          = scale * s[chosen] / sum over chosen s
//            Quotients are right however small the scores are: where all of them are faint they are taken of
//            exp(logits - log_z), not of s, which may be 0 in fp32. A constant in the sum would let a router lower its
//            balance loss by lowering all its logits. Of scores that are all 0 (logits of -inf) they are 0.
//   log_z  = log sum_e exp(logits)
//   counts[e]      = tokens that chose e            (no gradient)
//   probability[e] = sum over tokens of q[e]
//
// Backward: logits get the gradients of weight, probability and log_z.
// A NaN counts as the lowest score, so that the choice is always top_k different experts; the weights are then NaN.
// Layout: logits, dlogits [rows, experts], weights, dweights [rows, top_k] fp32, chosen [rows, top_k] in the order of
// choice; log_z, dlog_z [rows] fp32; bias, probability, dprobability [experts] fp32; counts [experts]. Contiguous.
// Arithmetic is fp32. Sums over rows are taken in a fixed order (row_blocks partial sums).
// Sources: Shazeer et al. 2017 (arXiv:1701.06538); Fedus et al. 2021 (arXiv:2101.03961), sec. 2.2; Zoph et al. 2022
// (arXiv:2202.08906), eq. 5; DeepSeek-V3 2024 (arXiv:2412.19437), sec. 2.1.2.
#pragma once

#include "common/op.h"

namespace megalm {

enum class Score : int { kSoftmax = 0, kSigmoid = 1 };

// A row's scores lie in a CUDA block's shared memory, or on a CPU thread's stack.
constexpr int64_t kRouterExperts = 1024, kRouterGroups = 128;
constexpr int64_t kRouterRowBlocks = 32, kRouterRowBlocksCuda = 264;
// Scores below e^-20 are faint. There sigmoid(x) is e^x in fp32, and an upper bound of this size keeps quotients
// accurate.
constexpr float kRouterFaintLog = -20.f, kRouterFaint = 2.0611536e-9f;

struct RouterForward {
  DType dtype;
  Score score;
  bool normalize;
  int64_t rows, experts, top_k, groups, top_groups, group_scores, row_blocks;
  float scale;
  const void* logits;
  const float* bias;  // null: none
  float* weights;
  int64_t* chosen;
  float* log_z;
  float* probability;
  int64_t* counts;
  float* partial;           // [row_blocks, experts]
  int64_t* partial_counts;  // [row_blocks, experts]
};

struct RouterBackward {
  DType dtype;
  Score score;
  bool normalize;
  int64_t rows, experts, top_k;
  float scale;
  const float* dweights;      // null: none
  const float* dprobability;  // null: none
  const float* dlog_z;        // null: none
  const void* logits;
  const int64_t* chosen;
  const float* log_z;
  void* dlogits;
};

MEGALM_DECLARE_OP(router_forward, RouterForward)
MEGALM_DECLARE_OP(router_backward, RouterBackward)

}  // namespace megalm
