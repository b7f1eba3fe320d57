#include "quantize/op.h"

#include "common/vec.h"
#include "quantize/formats.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace megalm::MEGALM_ISA {
namespace {

typedef uint8_t ByteVec __attribute__((vector_size(kLanes)));

constexpr int kTile = int(kQuantizeTile);
constexpr uint32_t kInfinity = 0x7f800000u;

MEGALM_INLINE UintVec magnitude(Vec v) { return (UintVec)v & 0x7fffffffu; }
MEGALM_INLINE UintVec larger(UintVec a, UintVec b) { return a > b ? a : b; }
MEGALM_INLINE uint32_t largest_lane(UintVec v) {
  uint32_t top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// NaN's bits are above those of infinity, and those above all others: the largest magnitude is an integer maximum.
template <typename F>
MEGALM_INLINE float scale_of(uint32_t amax_bits, bool power_of_two) {
  if (amax_bits == 0 || amax_bits >= kInfinity) return 1.f;
  float amax;
  __builtin_memcpy(&amax, &amax_bits, 4);
  float scale = F::kLargest / amax;
  scale = scale < 0x1p126f ? scale : 0x1p126f;
  if (power_of_two) {
    uint32_t bits;
    __builtin_memcpy(&bits, &scale, 4);
    bits &= kInfinity;
    __builtin_memcpy(&scale, &bits, 4);
  }
  return scale;
}

template <typename F>
MEGALM_INLINE ByteVec to_fp8(Vec v) {
  const UintVec bits = (UintVec)v, size = bits & 0x7fffffffu;
  const UintVec largest = UintVec{} + F::kLargestBits;
  const UintVec clamped = size > largest ? largest : size;
  const UintVec odd = (clamped >> F::kShift) & 1u;
  const UintVec normal = (clamped - (F::kBias << 23) + ((1u << (F::kShift - 1)) - 1) + odd) >> F::kShift;
  // Adding kAlign rounds to multiples of kStep and leaves their number in the last bits.
  const UintVec small = (UintVec)((Vec)clamped + F::kAlign) - F::kAlignBits;
  UintVec code = clamped < F::kSmallestBits ? small : normal;
  code = size > kInfinity ? UintVec{} + 0x7fu : code;
  return __builtin_convertvector(code | ((bits >> 24) & 0x80u), ByteVec);
}

#if defined(__AVX512F__) || defined(__F16C__)
// Through fp16, which has e5m2's exponent and one bit more of it than e4m3: that one comes out too small by 2^8.
template <typename F>
MEGALM_INLINE Vec from_fp8(ByteVec codes) {
  constexpr bool kWide = F::kFirstSpecial == 0x7cu;
#if defined(__AVX512F__)
  __m256i half = _mm256_cvtepi8_epi16((__m128i)codes);
  half = kWide ? _mm256_slli_epi16(half, 8)
               : _mm256_and_si256(_mm256_slli_epi16(half, 7), _mm256_set1_epi16(int16_t(0xbf80)));
  const Vec value = (Vec)_mm512_maskz_cvtph_ps(0xffff, half);
#else
  long long bits;
  __builtin_memcpy(&bits, &codes, 8);
  __m128i half = _mm_cvtepi8_epi16(_mm_cvtsi64_si128(bits));
  half = kWide ? _mm_slli_epi16(half, 8) : _mm_and_si128(_mm_slli_epi16(half, 7), _mm_set1_epi16(int16_t(0xbf80)));
  const Vec value = (Vec)_mm256_cvtph_ps(half);
#endif
  if (kWide) return value;
  const Vec scaled = value * 256.f;
  return magnitude(scaled) == 0x43f00000u ? broadcast(__builtin_nanf("")) : scaled;  // 480: e4m3's NaN
}
#else
template <typename F>
MEGALM_INLINE Vec from_fp8(ByteVec codes) {
  const UintVec code = __builtin_convertvector(codes, UintVec), size = code & 0x7fu;
  const UintVec normal = (size << F::kShift) + (F::kBias << 23);
  const UintVec small = (UintVec)(__builtin_convertvector((IntVec)size, Vec) * F::kStep);
  UintVec bits = size < (1u << (23 - F::kShift)) ? small : normal;
  const UintVec special =
      size == F::kFirstSpecial && F::kFirstSpecial == 0x7cu ? UintVec{} + kInfinity : UintVec{} + 0x7fc00000u;
  bits = size >= F::kFirstSpecial ? special : bits;
  return (Vec)(bits | ((code & 0x80u) << 24));
}
#endif

template <typename T>
MEGALM_INLINE Vec load_up_to(const T* p, int64_t count) {
  return count >= kLanes ? load(p) : load_part(p, count);
}

MEGALM_INLINE void store_bytes(uint8_t* p, ByteVec v, int64_t count) {
  if (count >= kLanes) {
    __builtin_memcpy(p, &v, sizeof v);
  } else {
    __builtin_memcpy(p, &v, size_t(count));
  }
}

typedef uint8_t Bytes __attribute__((vector_size(16)));
constexpr int kSide = 16;

#if defined(__clang__)
#define MEGALM_INTERLEAVE(a, b, first)                                                                                \
  __builtin_shufflevector(a, b, first, first + 16, first + 1, first + 17, first + 2, first + 18, first + 3,           \
                          first + 19, first + 4, first + 20, first + 5, first + 21, first + 6, first + 22, first + 7, \
                          first + 23)
#else
#define MEGALM_INTERLEAVE(a, b, first) \
  __builtin_shuffle(a, b, (Bytes{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23} + uint8_t(first)))
#endif

// 16 x 16 bytes, rows to columns: interleaving row i with row i + 8 turns the bits of a byte's place by one, and four
// turns exchange row and column.
MEGALM_INLINE void transpose_square(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
  Bytes rows[kSide], next[kSide];
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) __builtin_memcpy(&rows[i], from + i * from_stride, kSide);
#pragma GCC unroll 4
  for (int turn = 0; turn < 4; ++turn) {
#pragma GCC unroll 8
    for (int i = 0; i < kSide / 2; ++i) {
      next[2 * i] = MEGALM_INTERLEAVE(rows[i], rows[i + kSide / 2], 0);
      next[2 * i + 1] = MEGALM_INTERLEAVE(rows[i], rows[i + kSide / 2], 8);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) __builtin_memcpy(to + i * to_stride, &rows[i], kSide);
}

// The codes of kStrip rows of a tile, a cache line of each column of the transposed tensor.
constexpr int kStrip = 64;
struct Strip {
  alignas(64) uint8_t codes[kStrip * kTile], turned[kTile * kStrip];
};

template <typename T>
MEGALM_INLINE UintVec row_largest(const T* x, int64_t width) {
  UintVec top{};
  for (int64_t i = 0; i < width; i += kLanes) top = larger(top, magnitude(load_up_to(x + i, width - i)));
  return top;
}

template <typename T, typename F, Block kBlock, bool kTurn>
void quantize_tile(const Quantize& a, int64_t row0, int64_t column0, int64_t number, Strip& strip) {
  const int64_t height = a.rows - row0 < kTile ? a.rows - row0 : kTile;
  const int64_t width = a.columns - column0 < kTile ? a.columns - column0 : kTile;
  const int64_t across = (a.columns + kTile - 1) / kTile, down = (a.rows + kTile - 1) / kTile;
  const T* x = static_cast<const T*>(a.x) + row0 * a.columns + column0;
  constexpr bool kOwnColumns = kTurn && kBlock == Block::kRow;
  float row_scale[kTile];
  Vec column_scale[kTile / kLanes];
  // A reading of the tile by itself: it runs ahead of memory better than one with the conversion and its writing, which
  // then has the tile in the cache.
  if (kBlock != Block::kRow) {
    UintVec top{};
    for (int64_t r = 0; r < height; ++r) top = larger(top, row_largest(x + r * a.columns, width));
    if (kBlock == Block::kTensor) {
      a.partial[number] = largest_lane(top);
      row_scale[0] = *a.scale;
    } else {
      row_scale[0] = scale_of<F>(largest_lane(top), a.power_of_two);
      a.scale_inv[number] = 1.f / row_scale[0];
    }
  }
  if (kBlock == Block::kRow) {
    UintVec column_top[kTile / kLanes] = {};
    for (int64_t r = 0; r < height; ++r) {
      UintVec top{};
      for (int64_t i = 0; i < width; i += kLanes) {
        const UintVec size = magnitude(load_up_to(x + r * a.columns + i, width - i));
        top = larger(top, size);
        if (kOwnColumns) column_top[i / kLanes] = larger(column_top[i / kLanes], size);
      }
      row_scale[r] = scale_of<F>(largest_lane(top), a.power_of_two);
      a.scale_inv[(row0 + r) * across + column0 / kTile] = 1.f / row_scale[r];
    }
    for (int64_t c = 0; kOwnColumns && c < width; ++c) {
      const float scale = scale_of<F>(column_top[c / kLanes][c % kLanes], a.power_of_two);
      column_scale[c / kLanes][c % kLanes] = scale;
      a.scale_inv_t[(column0 + c) * down + row0 / kTile] = 1.f / scale;
    }
  }
  // A column of the transposed tile is far from the next: lines that are written whole, and past the cache, are not
  // read before. Rows of a tile are far apart, too: what fetches ahead by itself in a long row does not here.
  const bool past = kTurn && a.rows % 64 == 0 && (uintptr_t)a.out_t % 64 == 0;
  const int64_t ahead = kBlock != Block::kRow                 ? 0
                        : a.columns - column0 - kTile < kTile ? a.columns - column0 - kTile
                                                              : kTile;
  for (int64_t r = 0; r < height; ++r) {
    const T* from = x + r * a.columns;
    for (int64_t i = 0; i < ahead; i += int64_t(64 / sizeof(T))) __builtin_prefetch(from + kTile + i);
    uint8_t* to = a.out + (row0 + r) * a.columns + column0;
    uint8_t* codes = strip.codes + r % kStrip * kTile;
    const float scale = row_scale[kBlock == Block::kRow ? r : 0];
    for (int64_t i = 0; i < width; i += kLanes) {
      const Vec v = load_up_to(from + i, width - i);
      const ByteVec code = to_fp8<F>(v * scale);
      store_bytes(to + i, code, width - i);
      if (kTurn) store_bytes(codes + i, kOwnColumns ? to_fp8<F>(v * column_scale[i / kLanes]) : code, kLanes);
    }
    if (!kTurn || (r % kStrip != kStrip - 1 && r != height - 1)) continue;
    const int64_t first = r / kStrip * kStrip, count = r + 1 - first;
    for (int64_t i = 0; i < count; i += kSide) {
      for (int64_t c = 0; c < width; c += kSide) {
        transpose_square(strip.codes + i * kTile + c, kTile, strip.turned + c * kStrip + i, kStrip);
      }
    }
    uint8_t* out = a.out_t + column0 * a.rows + row0 + first;
    for (int64_t c = 0; c < width; ++c) {
      copy_bytes((const char*)strip.turned + c * kStrip, (char*)out + c * a.rows, count, past && count == kStrip);
    }
  }
}

template <typename T>
uint32_t chunk_largest(const T* x, int64_t count) {
  UintVec tops[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) tops[j] = larger(tops[j], magnitude(load(x + i + j * kLanes)));
  }
  for (; i < count; i += kLanes) tops[0] = larger(tops[0], magnitude(load_up_to(x + i, count - i)));
  return largest_lane(larger(larger(tops[0], tops[1]), larger(tops[2], tops[3])));
}

// One scale and no transposed copy: rows and tiles do not matter.
template <typename T, typename F>
uint32_t quantize_flat(const T* x, float scale, uint8_t* out, int64_t count) {
  UintVec top{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec v = load(x + i);
    top = larger(top, magnitude(v));
    store_bytes(out + i, to_fp8<F>(v * scale), kLanes);
  }
  if (i < count) {
    const Vec v = load_part(x + i, count - i);
    top = larger(top, magnitude(v));
    store_bytes(out + i, to_fp8<F>(v * scale), count - i);
  }
  return largest_lane(top);
}

template <typename T, typename F>
void dequantize_rows(const Dequantize& a, int64_t begin, int64_t end) {
  const int64_t across = (a.columns + kTile - 1) / kTile, row_bytes = a.columns * int64_t(sizeof(T));
  const bool past = streams(a.rows * row_bytes, row_bytes, a.out);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t column = 0; column < a.columns; column += kTile) {
      const int64_t width = a.columns - column < kTile ? a.columns - column : kTile;
      const int64_t which = a.block == Block::kTensor ? 0
                            : a.block == Block::kRow  ? row * across + column / kTile
                                                      : row / kTile * across + column / kTile;
      const float scale_inv = a.scale_inv[which];
      const uint8_t* q = a.q + row * a.columns + column;
      T* out = static_cast<T*>(a.out) + row * a.columns + column;
      int64_t i = 0;
      for (; i + kLanes <= width; i += kLanes) {
        ByteVec codes;
        __builtin_memcpy(&codes, q + i, sizeof codes);
        const Vec v = from_fp8<F>(codes) * scale_inv;
        past ? stream(out + i, v) : store(out + i, v);
      }
      if (i < width) {
        ByteVec codes{};
        __builtin_memcpy(&codes, q + i, size_t(width - i));
        store_part(out + i, from_fp8<F>(codes) * scale_inv, width - i);
      }
    }
  }
}

