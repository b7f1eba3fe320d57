// Softmax over the keys of attention's scores: scaled, causal, with ALiBi's biases and within documents.
//
//   position(q) = keys - queries + q: the queries are the last of the positions
//   v_k = scale * x_k - slope * (position - k)     for first <= k <= position, first = starts[position]
//   y_k = exp(v_k) / sum exp(v),  0 for all other keys
//   dx  = scale * y * (dy - sum(dy * y))
//
// Layout: x, y, dy, dx [batch, heads, queries, keys] contiguous; slopes fp32 [heads]; starts int32 [batch, keys], the
// first key that each position sees, between 0 and the position. y may be x, dx may be dy.
// Sources: Press et al. 2021 (arXiv:2108.12409) for ALiBi; Milakov and Gimelshein 2018 (arXiv:1805.02867).
#pragma once

#include "common/op.h"

namespace megalm {

struct SoftmaxForward {
  DType dtype;
  int64_t batch, heads, queries, keys;
  float scale;
  const void* x;
  const float* slopes;    // null: no bias
  const int32_t* starts;  // null: 0
  void* y;
};

struct SoftmaxBackward {
  DType dtype;
  int64_t batch, heads, queries, keys;
  float scale;
  const void* dy;
  const void* y;
  const int32_t* starts;
  void* dx;
};

MEGALM_DECLARE_OP(softmax_forward, SoftmaxForward)
MEGALM_DECLARE_OP(softmax_backward, SoftmaxBackward)

}  // namespace megalm
