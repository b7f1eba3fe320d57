#include "adamw/op.h"

#include <cmath>

#include "common/vec.h"

namespace megalm::MEGALM_ISA {
namespace {

MEGALM_INLINE Vec square_root(Vec v) {
  Vec result;
  for (int i = 0; i < kLanes; ++i) result[i] = __builtin_sqrtf(v[i]);
  return result;
}

template <typename T, bool kWriteOut>
void update(const AdamW& a, int64_t begin, int64_t end) {
  const float scale = a.grad_scale_pointer ? *a.grad_scale_pointer : a.grad_scale;
  const float keep = 1.f - a.lr * a.weight_decay, rate = a.lr / a.correction1;
  const float root = 1.f / std::sqrt(a.correction2);
  const float rest1 = 1.f - a.beta1, rest2 = 1.f - a.beta2;
  float *w = a.master + begin, *m = a.exp_avg + begin, *v = a.exp_avg_sq + begin;
  const float* grad = a.grad + begin;
  T* out = static_cast<T*>(a.out) + (kWriteOut ? begin : 0);
  for_each_vec(end - begin, [&](int64_t i, auto load, auto store) {
    const Vec g = load(grad + i) * scale;
    const Vec first = a.beta1 * load(m + i) + rest1 * g;
    const Vec second = a.beta2 * load(v + i) + rest2 * (g * g);
    store(m + i, first);
    store(v + i, second);
    const Vec updated = load(w + i) * keep - rate * first / (square_root(second) * root + a.eps);
    store(w + i, updated);
    if constexpr (kWriteOut) store(out + i, updated);
  });
}

}  // namespace

void adamw(const AdamW& a) {
  if (a.skip && *a.skip != 0.f) return;
  // Whole registers to each thread, so that the split does not change which elements share one.
  const int64_t chunk = 1024, chunks = (a.size + chunk - 1) / chunk;
  parallel_for(chunks, a.size, [&](int64_t first, int64_t last) {
    const int64_t begin = first * chunk, end = last * chunk < a.size ? last * chunk : a.size;
    if (!a.out) {
      update<float, false>(a, begin, end);
    } else {
      for_dtype(a.out_dtype, [&](auto type) { update<decltype(type), true>(a, begin, end); });
    }
  });
}

}  // namespace megalm::MEGALM_ISA
