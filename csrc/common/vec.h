// A register of floats for the CPU kernels, on the compiler's vector extensions: 16 lanes with AVX-512, 8 with AVX2,
// 4 elsewhere (SSE2, NEON). bf16 is widened on load and rounded to nearest even on store; all arithmetic is fp32.
//
// Included by files that are compiled once for each instruction set: all of it is inline in that set's own namespace,
// and it calls no inline function of the standard library, which the linker could take from a build that this CPU
// cannot run.
#pragma once

#include <stddef.h>

#include <cstdint>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/op.h"

#if !defined(MEGALM_ISA)
#define MEGALM_ISA baseline
#endif

#define MEGALM_INLINE inline __attribute__((always_inline))

namespace megalm::MEGALM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UintVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
  uint16_t bits;
};

MEGALM_INLINE Vec broadcast(float value) { return Vec{} + value; }

MEGALM_INLINE float to_float(float value) { return value; }
MEGALM_INLINE float to_float(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

MEGALM_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
// 16-bit halves to floats, and the rounded upper halves of floats: gcc takes twice the instructions for what it is told
// with __builtin_convertvector.
MEGALM_INLINE Vec widened(HalfVec half) {
#if defined(__AVX512F__)
  const __m512i up = _mm512_set_epi32(0xf0000, 0xe0000, 0xd0000, 0xc0000, 0xb0000, 0xa0000, 0x90000, 0x80000, 0x70000,
                                      0x60000, 0x50000, 0x40000, 0x30000, 0x20000, 0x10000, 0);
  return (Vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, up, _mm512_maskz_broadcast_i64x4(0xff, (__m256i)half));
#elif defined(__AVX2__)
  const __m256i up =
      _mm256_set_epi32(0x0f0e8080, 0x0d0c8080, 0x0b0a8080, 0x09088080, 0x07068080, 0x05048080, 0x03028080, 0x01008080);
  return (Vec)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256((__m128i)half), up);
#else
  return (Vec)(__builtin_convertvector(half, UintVec) << 16);
#endif
}
MEGALM_INLINE HalfVec upper_halves(UintVec v) {
#if defined(__AVX512F__)
  const __m512i odd = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x1f001d, 0x1b0019, 0x170015, 0x130011, 0xf000d, 0xb0009,
                                       0x70005, 0x30001);
  const __m512i picked = _mm512_maskz_permutexvar_epi16(0xffffffff, odd, (__m512i)v);
  HalfVec low;
  __builtin_memcpy(&low, &picked, sizeof low);
  return low;
#elif defined(__AVX2__)
  const __m256i down = _mm256_srli_epi32((__m256i)v, 16);
  return (HalfVec)_mm_packus_epi32(_mm256_castsi256_si128(down), _mm256_extracti128_si256(down, 1));
#else
  return __builtin_convertvector(v >> 16, HalfVec);
#endif
}
// The nearest bf16 in the upper halves; below them is anything.
MEGALM_INLINE UintVec nearest_bfloat16(Vec v) {
  const UintVec bits = (UintVec)v, quiet_nan = UintVec{} + 0x7fc00000u;
#if defined(__AVX512F__)
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)bits, (__m512i)(UintVec{} + 0x10000u));
  const __m512i raised = (__m512i)(bits + 0x7fffu);
  const __m512i even = _mm512_mask_add_epi32(raised, odd, raised, (__m512i)(UintVec{} + 1u));
  return (UintVec)_mm512_mask_mov_epi32(even, _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q),
                                        (__m512i)quiet_nan);
#else
  return v != v ? quiet_nan : bits + 0x7fffu + ((bits >> 16) & 1u);
#endif
}

MEGALM_INLINE Vec load(const BFloat16* p) {
  HalfVec half;
  __builtin_memcpy(&half, p, sizeof half);
  return widened(half);
}
MEGALM_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
MEGALM_INLINE HalfVec round_to_bfloat16(Vec v) { return upper_halves(nearest_bfloat16(v)); }
MEGALM_INLINE void store(BFloat16* p, Vec v) {
  const HalfVec half = round_to_bfloat16(v);
  __builtin_memcpy(p, &half, sizeof half);
}

// Values that their dtype holds: they are stored as they are.
struct Exact {
  Vec value;
};
MEGALM_INLINE void store(float* p, Exact v) { store(p, v.value); }
MEGALM_INLINE void store(BFloat16* p, Exact v) {
  const HalfVec half = upper_halves((UintVec)v.value);
  __builtin_memcpy(p, &half, sizeof half);
}

