// Cross-entropy over logits whose columns may be one shard of the vocabulary: one reading of the logits in forward,
// one reading and one writing in backward.
//
// Forward, for each row over this shard's columns c (global index first + c):
//   peak = max x,  total = sum exp(x - peak),  target = x[label - first] if the label is here, else 0,  mean part: sum
//   x
// The caller joins the shards:  log_z = log(sum total * exp(peak - top)) + top,  top the largest peak.
//
// Backward:  dx = scale * exp(x - log_z) - weight * (1 - smoothing) [c is the label] - weight * uniform
//   with weight = the loss' gradient, scale = weight * (1 + 2 z_loss log_z), uniform = smoothing / vocabulary.
//
// Layout: logits, gradient [rows, stride], of which the first `columns` count; the rest of a gradient row is set to 0.
// labels int64 [rows], any value: one outside [first, first + columns) is not here. gradient may be logits.
// Sources: Shoeybi et al. 2019 (arXiv:1909.08053), sec. 3; Milakov and Gimelshein 2018 (arXiv:1805.02867) for the
// running maximum; PaLM (arXiv:2204.02311), sec. 5 for z-loss.
#pragma once

#include "common/op.h"

namespace megalm {

struct CrossEntropyForward {
  DType dtype;
  int64_t rows, columns, stride, first;
  const void* logits;
  const int64_t* labels;
  float* peak;    // [rows]; -infinity where columns is 0
  float* total;   // [rows]
  float* target;  // [rows]
  float* sum;     // [rows], null: not wanted
};

struct CrossEntropyBackward {
  DType dtype;
  int64_t rows, columns, stride, first;
  float smoothing, uniform;
  const void* logits;
  const int64_t* labels;
  const float* log_z;
  const float* scale;
  const float* weight;
  void* gradient;
};

MEGALM_DECLARE_OP(cross_entropy_forward, CrossEntropyForward)
MEGALM_DECLARE_OP(cross_entropy_backward, CrossEntropyBackward)

}  // namespace megalm
