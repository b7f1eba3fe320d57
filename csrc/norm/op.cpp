#include "norm/op.h"

#include <cmath>

#include "common/vec.h"

namespace megalm::MEGALM_ISA {
namespace {

static_assert(kNormSlack >= kPageFloats);

constexpr int64_t kHeld = 8192;

template <typename T, bool kLayerNorm>
void forward_rows(const NormForward& a, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  const float scale = 1.f / float(a.size);
  const int64_t size = a.size, width = size * int64_t(sizeof(T));
  const bool past = a.residual ? streams(2 * a.rows * width, width, a.h, a.y) : streams(a.rows * width, width, a.y);
  // Rows of up to kHeld elements are kept in fp32, in the nearest cache: x and residual are read and h is written once.
  alignas(64) float room[kHeld + kPageFloats];
  const bool held = size <= kHeld;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * size;
    const T* residual = a.residual ? static_cast<const T*>(a.residual) + row * size : nullptr;
    T* h = static_cast<T*>(a.h) + (residual ? row * size : 0);
    T* y = static_cast<T*>(a.y) + row * size;
    float* copy = at_page_place_of(x, room);
    const auto again = [&](int64_t i, auto load) {
      return held ? load(copy + i) : load(residual ? static_cast<const T*>(h) + i : x + i);
    };
    Vec sums[4] = {};
    for_each_vec_in_turn(size, [&](int64_t i, auto load, auto store, int turn) {
      Vec v = load(x + i);
      if (residual) {
        v = rounded<T>(v + load(residual + i));
        if (!held) store(h + i, v);
      }
      if (held) store(copy + i, v);
      sums[turn] += kLayerNorm ? v : v * v;
    });
    float mean = 0.f, mean_square = sum(sums) * scale;
    if constexpr (kLayerNorm) {
      // The deviations are summed apart: no cancellation when |mean| is large.
      mean = mean_square;
      Vec deviations[4] = {};
      const int64_t whole = size / kLanes * kLanes;
      for_each_vec_in_turn(whole, [&](int64_t i, auto load, auto, int turn) {
        const Vec d = again(i, load) - mean;
        deviations[turn] += d * d;
      });
      float tail = 0.f;
      for (int64_t i = whole; i < size; ++i) {
        const float d = (held ? copy[i] : to_float(residual ? h[i] : x[i])) - mean;
        tail += d * d;
      }
      mean_square = (sum(deviations) + tail) * scale;
      a.mean[row] = mean;
    }
    const float rstd = 1.f / std::sqrt(mean_square + a.eps);
    a.rstd[row] = rstd;
    for_each_vec(size, past, [&](int64_t i, auto load, auto store) {
      const Vec in = again(i, load), hat = kLayerNorm ? (in - mean) * rstd : in * rstd;
      if (residual && held) store(h + i, in);
      Vec v = hat * load(weight + i);
      if (bias) v += load(bias + i);
      store(y + i, v);
    });
  }
}

// One row at a time: more of them would share each reading of the sums, but their streams crowd the nearest cache.
template <typename T, bool kLayerNorm>
MEGALM_INLINE void backward_row(const NormBackward& a, int64_t row, bool past, float* dweight, float* dbias) {
  const T* weight = static_cast<const T*>(a.weight);
  const T* dy = static_cast<const T*>(a.dy) + row * a.size;
  const T* h = static_cast<const T*>(a.h) + row * a.size;
  const T* dh = a.dh ? static_cast<const T*>(a.dh) + row * a.size : nullptr;
  T* dx = static_cast<T*>(a.dx) + row * a.size;
  const float scale = 1.f / float(a.size), rstd = a.rstd[row], mean = kLayerNorm ? a.mean[row] : 0.f;
  Vec dots[4] = {}, sums[4] = {};
  for_each_vec_in_turn(a.size, [&](int64_t i, auto load, auto store, int turn) {
    const Vec up = load(dy + i), hat = (load(h + i) - mean) * rstd, g = up * load(weight + i);
    dots[turn] += g * hat;
    store(dweight + i, load(dweight + i) + up * hat);
    if (kLayerNorm) {
      sums[turn] += g;
      store(dbias + i, load(dbias + i) + up);
    }
  });
  const float dot = sum(dots) * scale, g_mean = kLayerNorm ? sum(sums) * scale : 0.f;
  for_each_vec(a.size, past, [&](int64_t i, auto load, auto store) {
    const Vec hat = (load(h + i) - mean) * rstd;
    Vec v = rstd * (load(dy + i) * load(weight + i) - g_mean - hat * dot);
    if (dh) v += load(dh + i);
    store(dx + i, v);
  });
}

template <typename T, bool kLayerNorm>
void backward_rows(const NormBackward& a, int64_t block, int64_t begin, int64_t end) {
  const int64_t width = a.size * int64_t(sizeof(T)), stride = a.size + kNormSlack;
  const bool past = streams(a.rows * width, width, a.dx);
  float* const room = a.partial + block * 2 * stride;
  float* const dweight = at_page_place_of(static_cast<const T*>(a.dy) + begin * a.size, room);
  float* const dbias = at_page_place_of(dweight, room + stride);
  __builtin_memset(dweight, 0, size_t(a.size) * sizeof(float));
  __builtin_memset(dbias, 0, size_t(a.size) * sizeof(float));
  for (int64_t row = begin; row < end; ++row) backward_row<T, kLayerNorm>(a, row, past, dweight, dbias);
  // To where all blocks have them.
  __builtin_memmove(room, dweight, size_t(a.size) * sizeof(float));
  __builtin_memmove(room + stride, dbias, size_t(a.size) * sizeof(float));
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
    const int64_t stride = a.size + kNormSlack;
    sum_rows(a.partial, blocks, 2 * stride, a.size, static_cast<T*>(a.dweight));
    if (a.dbias) sum_rows(a.partial + stride, blocks, 2 * stride, a.size, static_cast<T*>(a.dbias));
  });
}

}  // namespace megalm::MEGALM_ISA