template <typename Body>
MEGALM_INLINE void for_format(Format format, Body&& body) {
  if (format == Format::kE4M3) {
    body(E4M3{});
  } else {
    body(E5M2{});
  }
}

float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

}  // namespace

void quantize(const Quantize& a) {
  const int64_t across = (a.columns + kTile - 1) / kTile, count = a.rows * a.columns;
  const bool flat = a.block == Block::kTensor && !a.out_t;
  const int64_t parts = flat ? (count + kAmaxChunk - 1) / kAmaxChunk : across * ((a.rows + kTile - 1) / kTile);
  for_dtype(a.dtype, [&](auto type) {
    for_format(a.format, [&](auto format) {
      using T = decltype(type);
      using F = decltype(format);
      const auto tiles = [&](auto tile) {
        parallel_for(parts, count, [&](int64_t begin, int64_t end) {
          Strip strip;
          for (int64_t t = begin; t < end; ++t) tile(a, t / across * kTile, t % across * kTile, t, strip);
        });
      };
      if (flat) {
        parallel_for(parts, count, [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t) {
            const int64_t first = t * kAmaxChunk, left = count - first;
            a.partial[t] = quantize_flat<T, F>(static_cast<const T*>(a.x) + first, *a.scale, a.out + first,
                                               left < kAmaxChunk ? left : kAmaxChunk);
          }
        });
      } else if (a.block == Block::kTensor) {
        tiles(quantize_tile<T, F, Block::kTensor, true>);
      } else if (a.block == Block::kRow) {
        tiles(a.out_t ? quantize_tile<T, F, Block::kRow, true> : quantize_tile<T, F, Block::kRow, false>);
      } else {
        tiles(a.out_t ? quantize_tile<T, F, Block::kTile, true> : quantize_tile<T, F, Block::kTile, false>);
      }
    });
  });
  if (a.block != Block::kTensor) return;
  uint32_t top = 0;
  for (int64_t t = 0; t < parts; ++t) top = a.partial[t] > top ? a.partial[t] : top;
  *a.amax = from_bits(top);
}

void amax(const Amax& a) {
  const int64_t chunks = (a.count + kAmaxChunk - 1) / kAmaxChunk;
  for_dtype(a.dtype, [&](auto type) {
    const auto* x = static_cast<const decltype(type)*>(a.x);
    parallel_for(chunks, a.count, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t left = a.count - c * kAmaxChunk;
        a.partial[c] = chunk_largest(x + c * kAmaxChunk, left < kAmaxChunk ? left : kAmaxChunk);
      }
    });
  });
  uint32_t top = 0;
  for (int64_t c = 0; c < chunks; ++c) top = a.partial[c] > top ? a.partial[c] : top;
  *a.amax = from_bits(top);
  for_format(a.format, [&](auto format) { *a.scale = scale_of<decltype(format)>(top, a.power_of_two); });
}

void dequantize(const Dequantize& a) {
  for_dtype(a.dtype, [&](auto type) {
    for_format(a.format, [&](auto format) {
      parallel_for(a.rows, a.rows * a.columns, [&](int64_t begin, int64_t end) {
        dequantize_rows<decltype(type), decltype(format)>(a, begin, end);
      });
    });
  });
}

}  // namespace megalm::MEGALM_ISA
