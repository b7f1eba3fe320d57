// The MLP's pointwise functions: gated (x = [gate; up] -> f(gate) * up) and plain (x + bias -> f(x + bias)).
//
//   silu(a)      = a / (1 + exp(-a))
//   gelu(a)      = a / 2 * (1 + erf(a / sqrt 2))
//   gelu_tanh(a) = a / 2 * (1 + tanh(sqrt(2 / pi) * (a + 0.044715 a^3)))
//
// Layout: gated x, dx [rows, 2 * size], y, dy [rows, size]; plain x, dx, y, dy [rows, size], bias [size]. Contiguous.
// dbias = sum over rows of dx, before its rounding; from row_blocks partial sums, in an order that does not depend on
// the number of threads.
// Arithmetic is fp32; each output is rounded once. dx may be x: the backward then runs in place.
// Sources: Shazeer 2020 (arXiv:2002.05202); Hendrycks and Gimpel 2016 (arXiv:1606.08415).
#pragma once

#include "common/op.h"

namespace megalm {

enum class Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

struct ActivationForward {
  DType dtype;
  Activation kind;
  bool gated;
  int64_t rows, size;
  const void* x;
  const void* bias;  // null: none; plain only
  void* y;
};

struct ActivationBackward {
  DType dtype;
  Activation kind;
  bool gated;
  int64_t rows, size;
  const void* dy;
  const void* x;
  const void* bias;
  void* dx;
  void* dbias;  // with a bias
  int64_t row_blocks;
  float* partial;  // [row_blocks, size], with a bias
};

// Rows are summed into this many partial sums, for which the caller gives the room.
constexpr int64_t kActivationRowBlocks = 32, kActivationRowBlocksCuda = 132;

MEGALM_DECLARE_OP(activation_forward, ActivationForward)
MEGALM_DECLARE_OP(activation_backward, ActivationBackward)

}  // namespace megalm
