#include "adamw/op.h"

#include <cmath>

#include "common/vec.h"

namespace megalm::MEGALM_ISA {
namespace {

template <typename T, bool kWriteOut>
void update(const AdamW& a, int64_t begin, int64_t end, float lr) {
  const float scale = a.grad_scale_pointer ? *a.grad_scale_pointer : a.grad_scale;
  const float keep = 1.f - lr * a.weight_decay, rate = lr / a.correction1;
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

void update_any(const AdamW& a, int64_t begin, int64_t end, float lr) {
  if (!a.out) {
    update<float, false>(a, begin, end, lr);
  } else {
    for_dtype(a.out_dtype, [&](auto type) { update<decltype(type), true>(a, begin, end, lr); });
  }
}

// The segment that element i lies in.
int64_t segment_of(const AdamW& a, int64_t i) {
  int64_t low = 0, high = a.segments - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (i < a.segment_ends[middle]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace

void adamw(const AdamW& a) {
  if (a.skip && *a.skip != 0.f) return;
  // Whole registers to each thread, so that the split does not change which elements share one.
  const int64_t chunk = 1024, chunks = (a.size + chunk - 1) / chunk;
  parallel_for(chunks, a.size, [&](int64_t first, int64_t last) {
    int64_t begin = first * chunk;
    const int64_t end = last * chunk < a.size ? last * chunk : a.size;
    if (!a.segments) return update_any(a, begin, end, a.lr);
    for (int64_t s = segment_of(a, begin); begin < end && s < a.segments; ++s) {
      const int64_t until = a.segment_ends[s] < end ? a.segment_ends[s] : end;
      if (until > begin) update_any(a, begin, until, a.lr * a.segment_rates[s]);
      begin = until > begin ? until : begin;
    }
  });
}

void adamw_squares(const AdamWSquares& a) {
  const float scale = a.grad_scale_pointer ? *a.grad_scale_pointer : a.grad_scale;
  const float rest = 1.f - a.beta2, floor = a.eps * a.eps, corrected = 1.f / a.correction2;
  const auto squares = [&](int64_t begin, int64_t end) {
    const float *grad = a.grad + begin, *average = a.exp_avg_sq + begin;
    double total = 0.;
    // Each lane sums a few dozen ratios in fp32 before they go on in fp64.
    constexpr int64_t kRun = 64 * kLanes;
    for (int64_t from = 0; from < end - begin; from += kRun) {
      Vec ratios{};
      const int64_t left = end - begin - from;
      for_each_vec(left < kRun ? left : kRun, [&](int64_t i, auto load, auto) {
        const Vec g = load(grad + from + i) * scale, square = g * g;
        const Vec second = (a.beta2 * load(average + from + i) + rest * square) * corrected;
        ratios += square / maximum(broadcast(floor), second);
      });
      for (int i = 0; i < kLanes; ++i) total += double(ratios[i]);
    }
    return total;
  };
  parallel_for(a.blocks, 2 * a.blocks * kAdamWBlock, [&](int64_t first, int64_t last) {
    int64_t s = 0;
    for (int64_t block = first; block < last; ++block) {
      while (block >= a.block_starts[s + 1]) ++s;
      const int64_t start = s ? a.segment_ends[s - 1] : 0;
      const int64_t begin = start + (block - a.block_starts[s]) * kAdamWBlock;
      const int64_t end = begin + kAdamWBlock < a.segment_ends[s] ? begin + kAdamWBlock : a.segment_ends[s];
      a.partial[block] = squares(begin, end);
    }
  });
  for (int64_t s = 0; s < a.segments; ++s) {
    a.result[s] = 0.;
    for (int64_t block = a.block_starts[s]; block < a.block_starts[s + 1]; ++block) a.result[s] += a.partial[block];
  }
}

}  // namespace megalm::MEGALM_ISA
