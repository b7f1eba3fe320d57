// AdamW over one flat buffer: everything in one pass, in place.
//
//   g = grad * grad_scale
//   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
//   w = w (1 - lr weight_decay) - lr (m / correction1) / (sqrt(v / correction2) + eps)
//   out = w rounded to out_dtype, where there is an out
// with correction = 1 - beta^step. Nothing at all is written where *skip is not 0.
//
// Layout: master, grad, exp_avg, exp_avg_sq fp32 [size]; grad is only read. grad_scale and skip are read from memory
// where their pointers are given, so that a device's own numbers decide without the host waiting for them.
// Source: Loshchilov and Hutter 2019 (arXiv:1711.05101).
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
  void* out;  // null: none
};

MEGALM_DECLARE_OP(adamw, AdamW)

}  // namespace megalm
