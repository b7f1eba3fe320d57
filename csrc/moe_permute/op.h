// Tokens to their experts and back. A slot is one assignment of a token: slot = token * top_k + j.
//
//   row map   rows[slot] = the slot's place when all slots are sorted by expert, slots of one expert in their own
//   order;
//             sources[row] = slot, its inverse; counts[e] = slots of expert e.
//             A slot whose expert is outside [0, experts) is dropped: it comes behind all others, as -1 - its place.
//   spread    out[rows[slot]] = weights[slot] * x[token of slot]; zeros for a dropped slot
//   collect   out[token] = sum over its slots, in order, of weights[slot] * x[rows[slot]]; dropped slots add nothing
//   dot       dweights[slot] = sum over columns of g[token] * y[rows[slot]]; 0 for a dropped slot
//
// permute is spread without weights, and its backward is collect; unpermute is collect, and its backward is spread with
// dot. Weights may be none: 1.
// Layout: tokens' side [tokens, size], rows' side [tokens * top_k, size], rows and weights [tokens, top_k]. Contiguous.
// Products and sums are fp32 in a fixed order, rounded once. Rows beyond tokens * top_k are left alone.
// Source: Gale et al. 2022 (MegaBlocks, arXiv:2211.15841), sec. 5.
#pragma once

#include "common/op.h"

namespace megalm {

// A histogram lies in a CUDA block's shared memory.
constexpr int64_t kRowMapExperts = 1024, kRowMapChunks = 256;

struct RowMap {
  int64_t slots, experts, chunks;
  const int64_t* chosen;
  int64_t* rows;
  int64_t* sources;
  int64_t* counts;
  int64_t* partial;  // [chunks, experts + 1]
};

struct Spread {
  DType dtype;
  int64_t tokens, top_k, size;
  const void* x;
  const void* y;  // null: no dot
  const int64_t* rows;
  const float* weights;  // null: 1
  void* out;
  float* dweights;  // where there is y
};

struct Collect {
  DType dtype;
  int64_t tokens, top_k, size;
  const void* x;
  const int64_t* rows;
  const float* weights;  // null: 1
  void* out;
};

MEGALM_DECLARE_OP(row_map, RowMap)
MEGALM_DECLARE_OP(spread, Spread)
MEGALM_DECLARE_OP(collect, Collect)

}  // namespace megalm
