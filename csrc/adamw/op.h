// AdamW over one flat buffer: everything in one pass, in place.
//
//   g = grad * grad_scale
//   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
//   w = w (1 - lr weight_decay) - lr (m / correction1) / (sqrt(v / correction2) + eps)
//   out = w rounded to out_dtype, where there is an out
// with correction = 1 - beta^step. Nothing at all is written where *skip is not 0.
//
// Update clipping (StableAdamW): the buffer is cut into segments, one for each tensor, and lr is multiplied by the
// segment's rate, in the decay, too. The rate is 1 / max(1, sqrt(mean over the tensor of g^2 / max(v / correction2,
// eps^2))) with the updated v; adamw_squares sums the ratios of each segment, so that the parts of a tensor that is
// split over ranks can be added up before.
//
// Layout: master, grad, exp_avg, exp_avg_sq fp32 [size]; grad is only read. grad_scale and skip are read from memory
// where their pointers are given, so that a device's own numbers decide without the host waiting for them.
// Sources: Loshchilov and Hutter 2019 (arXiv:1711.05101); update clipping: Wortsman et al. 2023 (arXiv:2304.13013),
// algorithm 2.
#pragma once

#include "common/op.h"

namespace megalm {

struct AdamW {
  int64_t size;
  float lr, beta1, beta2, eps, weight_decay, correction1, correction2;
  float grad_scale;
  const float* grad_scale_pointer;  // null: grad_scale
  const float* skip;                // null: never
  float* master;
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  DType out_dtype;
  void* out;                    // null: none
  int64_t segments;             // 0: lr everywhere
  const int64_t* segment_ends;  // [segments], rising; the last is size
  const float* segment_rates;   // [segments]
};

// Elements whose ratios are summed together; the order of the sum depends on the segments alone.
constexpr int64_t kAdamWBlock = 16384;

struct AdamWSquares {
  int64_t segments;
  float beta2, eps, correction2, grad_scale;
  const float* grad_scale_pointer;  // null: grad_scale
  const float* grad;
  const float* exp_avg_sq;
  const int64_t* segment_ends;  // [segments]
  const int64_t* block_starts;  // [segments + 1]: how many blocks of kAdamWBlock the segments before have
  int64_t blocks;               // all of them
  double* partial;              // [blocks]
  double* result;               // [segments]
};

MEGALM_DECLARE_OP(adamw, AdamW)
MEGALM_DECLARE_OP(adamw_squares, AdamWSquares)

}  // namespace megalm
