// Tensors to 8-bit floats and back: e4m3fn (largest 448, no infinity) and e5m2 (largest 57344).
//
//   amax      = largest |x| of a block, NaN if the block holds one
//   scale     = largest / amax, at most 2^126; rounded down to a power of two on request;
//               1 where amax is 0, infinite or NaN
//   q         = to_fp8(clamp(x * scale, -largest, largest)), to nearest, ties to even: infinity saturates, NaN stays
//   NaN scale_inv = 1 / scale;  dequantize: x ~ q * scale_inv, rounded once to the dtype
//
// A block is the whole tensor (scale comes in), 1 x 128 of a row, or a tile of 128 x 128; blocks at the edges are cut.
// out_t is the transposed tensor, written in the same pass. With 1 x 128 blocks it has blocks of its own, along its own
// rows (128 x 1 of x): what the product over the other dimension wants.
// Layout: x, out [rows, columns], out_t [columns, rows] contiguous; scale_inv [1], [rows, ceil(columns / 128)] or
// [ceil(rows / 128), ceil(columns / 128)]; scale_inv_t [columns, ceil(rows / 128)].
// Every operation is IEEE fp32: the CPU, a GPU and plain PyTorch give the same bits.
// Sources: Micikevicius et al. 2022 (arXiv:2209.05433); blocks as in DeepSeek-V3 2024 (arXiv:2412.19437), sec. 3.3.
#pragma once

#include "common/op.h"

namespace megalm {

enum class Format : int { kE4M3 = 0, kE5M2 = 1 };
enum class Block : int { kTensor = 0, kRow = 1, kTile = 2 };

constexpr int64_t kQuantizeTile = 128;

struct Quantize {
  DType dtype;
  Format format;
  Block block;
  bool power_of_two;
  int64_t rows, columns;
  const void* x;
  const float* scale;  // kTensor: [1]
  uint8_t* out;
  uint8_t* out_t;      // null: none
  float* scale_inv;    // kRow, kTile
  float* scale_inv_t;  // kRow with out_t
  float* amax;         // kTensor: [1]
  uint32_t* partial;   // kTensor: a word for each tile
};

// amax and the scale that it gives, over the whole tensor.
struct Amax {
  DType dtype;
  Format format;
  bool power_of_two;
  int64_t count;
  const void* x;
  float* amax;        // [1]
  float* scale;       // [1]
  uint32_t* partial;  // a word for each kAmaxChunk elements
};
constexpr int64_t kAmaxChunk = 16384;

struct Dequantize {
  DType dtype;
  Format format;
  Block block;
  int64_t rows, columns;
  const uint8_t* q;
  const float* scale_inv;
  void* out;
};

MEGALM_DECLARE_OP(quantize, Quantize)
MEGALM_DECLARE_OP(amax, Amax)
MEGALM_DECLARE_OP(dequantize, Dequantize)

}  // namespace megalm
