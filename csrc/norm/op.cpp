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

template <typename T, bool kLayerNorm>
void backward_rows(const NormBackward& a, int64_t block, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  float* dweight = a.partial + block * 2 * a.size;
  float* dbias = dweight + a.size;
  __builtin_memset(dweight, 0, size_t(2 * a.size) * sizeof(float));
  const float scale = 1.f / float(a.size);
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.size;
    const T* h = static_cast<const T*>(a.h) + row * a.size;
    const T* dh = a.dh ? static_cast<const T*>(a.dh) + row * a.size : nullptr;
    T* dx = static_cast<T*>(a.dx) + row * a.size;
    const float rstd = a.rstd[row], mean = kLayerNorm ? a.mean[row] : 0.f;
    Vec g_sum{}, dot_sum{};
    for_each_vec(a.size, [&](int64_t i, auto load, auto) {
      const Vec hat = (load(h + i) - mean) * rstd, g = load(dy + i) * load(weight + i);
      dot_sum += g * hat;
      g_sum += g;
    });
    const float dot = sum(dot_sum) * scale, g_mean = kLayerNorm ? sum(g_sum) * scale : 0.f;
    for_each_vec(a.size, [&](int64_t i, auto load, auto store) {
      const Vec hat = (load(h + i) - mean) * rstd, up = load(dy + i);
      Vec v = rstd * (up * load(weight + i) - g_mean - hat * dot);
      if (dh) v += load(dh + i);
      store(dx + i, v);
      store(dweight + i, load(dweight + i) + up * hat);
      if (kLayerNorm) store(dbias + i, load(dbias + i) + up);
    });
  }
}

template <typename T>
void sum_blocks(const NormBackward& a, int64_t blocks, int64_t offset, void* out) {
  for_each_vec(a.size, [&](int64_t i, auto load, auto store) {
    Vec total{};
    for (int64_t b = 0; b < blocks; ++b) total += load(a.partial + b * 2 * a.size + offset + i);
    store(static_cast<T*>(out) + i, total);
  });
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
    sum_blocks<T>(a, blocks, 0, a.dweight);
    if (a.dbias) sum_blocks<T>(a, blocks, a.size, a.dbias);
  });
}

}  // namespace megalm::MEGALM_ISA
