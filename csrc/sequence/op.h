// What lies beside a collective over the sequence: rows to where they are sent from, and back; sums of received parts.
//
//   move       to[i, j, k] = from[i, j, k] for i < n[0], j < n[1], k < n[2]: runs of `run` bytes, at strides in bytes,
//              which may be negative. One copy does what a cut by rank, a zig-zag order of blocks and a change of
//              [S, B, H] to [B, S, H] would take one each for.
//   sum_parts  out[i] = x[0, i] + x[1, i] + ... in fp32, in this order, rounded once
//
// Layout: x [parts, count], out [count] contiguous. Runs of `from` and `to` do not overlap.
// Sources: Korthikanti et al. 2022 (arXiv:2205.05198); zig-zag: Brandon et al. 2023 (arXiv:2311.09431).
#pragma once

#include "common/op.h"

namespace megalm {

struct Move {
  int64_t n[3], from_stride[3], to_stride[3], run;
  const char* from;
  char* to;
};

struct SumParts {
  DType dtype;
  int64_t parts, count;
  const void* x;
  void* out;
};

MEGALM_DECLARE_OP(move, Move)
MEGALM_DECLARE_OP(sum_parts, SumParts)

}  // namespace megalm
