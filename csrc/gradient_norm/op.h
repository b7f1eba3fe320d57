// Sum of squares and number of non-finite elements of a flat buffer, in one reading.
//
//   result[0] += sum of x^2  (NaN or infinite if an element is; fp64 from blocks of kGradientNormBlock elements on)
//   result[1] += number of elements that are NaN or infinite
//
// The order of the sum depends on the size alone, not on the number of threads.
// Layout: x [size]; partial fp64 [blocks, 2] with blocks = ceil(size / kGradientNormBlock); result fp64 [2].
#pragma once

#include "common/op.h"

namespace megalm {

constexpr int64_t kGradientNormBlock = 16384;

struct GradientNorm {
  DType dtype;
  int64_t size;
  const void* x;
  double* partial;
  double* result;
};

MEGALM_DECLARE_OP(gradient_norm, GradientNorm)

}  // namespace megalm
