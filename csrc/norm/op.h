// RMSNorm and LayerNorm over the last dimension, with an optional residual add in front.
//
//   h    = x + residual                      (rounded to the dtype; h = x without a residual)
//   hat  = h * rstd                          RMSNorm:   rstd = 1 / sqrt(mean(h^2) + eps)
//        = (h - mean) * rstd                 LayerNorm: rstd = 1 / sqrt(var(h) + eps), biased variance
//   y    = hat * weight (+ bias)
//
//   g    = dy * weight
//   dx   = dh + rstd * (g - hat * mean(g * hat))                 RMSNorm
//        = dh + rstd * (g - mean(g) - hat * mean(g * hat))       LayerNorm
//   dweight = sum over rows of dy * hat,  dbias = sum over rows of dy
//   dx is the gradient of x and of the residual alike.
//
// Layout: x, residual, h, y, dy, dh, dx [rows, size] contiguous; weight, bias [size]; mean, rstd [rows] fp32.
// Arithmetic is fp32, whatever the dtype; y is rounded once. Sums over rows are taken in a fixed order (row_blocks
// partial sums), so that a gradient does not depend on the number of threads.
// Sources: Zhang and Sennrich 2019 (arXiv:1910.07467); Ba et al. 2016 (arXiv:1607.06450).
#pragma once

#include "common/op.h"

namespace megalm {

struct NormForward {
  DType dtype;
  bool layer_norm;  // else RMSNorm
  int64_t rows, size;
  float eps;
  const void* x;
  const void* residual;  // null: no add
  const void* weight;
  const void* bias;  // null: none
  void* h;           // written where there is a residual
  void* y;
  float* mean;  // LayerNorm only
  float* rstd;
};

// Rows are summed into this many partial sums, for which the caller gives the room: enough for a CPU's threads, and for
// two blocks on each multiprocessor of a large GPU.
constexpr int64_t kNormRowBlocks = 32, kNormRowBlocksCuda = 264;
// Floats of a partial sum beyond its size, which let a CPU choose where in the room it lies.
constexpr int64_t kNormSlack = 1024;

struct NormBackward {
  DType dtype;
  bool layer_norm;
  int64_t rows, size, row_blocks;
  const void* dy;
  const void* dh;  // null: nothing flows in from the new residual
  const void* h;
  const void* weight;
  const float* mean;
  const float* rstd;
  void* dx;
  void* dweight;
  void* dbias;     // null: none
  float* partial;  // [row_blocks, 2, size + kNormSlack]
};

MEGALM_DECLARE_OP(norm_forward, NormForward)
MEGALM_DECLARE_OP(norm_backward, NormBackward)

}  // namespace megalm
