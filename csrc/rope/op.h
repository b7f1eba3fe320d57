// Rotary position embedding: pairs of elements of each head are turned by their position's angle.
//
//   (a, b) -> (a cos - b sin, b cos + a sin)
//
// Pair i is elements (i, i + pairs) in the half layout, (2 i, 2 i + 1) in the interleaved one; the elements after the
// first 2 * pairs are copied. The gradient is the same with the angle reversed (inverse).
//
// Layout: x and y [sequence, batch, heads, size], each with any strides (in elements) but a dense last dim; y may be x,
// with the same strides. cos, sin fp32 [sequence, batch or 1, pairs] with strides, dense last.
// Source: Su et al. 2021 (arXiv:2104.09864).
#pragma once

#include "common/op.h"

namespace megalm {

struct Rotary {
  DType dtype;
  bool interleaved, inverse;
  int64_t sequence, batch, heads, size, pairs;
  int64_t sequence_stride, batch_stride, head_stride;        // of x
  int64_t y_sequence_stride, y_batch_stride, y_head_stride;  // of y
  int64_t table_sequence_stride, table_batch_stride;         // of cos and sin
  const void* x;
  const float* cos;
  const float* sin;
  void* y;
};

MEGALM_DECLARE_OP(rotary, Rotary)

}  // namespace megalm
