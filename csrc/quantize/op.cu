#include "common/kernel.cuh"
#include "quantize/formats.h"
#include "quantize/op.h"

namespace megalm::cuda {
namespace {

constexpr int kTile = int(kQuantizeTile), kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kEach = kTile / kWarp;   // neighbouring columns of a lane
constexpr int kHeld = kTile / kWarps;  // rows of a warp, which it keeps in registers
constexpr int kWords = kTile / 4 + 1;  // a row of the turned tile in words of four codes, one more against conflicts
constexpr uint32_t kInfinity = 0x7f800000u;

struct Largest {
  __device__ static uint32_t join(uint32_t a, uint32_t b) { return a > b ? a : b; }
};

__device__ __forceinline__ uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
__device__ __forceinline__ float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
__device__ __forceinline__ uint32_t magnitude(float value) { return bits_of(value) & 0x7fffffffu; }

template <typename F>
__device__ __forceinline__ float scale_of(uint32_t amax, bool power_of_two) {
  if (amax == 0 || amax >= kInfinity) return 1.f;
  float scale = F::kLargest / from_bits(amax);
  scale = scale < 0x1p126f ? scale : 0x1p126f;
  return power_of_two ? from_bits(bits_of(scale) & kInfinity) : scale;
}

template <typename F>
__device__ __forceinline__ uint32_t to_fp8(float value) {
  const uint32_t bits = bits_of(value), size = bits & 0x7fffffffu, sign = bits >> 24 & 0x80u;
  if (size > kInfinity) return sign | 0x7fu;
  const uint32_t clamped = size > F::kLargestBits ? F::kLargestBits : size;
  if (clamped < F::kSmallestBits) return sign | (bits_of(from_bits(clamped) + F::kAlign) - F::kAlignBits);
  const uint32_t odd = clamped >> F::kShift & 1u;
  return sign | (clamped - (F::kBias << 23) + ((1u << (F::kShift - 1)) - 1) + odd) >> F::kShift;
}

template <typename F>
__device__ __forceinline__ float from_fp8(uint32_t code) {
  const uint32_t size = code & 0x7fu, sign = (code & 0x80u) << 24;
  if (size >= F::kFirstSpecial) return from_bits(sign | (size == 0x7cu ? kInfinity : 0x7fc00000u));
  if (size < 1u << (23 - F::kShift)) return from_bits(sign | bits_of(float(int(size)) * F::kStep));
  return from_bits(sign | ((size << F::kShift) + (F::kBias << 23)));
}

// One block a tile: a warp takes 16 rows, a lane 4 neighbouring columns of each, all of it in registers.
// N: columns in one access, 4 or 1. Shared memory turns the codes for the transposed tensor.
template <typename T, int N, typename F, Block kBlock>
__global__ void __launch_bounds__(kThreads) quantize_kernel(Quantize a, int64_t across, int64_t down) {
  SHARED(uint32_t, scratch, kWarp);
  SHARED(uint32_t, turned, kTile* kWords);
  SHARED(uint32_t, column_tops, kWarps* kTile);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row0 = blockIdx.x / across * kTile + warp * kHeld, tile_row = blockIdx.x / across;
  const int64_t column0 = blockIdx.x % across * kTile + lane * kEach, tile_column = blockIdx.x % across;
  const T* x = static_cast<const T*>(a.x);
  float v[kHeld][kEach];
  uint32_t top = 0;
#pragma unroll
  for (int r = 0; r < kHeld; ++r) {
#pragma unroll
    for (int j = 0; j < kEach; j += N) {
      Pack<T, N> p{};
      if (row0 + r < a.rows && column0 + j < a.columns) p = load_pack<N>(x + (row0 + r) * a.columns + column0 + j);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        v[r][j + i] = p.v[i];
        top = Largest::join(top, magnitude(p.v[i]));
      }
    }
  }
  float scale = kBlock == Block::kTensor ? *a.scale : 1.f;
  if constexpr (kBlock != Block::kRow) {
    top = block_reduce<Largest>(top, scratch);
    if constexpr (kBlock == Block::kTile) scale = scale_of<F>(top, a.power_of_two);
    if (threadIdx.x == 0) {
      if constexpr (kBlock == Block::kTile) {
        a.scale_inv[blockIdx.x] = 1.f / scale;
      } else {
        a.partial[blockIdx.x] = top;
      }
    }
  }
  const bool turn = a.out_t != nullptr;
  float column_scale[kEach];
  if (kBlock == Block::kRow && turn) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      uint32_t column_top = 0;
#pragma unroll
      for (int r = 0; r < kHeld; ++r) column_top = Largest::join(column_top, magnitude(v[r][j]));
      column_tops[warp * kTile + lane * kEach + j] = column_top;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      uint32_t column_top = 0;
      for (int w = 0; w < kWarps; ++w)
        column_top = Largest::join(column_top, column_tops[w * kTile + lane * kEach + j]);
      column_scale[j] = scale_of<F>(column_top, a.power_of_two);
      if (warp == 0 && column0 + j < a.columns) a.scale_inv_t[(column0 + j) * down + tile_row] = 1.f / column_scale[j];
    }
  }