// The first `count` (< kLanes) elements; the other lanes are 0.
template <typename T>
MEGALM_INLINE Vec load_part(const T* p, int64_t count) {
#if defined(__AVX512F__)
  const uint16_t mask = uint16_t((1u << count) - 1u);
  if constexpr (sizeof(T) == 4) {
    return (Vec)_mm512_maskz_loadu_ps(mask, p);
  } else {
    return widened((HalfVec)_mm256_maskz_loadu_epi16(mask, p));
  }
#else
  T buffer[kLanes] = {};
  __builtin_memcpy(buffer, p, size_t(count) * sizeof(T));
  return load(buffer);
#endif
}
template <typename T>
MEGALM_INLINE void store_part(T* p, Vec v, int64_t count) {
#if defined(__AVX512F__)
  const uint16_t mask = uint16_t((1u << count) - 1u);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, mask, (__m512)v);
  } else {
    _mm256_mask_storeu_epi16(p, mask, (__m256i)round_to_bfloat16(v));
  }
#else
  T buffer[kLanes];
  store(buffer, v);
  __builtin_memcpy(p, buffer, size_t(count) * sizeof(T));
#endif
}

template <typename T>
MEGALM_INLINE void store_part(T* p, Exact v, int64_t count) {
  store_part(p, v.value, count);
}

// Past the cache: the line is not read before it is written, nor kept. p is aligned to the register's size.
MEGALM_INLINE void stream(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}
MEGALM_INLINE void stream_halves(BFloat16* p, HalfVec half) {
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)p, (__m256i)half);
#elif defined(__AVX2__)
  _mm_stream_si128((__m128i*)p, (__m128i)half);
#else
  __builtin_memcpy(p, &half, sizeof half);
#endif
}
MEGALM_INLINE void stream(BFloat16* p, Vec v) { stream_halves(p, round_to_bfloat16(v)); }
MEGALM_INLINE void stream(float* p, Exact v) { stream(p, v.value); }
MEGALM_INLINE void stream(BFloat16* p, Exact v) { stream_halves(p, upper_halves((UintVec)v.value)); }

// An output of this many bytes has mostly left the cache when it is read: it goes past it. Measured on cores that share
// 32 MB: at 4 MB streaming is a quarter slower, from 8 to 12 MB it makes no difference, at 23 MB it is a sixth faster.
constexpr int64_t kStreamBytes = 12 << 20;

// Whether an output of rows of `row` bytes, `bytes` in all and not one of the inputs, is to be written with stream().
template <typename... Pointers>
MEGALM_INLINE bool streams(int64_t bytes, int64_t row, Pointers... outputs) {
  return bytes >= kStreamBytes && row % 64 == 0 && (((uintptr_t)outputs % 64 == 0) && ...);
}

// past: `to` and `count` are multiples of 64, as streams() sees to.
MEGALM_INLINE void copy_bytes(const char* from, char* to, int64_t count, bool past) {
  if (!past) {
    __builtin_memcpy(to, from, size_t(count));
    return;
  }
  for (int64_t i = 0; i < count; i += int64_t(sizeof(Vec))) stream((float*)(to + i), load((const float*)(from + i)));
}

// What a value becomes when it is stored as T and read again.
template <typename T>
MEGALM_INLINE Vec rounded(Vec v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else {
    return (Vec)(nearest_bfloat16(v) & 0xffff0000u);
  }
}

// Calls body(i, load, store) over [0, n): whole registers first, then one part of the elements that are left.
// past: whole registers are stored past the cache.
template <typename Body>
MEGALM_INLINE void for_each_vec(int64_t n, bool past, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    body(i, [](auto* p) { return load(p); }, [past](auto* p, auto v) { past ? stream(p, v) : store(p, v); });
  }
  if (i < n) {
    const int64_t count = n - i;
    body(i, [count](auto* p) { return load_part(p, count); }, [count](auto* p, auto v) { store_part(p, v, count); });
  }
}
template <typename Body>
MEGALM_INLINE void for_each_vec(int64_t n, Body&& body) {
  for_each_vec(n, false, body);
}

// The same for sums: `turn` goes 0 1 2 3 0 1 .., so that four of them grow side by side and none waits for its last
// addition.
template <typename Body>
MEGALM_INLINE void for_each_vec_in_turn(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int turn = 0; turn < 4; ++turn) {
      body(i + turn * kLanes, [](auto* p) { return load(p); }, [](auto* p, auto v) { store(p, v); }, turn);
    }
  }
  for_each_vec(n - i, [&](int64_t rest, auto load, auto store) { body(i + rest, load, store, 0); });
}

