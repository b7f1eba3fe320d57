#include "rope/op.h"

#include "common/vec.h"

namespace megalm::MEGALM_ISA {
namespace {

MEGALM_INLINE void set(float* p, float value) { *p = value; }
MEGALM_INLINE void set(BFloat16* p, float value) { p->bits = round_to_bfloat16(broadcast(value))[0]; }

template <typename T>
void rotate_token(const Rotary& a, const T* x, T* y, const float* cos, const float* sin) {
  const float sign = a.inverse ? -1.f : 1.f;
  for (int64_t head = 0; head < a.heads; ++head, x += a.head_stride, y += a.size) {
    if (a.interleaved) {
      for (int64_t i = 0; i < a.pairs; ++i) {
        const float first = to_float(x[2 * i]), second = to_float(x[2 * i + 1]), s = sign * sin[i];
        set(y + 2 * i, first * cos[i] - second * s);
        set(y + 2 * i + 1, second * cos[i] + first * s);
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
                     static_cast<T*>(a.y) + token * a.heads * a.size, a.cos + table, a.sin + table);
      }
    });
  });
}

}  // namespace megalm::MEGALM_ISA