#pragma unroll
  for (int quad = 0; quad < kHeld; quad += 4) {
    uint32_t words[kEach] = {};  // of each column, the codes of four rows
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = quad + i;
      const int64_t row = row0 + r;
      if constexpr (kBlock == Block::kRow) {
        uint32_t row_top = 0;
#pragma unroll
        for (int j = 0; j < kEach; ++j) row_top = Largest::join(row_top, magnitude(v[r][j]));
        scale = scale_of<F>(warp_reduce<Largest>(row_top), a.power_of_two);
        if (lane == 0 && row < a.rows) a.scale_inv[row * across + tile_column] = 1.f / scale;
      }
      uint32_t codes = 0;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const uint32_t code = to_fp8<F>(v[r][j] * scale);
        codes |= code << 8 * j;
        words[j] |= (kBlock == Block::kRow && turn ? to_fp8<F>(v[r][j] * column_scale[j]) : code) << 8 * i;
      }
      if (row < a.rows) {
        uint8_t* out = a.out + row * a.columns + column0;
        if (N == kEach && column0 < a.columns) {
          CHECK_ALIGNED(out, 4);
          *reinterpret_cast<uint32_t*>(out) = codes;
        } else if (N != kEach) {
#pragma unroll
          for (int j = 0; j < kEach; ++j) {
            if (column0 + j < a.columns) out[j] = uint8_t(codes >> 8 * j);
          }
        }
      }
    }
    if (turn) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) turned[(lane * kEach + j) * kWords + (warp * kHeld + quad) / 4] = words[j];
    }
  }
  if (!turn) return;
  __syncthreads();
  // A warp writes a column of the tile, a lane the codes of four rows.
  const int64_t row = tile_row * kTile + lane * 4;
  const bool whole = a.rows % 4 == 0;
  for (int c = warp; c < kTile; c += kWarps) {
    const int64_t column = tile_column * kTile + c;
    if (column >= a.columns) break;
    const uint32_t word = turned[c * kWords + lane];
    uint8_t* out = a.out_t + column * a.rows + row;
    if (whole && row < a.rows) {
      CHECK_ALIGNED(out, 4);
      *reinterpret_cast<uint32_t*>(out) = word;
    } else if (!whole) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (row + i < a.rows) out[i] = uint8_t(word >> 8 * i);
      }
    }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) amax_kernel(Amax a) {
  SHARED(uint32_t, scratch, kWarp);
  const T* x = static_cast<const T*>(a.x);
  const int64_t begin = int64_t(blockIdx.x) * kAmaxChunk;
  const int64_t end = a.count - begin < kAmaxChunk ? a.count : begin + kAmaxChunk;
  uint32_t top = 0;
  for (int64_t i = begin + int64_t(threadIdx.x) * N; i < end; i += kThreads * N) {
    const Pack<T, N> p = load_pack<N>(x + i);
#pragma unroll
    for (int j = 0; j < N; ++j) top = Largest::join(top, magnitude(p.v[j]));
  }
  top = block_reduce<Largest>(top, scratch);
  if (threadIdx.x == 0) a.partial[blockIdx.x] = top;
}

// The largest of `count` partial results; its scale where one is wanted.
template <typename F>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const uint32_t* partial, int64_t count, bool power_of_two, float* amax, float* scale) {
  SHARED(uint32_t, scratch, kWarp);
  uint32_t top = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) top = Largest::join(top, partial[i]);
  top = block_reduce<Largest>(top, scratch);
  if (threadIdx.x != 0) return;
  *amax = from_bits(top);
  if (scale) *scale = scale_of<F>(top, power_of_two);
}

constexpr int kInFlight = 4;  // accesses of a thread that are read before the first is written