MEGALM_INLINE float sum(Vec v) {
#if defined(__AVX2__)
  __m256 parts[kLanes / 8];
  __builtin_memcpy(parts, &v, sizeof v);
  const __m256 whole = kLanes == 16 ? _mm256_add_ps(parts[0], parts[kLanes / 8 - 1]) : parts[0];
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(whole), _mm256_extractf128_ps(whole, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
MEGALM_INLINE float sum(const Vec (&v)[4]) { return sum((v[0] + v[1]) + (v[2] + v[3])); }
MEGALM_INLINE float maximum(Vec v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}
// Where one of the two is NaN, b is the result.
MEGALM_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
MEGALM_INLINE Vec minimum(Vec a, Vec b) { return a < b ? a : b; }
// NaN stays NaN.
MEGALM_INLINE Vec clamp(Vec x, float low, float high) { return minimum(broadcast(high), maximum(broadcast(low), x)); }

MEGALM_INLINE Vec square_root(Vec v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)v);
#elif defined(__SSE2__)
  return (Vec)_mm_sqrt_ps((__m128)v);
#elif defined(__aarch64__)
  return (Vec)vsqrtq_f32((float32x4_t)v);
#else
  Vec result;
  for (int i = 0; i < kLanes; ++i) result[i] = __builtin_sqrtf(v[i]);
  return result;
#endif
}

// p 2^n for a whole n in [-151, 129].
MEGALM_INLINE Vec scale_by_power_of_two(Vec p, Vec n) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  // In two factors, so that n = 128 and the subnormal range come out right.
  const IntVec exponent = __builtin_convertvector(n, IntVec);
  const IntVec half = exponent >> 1;
  const Vec scale = (Vec)((half + 127) << 23);
  const Vec rest = (Vec)((exponent - half + 127) << 23);
  return p * scale * rest;
#endif
}

// e^x to about 1 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, then a polynomial in r (fitted to the relative error, 3e-9)
// and the exponent's bits. 0 below -104, infinity above 88.73, NaN stays NaN.
MEGALM_INLINE Vec exp(Vec x) {
  const Vec clamped = clamp(x, -104.f, 89.f);
  const Vec magic = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = clamped * 1.44269504f + magic;
  const Vec n = shifted - magic;
  Vec r = clamped - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  Vec p = broadcast(1.38146098e-3f);
  p = p * r + 8.3687112e-3f;
  p = p * r + 4.16683875e-2f;
  p = p * r + 1.66665207e-1f;
  p = p * r + 0.499999935f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return scale_by_power_of_two(p, n);
}

MEGALM_INLINE Vec sigmoid(Vec x) { return 1.f / (1.f + exp(-x)); }

// The first float of `room` whose place in its page (of 4 KB) is p's. A processor takes a load for one that must wait
// where a recent store went to the same place in another page: what is written beside the reading of p, element by
// element, is kept where that does not happen.
MEGALM_INLINE float* at_page_place_of(const void* p, float* room) {
  constexpr uintptr_t kPage = 4096;
  return room + ((uintptr_t)p - (uintptr_t)room) % kPage / 64 * 16;  // whole cache lines
}
constexpr int64_t kPageFloats = 1024;  // the room that this takes

// What was streamed before is in memory before what is written after.
MEGALM_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Splits [0, n) among torch's OpenMP threads; `work` is the elements touched in all. Below 32k elements a thread's
// start costs more than it saves.
template <typename Body>
MEGALM_INLINE void parallel_for(int64_t n, int64_t work, Body&& body) {
#if defined(_OPENMP)
  if (work >= 32768 && n > 1 && omp_get_max_threads() > 1 && !omp_in_parallel()) {
#pragma omp parallel
    {
      const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
      body(n * me / threads, n * (me + 1) / threads);
      stream_fence();
    }
    return;
  }
#endif
  (void)work;
  body(int64_t(0), n);
  stream_fence();
}

// out[i] = sum over blocks of partial[block * stride + i], in the blocks' order.
template <typename T>
MEGALM_INLINE void sum_rows(const float* partial, int64_t blocks, int64_t stride, int64_t size, T* out) {
  for_each_vec(size, [&](int64_t i, auto load, auto store) {
    Vec total{};
    for (int64_t b = 0; b < blocks; ++b) total += load(partial + b * stride + i);
    store(out + i, total);
  });
}

// Calls body(T{}) with the CPU's type for dtype.
template <typename Body>
MEGALM_INLINE void for_dtype(DType dtype, Body&& body) {
  if (dtype == DType::kBFloat16) {
    body(BFloat16{});
  } else {
    body(float{});
  }
}

}  // namespace megalm::MEGALM_ISA
