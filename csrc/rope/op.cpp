#include "rope/op.h"

#include "common/vec.h"

namespace megalm::MEGALM_ISA {
namespace {

constexpr int kPairs = kLanes / 2;

typedef uint32_t HalfUintVec __attribute__((vector_size(2 * kLanes)));
typedef uint64_t PairVec __attribute__((vector_size(4 * kLanes)));

// kPairs numbers, each in the low half of its pair of lanes.
MEGALM_INLINE PairVec spread(const float* p) {
  HalfUintVec half;
  __builtin_memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, PairVec);
}

// kPairs neighbouring pairs (a, b): (a, b) * (cos, cos) + (b, a) * (-sin, sin).
template <typename T>
MEGALM_INLINE void rotate_neighbours(const T* x, T* y, const float* cos, const float* sin, bool inverse) {
  constexpr uint64_t kSign = 0x80000000u;
  const Vec v = load(x);
  const PairVec c = spread(cos), s = spread(sin) ^ (inverse ? kSign : 0), pairs = (PairVec)v;
  const Vec swapped = (Vec)(pairs << 32 | pairs >> 32);
  store(y, v * (Vec)(c | c << 32) + swapped * (Vec)((s ^ kSign) | s << 32));
}

template <typename T>
void rotate_token(const Rotary& a, const T* x, T* y, const float* cos, const float* sin) {
  const float sign = a.inverse ? -1.f : 1.f;
  for (int64_t head = 0; head < a.heads; ++head, x += a.head_stride, y += a.y_head_stride) {
    if (a.interleaved) {
      int64_t i = 0;
      for (; i + kPairs <= a.pairs; i += kPairs) rotate_neighbours(x + 2 * i, y + 2 * i, cos + i, sin + i, a.inverse);
      if (i < a.pairs) {
        const size_t left = size_t(a.pairs - i);
        T in[kLanes] = {}, out[kLanes];
        float c[kPairs] = {}, s[kPairs] = {};
        __builtin_memcpy(in, x + 2 * i, 2 * left * sizeof(T));
        __builtin_memcpy(c, cos + i, left * sizeof(float));
        __builtin_memcpy(s, sin + i, left * sizeof(float));
        rotate_neighbours(in, out, c, s, a.inverse);
        __builtin_memcpy(y + 2 * i, out, 2 * left * sizeof(T));
      }
    } else {
      for_each_vec(a.pairs, [&](int64_t i, auto load, auto store) {
        const Vec first = load(x + i), second = load(x + a.pairs + i), c = load(cos + i), s = sign * load(sin + i);
        store(y + i, first * c - second * s);
        store(y + a.pairs + i, second * c + first * s);
      });
    }
    if (x != y) {
      for (int64_t i = 2 * a.pairs; i < a.size; ++i) y[i] = x[i];
    }
  }
}

}  // namespace

void rotary(const Rotary& a) {
  for_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t tokens = a.sequence * a.batch;
    parallel_for(tokens, tokens * a.heads * a.size, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const int64_t s = token / a.batch, b = token % a.batch;
        const int64_t table = s * a.table_sequence_stride + b * a.table_batch_stride;
        rotate_token(a, static_cast<const T*>(a.x) + s * a.sequence_stride + b * a.batch_stride,
                     static_cast<T*>(a.y) + s * a.y_sequence_stride + b * a.y_batch_stride, a.cos + table,
                     a.sin + table);
      }
    });
  });
}

}  // namespace megalm::MEGALM_ISA