// Grid: rows along x, runs of kInFlight * N * kThreads columns along y.
template <typename T, int N, typename F>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(Dequantize a, int64_t across) {
  const int64_t row = blockIdx.x, step = int64_t(kThreads) * N;
  const uint8_t* q = a.q + row * a.columns;
  T* out = static_cast<T*>(a.out) + row * a.columns;
  for (int64_t first = int64_t(blockIdx.y) * kInFlight * step + threadIdx.x * N; first < a.columns;
       first += int64_t(gridDim.y) * kInFlight * step) {
    uint32_t codes[kInFlight] = {};
    float scale_inv[kInFlight] = {};
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t column = first + k * step;
      if (column >= a.columns) continue;
      if constexpr (N == 4) {
        CHECK_ALIGNED(q + column, 4);
        codes[k] = *reinterpret_cast<const uint32_t*>(q + column);
      } else {
        codes[k] = q[column];
      }
      scale_inv[k] = a.scale_inv[a.block == Block::kTensor ? 0
                                 : a.block == Block::kRow  ? row * across + column / kTile
                                                           : row / kTile * across + column / kTile];
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t column = first + k * step;
      if (column >= a.columns) continue;
      Pack<T, N> p;
#pragma unroll
      for (int j = 0; j < N; ++j) p.v[j] = from_fp8<F>(codes[k] >> 8 * j & 0xffu) * scale_inv[k];
      store_pack(out + column, p);
    }
  }
}

// body(T{}, F{}, Constant<columns in one access>{}): 4 where every row begins at a multiple of 4 of its elements.
template <typename Body>
void for_kind(DType dtype, Format format, int64_t columns, const void* values, const void* codes, Body&& body) {
  const auto at = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const bool packed = columns % 4 == 0 && at(values) % 16 == 0 && at(codes) % 4 == 0;
  const auto run = [&](auto type, auto f) {
    if (packed) {
      body(type, f, Constant<4>{});
    } else {
      body(type, f, Constant<1>{});
    }
  };
  for_dtype(
      dtype, [](auto) { return false; },
      [&](auto type, auto one) {
        if constexpr (decltype(one)::value == 1) {
          if (format == Format::kE4M3) {
            run(type, E4M3{});
          } else {
            run(type, E5M2{});
          }
        }
      });
}

}  // namespace

void quantize(const Quantize& a, void* stream) {
  const int64_t across = (a.columns + kTile - 1) / kTile, down = (a.rows + kTile - 1) / kTile, tiles = across * down;
  for_kind(a.dtype, a.format, a.columns, a.x, a.out, [&](auto type, auto f, auto count) {
    using T = decltype(type);
    using F = decltype(f);
    constexpr int N = decltype(count)::value;
    if (tiles > 0) {
      switch (a.block) {
        case Block::kTensor:
          LAUNCH((quantize_kernel<T, N, F, Block::kTensor>), unsigned(tiles), kThreads, stream, a, across, down);
          break;
        case Block::kRow:
          LAUNCH((quantize_kernel<T, N, F, Block::kRow>), unsigned(tiles), kThreads, stream, a, across, down);
          break;
        case Block::kTile:
          LAUNCH((quantize_kernel<T, N, F, Block::kTile>), unsigned(tiles), kThreads, stream, a, across, down);
          break;
      }
    }
    if (a.block == Block::kTensor) {
      LAUNCH((finish_kernel<F>), 1u, kThreads, stream, a.partial, tiles, false, a.amax, static_cast<float*>(nullptr));
    }
  });
}

void amax(const Amax& a, void* stream) {
  const int64_t chunks = (a.count + kAmaxChunk - 1) / kAmaxChunk;
  for_dtype(
      a.dtype, [&](auto type) { return packable<decltype(type)>(a.count, a.x); },
      [&](auto type, auto count) {
        if (chunks > 0) {
          LAUNCH((amax_kernel<decltype(type), decltype(count)::value>), unsigned(chunks), kThreads, stream, a);
        }
      });
  if (a.format == Format::kE4M3) {
    LAUNCH((finish_kernel<E4M3>), 1u, kThreads, stream, a.partial, chunks, a.power_of_two, a.amax, a.scale);
  } else {
    LAUNCH((finish_kernel<E5M2>), 1u, kThreads, stream, a.partial, chunks, a.power_of_two, a.amax, a.scale);
  }
}

void dequantize(const Dequantize& a, void* stream) {
  if (a.rows == 0 || a.columns == 0) return;
  for_kind(a.dtype, a.format, a.columns, a.out, a.q, [&](auto type, auto f, auto count) {
    constexpr int N = decltype(count)::value;
    int64_t parts = (a.columns / N + kInFlight * kThreads - 1) / (kInFlight * kThreads);
    parts = parts < 65535 ? parts : 65535;
    LAUNCH((dequantize_kernel<decltype(type), N, decltype(f)>), dim3(unsigned(a.rows), unsigned(parts)), kThreads,
           stream, a, (a.columns + kTile - 1) / kTile);
  });
}

}  // namespace megalm::cuda
