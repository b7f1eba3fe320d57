#include "norm/op.h"

#include <cmath>

#include "common/vec.h"

namespace megalm::MEGALM_ISA {
namespace {

template <typename T, bool kLayerNorm>
void forward_rows(const NormForward& a, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  const float scale = 1.f / float(a.size);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.size;
    T* y = static_cast<T*>(a.y) + row * a.size;
    const T* h = x;
    Vec total{}, squares{};
    if (a.residual) {
      const T* residual = static_cast<const T*>(a.residual) + row * a.size;
      T* sum_out = static_cast<T*>(a.h) + row * a.size;
      for_each_vec(a.size, [&](int64_t i, auto load, auto store) {
        const Vec v = rounded<T>(load(x + i) + load(residual + i));
        store(sum_out + i, v);
        total += v;
        squares += v * v;
      });
      h = sum_out;
    } else {
      for_each_vec(a.size, [&](int64_t i, auto load, auto) {
        const Vec v = load(x + i);
        total += v;
        squares += v * v;
      });
    }
    float mean = 0.f, mean_square = sum(squares) * scale;
    if constexpr (kLayerNorm) {
      // A second pass over the row, which is in the cache by now: no cancellation when |mean| is large.
      mean = sum(total) * scale;
      Vec deviations{};
      float tail = 0.f;
      int64_t i = 0;
      for (; i + kLanes <= a.size; i += kLanes) {
        const Vec d = load(h + i) - mean;
        deviations += d * d;
      }
      for (; i < a.size; ++i) {
        const float d = to_float(h[i]) - mean;
        tail += d * d;
      }
      mean_square = (sum(deviations) + tail) * scale;
      a.mean[row] = mean;
    }
    const float rstd = 1.f / std::sqrt(mean_square + a.eps);
    a.rstd[row] = rstd;
    for_each_vec(a.size, [&](int64_t i, auto load, auto store) {
      const Vec hat = kLayerNorm ? (load(h + i) - mean) * rstd : load(h + i) * rstd;
      Vec v = hat * load(weight + i);
      if (bias) v += load(bias + i);
      store(y + i, v);
    });
  }
}

// kRows rows at a time, which share each reading of the weight and each writing of the sums.
template <typename T, bool kLayerNorm, int kRows>
MEGALM_INLINE void backward_group(const NormBackward& a, int64_t row, float* dweight, float* dbias) {
  const T* weight = static_cast<const T*>(a.weight);
  const T* dy = static_cast<const T*>(a.dy) + row * a.size;
  const T* h = static_cast<const T*>(a.h) + row * a.size;
  const T* dh = a.dh ? static_cast<const T*>(a.dh) + row * a.size : nullptr;
  T* dx = static_cast<T*>(a.dx) + row * a.size;
  const int64_t size = a.size;
  const float scale = 1.f / float(size);
  float rstd[kRows], mean[kRows], dot[kRows], g_mean[kRows];
  Vec dots[kRows] = {}, sums[kRows] = {};
  for (int r = 0; r < kRows; ++r) {
    rstd[r] = a.rstd[row + r];
    mean[r] = kLayerNorm ? a.mean[row + r] : 0.f;
  }
  for_each_vec(size, [&](int64_t i, auto load, auto) {
    const Vec w = load(weight + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec g = load(dy + r * size + i) * w;
      dots[r] += g * (load(h + r * size + i) - mean[r]);
      if (kLayerNorm) sums[r] += g;
    }
  });
  for (int r = 0; r < kRows; ++r) {
    dot[r] = sum(dots[r]) * rstd[r] * scale;
    g_mean[r] = kLayerNorm ? sum(sums[r]) * scale : 0.f;
  }
  for_each_vec(size, [&](int64_t i, auto load, auto store) {
    const Vec w = load(weight + i);
    Vec sum_weight = load(dweight + i), sum_bias{};
    if (kLayerNorm) sum_bias = load(dbias + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec hat = (load(h + r * size + i) - mean[r]) * rstd[r], up = load(dy + r * size + i);
      Vec v = kLayerNorm ? rstd[r] * (up * w - g_mean[r] - hat * dot[r]) : rstd[r] * (up * w - hat * dot[r]);
      if (dh) v += load(dh + r * size + i);
      store(dx + r * size + i, v);
      sum_weight += up * hat;
      if (kLayerNorm) sum_bias += up;
    }
    store(dweight + i, sum_weight);
    if (kLayerNorm) store(dbias + i, sum_bias);
  });
}

template <typename T, bool kLayerNorm>
void backward_rows(const NormBackward& a, int64_t block, int64_t begin, int64_t end) {
  float* dweight = a.partial + block * 2 * a.size;
  float* dbias = dweight + a.size;
  __builtin_memset(dweight, 0, size_t(2 * a.size) * sizeof(float));
  int64_t row = begin;
  for (; row + 4 <= end; row += 4) backward_group<T, kLayerNorm, 4>(a, row, dweight, dbias);
  for (; row < end; ++row) backward_group<T, kLayerNorm, 1>(a, row, dweight, dbias);
}

}  // namespace

void norm_forward(const NormForward& a) {
  for_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(a.rows, a.rows * a.size, [&](int64_t begin, int64_t end) {
      if (a.layer_norm) {
        forward_rows<T, true>(a, begin, end);
      } else {
        forward_rows<T, false>(a, begin, end);
      }
    });
  });
}

void norm_backward(const NormBackward& a) {
  for_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t blocks = a.rows < a.row_blocks ? a.rows : a.row_blocks;
    parallel_for(blocks, a.rows * a.size, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        const int64_t begin = a.rows * b / blocks, end = a.rows * (b + 1) / blocks;
        if (a.layer_norm) {
          backward_rows<T, true>(a, b, begin, end);
        } else {
          backward_rows<T, false>(a, b, begin, end);
        }
      }
    });
    sum_rows(a.partial, blocks, 2 * a.size, a.size, static_cast<T*>(a.dweight));
    if (a.dbias) sum_rows(a.partial + a.size, blocks, 2 * a.size, a.size, static_cast<T*>(a.dbias));
  });
}

}  // namespace megalm::MEGALM_ISA
