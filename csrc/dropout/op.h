// Bias, dropout and residual add in one pass, with a mask that is computed and never stored.
//
//   y = residual + keep * scale * (x + bias),  scale = 1 / (1 - p), keep 0 or 1
//   dx = keep * scale * dy: the same function of dy without bias and residual
//
// An element is kept or dropped by its global place alone, so that shards of an activation have the whole one's mask:
// row_id names the row, `first_column` the first column's global index.
//   s = mix64(seed + 0x9E3779B97F4A7C15 * (row_id + 1)),  low and high its two halves of 32 bits
//   h = mix32(low + 0x9E3779B1 * column, high);  kept where h >= threshold = p * 2^32
// mix64 is splitmix64's finalizer; mix32(h, key): h ^= h >> 16, h *= 0x7FEB352D, h ^= h >> 15, h += key,
// h *= 0x846CA68B, h ^= h >> 16.
//
// Layout: x, residual, y [rows, size] contiguous; bias [size]; row_ids int64 [rows]. y may be x or residual.
// Sources: Srivastava et al. 2014; Steele et al. 2014 (splitmix64); Wellons 2018, "Prospecting for Hash Functions".
#pragma once

#include "common/op.h"

namespace megalm {

struct DropoutAdd {
  DType dtype;
  int64_t rows, size;
  uint64_t seed;
  uint32_t threshold;
  float scale;
  uint32_t first_column;
  const int64_t* row_ids;  // null: 0, 1, ...
  const void* x;
  const void* bias;      // null: none
  const void* residual;  // null: none
  void* y;
};

constexpr uint64_t kDropoutGolden = 0x9E3779B97F4A7C15u;
constexpr uint32_t kDropoutColumn = 0x9E3779B1u;

MEGALM_DECLARE_OP(dropout_add, DropoutAdd)

}  // namespace megalm
