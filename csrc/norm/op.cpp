#include "norm/op.h"

#include <cmath>
#include <type_traits>

#include "common/vec.h"

namespace megalm::MEGALM_ISA {
namespace {

static_assert(kNormSlack >= kPageFloats);

// Rows of up to this many elements with a residual are kept in fp32, in the nearest cache: h is written once, beside y.
constexpr int64_t kKept = 8192;
// Bytes of the longest row whose sums are taken before the row ahead of it is written: the processor goes on with one
// while the other waits for the end of a sum. Two longer ones would crowd the nearest cache.
constexpr int64_t kShortRow = 4096;

// The passes over one row. Again: what it is read again as: fp32 from the copy, else T from x or h.
template <typename T, bool kLayerNorm, bool kResidual, bool kCopied>
struct ForwardRow {
  using Again = std::conditional_t<kCopied, float, T>;
  const NormForward& a;
  const bool past;

  // The sum of h or, for RMSNorm, of its squares. With a residual h goes to `again`.
  MEGALM_INLINE float sum_up(int64_t row, Again* again) const {
    const T* x = static_cast<const T*>(a.x) + row * a.size;
    const T* residual = static_cast<const T*>(a.residual) + (kResidual ? row * a.size : 0);
    Vec sums[4] = {};
    for_each_vec_in_turn(a.size, [&](int64_t i, auto load, auto store, int turn) {
      Vec v = load(x + i);
      if constexpr (kResidual) {
        v = rounded<T>(v + load(residual + i));
        store(again + i, Exact{v});
      }
      sums[turn] += kLayerNorm ? v : v * v;
    });
    return sum(sums);
  }

  // The deviations are summed apart: no cancellation when |mean| is large.
  MEGALM_INLINE float sum_deviations(const Again* again, float mean) const {
    Vec sums[4] = {};
    const int64_t whole = a.size / kLanes * kLanes;
    for_each_vec_in_turn(whole, [&](int64_t i, auto load, auto, int turn) {
      const Vec d = load(again + i) - mean;
      sums[turn] += d * d;
    });
    float tail = 0.f;
    for (int64_t i = whole; i < a.size; ++i) {
      const float d = to_float(again[i]) - mean;
      tail += d * d;
    }
    return sum(sums) + tail;
  }

  template <bool kBias>
  MEGALM_INLINE void write(int64_t row, const Again* again, float mean, float rstd) const {
    const T* weight = static_cast<const T*>(a.weight);
    const T* bias = static_cast<const T*>(a.bias);
    T* y = static_cast<T*>(a.y) + row * a.size;
    T* h = static_cast<T*>(a.h) + (kResidual ? row * a.size : 0);
    for_each_vec(a.size, past, [&](int64_t i, auto load, auto store) {
      const Vec in = load(again + i), hat = kLayerNorm ? (in - mean) * rstd : in * rstd;
      if constexpr (kCopied) store(h + i, Exact{in});
      Vec v = hat * load(weight + i);
      if constexpr (kBias) v += load(bias + i);
      store(y + i, v);
    });
  }
};

template <typename T, bool kLayerNorm, bool kResidual, bool kCopied>
void forward_rows(const NormForward& a, int64_t begin, int64_t end) {
  using Row = ForwardRow<T, kLayerNorm, kResidual, kCopied>;
  using Again = typename Row::Again;
  const int64_t size = a.size, width = size * int64_t(sizeof(T));
  const bool past =
      kResidual ? kCopied && streams(2 * a.rows * width, width, a.h, a.y) : streams(a.rows * width, width, a.y);
  const Row run{a, past};
  const bool ahead = width <= kShortRow;
  // The copies of two rows that are on their way together lie apart, and by whole pages.
  constexpr int64_t kApart = kShortRow / int64_t(sizeof(T)) + kPageFloats;
  static_assert(kApart % kPageFloats == 0 && 2 * kApart <= kKept + kPageFloats);
  alignas(64) float room[kCopied ? kKept + kPageFloats : 1];
  const auto where = [&](int64_t row) -> Again* {
    if constexpr (kCopied) {
      float* place = at_page_place_of(static_cast<const T*>(a.x) + row * size, room);
      return place + (ahead && row % 2 ? kApart : 0);
    } else {
      return static_cast<Again*>(kResidual ? a.h : const_cast<void*>(a.x)) + row * size;
    }
  };
  const float scale = 1.f / float(size);
  float total = run.sum_up(begin, where(begin)), mean = 0.f;
  for (int64_t row = begin; row < end; ++row) {
    Again* const again = where(row);
    if constexpr (kLayerNorm) {
      a.mean[row] = mean = total * scale;
      total = run.sum_deviations(again, mean);
    }
    const float rstd = 1.f / std::sqrt(total * scale + a.eps);
    a.rstd[row] = rstd;
    const bool more = row + 1 < end;
    if (more && ahead) total = run.sum_up(row + 1, where(row + 1));
    if (a.bias) {
      run.template write<true>(row, again, mean, rstd);
    } else {
      run.template write<false>(row, again, mean, rstd);
    }
    if (more && !ahead) total = run.sum_up(row + 1, where(row + 1));
  }
}

template <typename T, bool kLayerNorm>
void forward_any(const NormForward& a, int64_t begin, int64_t end) {
  if (begin == end) return;
  if (!a.residual) return forward_rows<T, kLayerNorm, false, false>(a, begin, end);
  if (a.size <= kKept) return forward_rows<T, kLayerNorm, true, true>(a, begin, end);
  forward_rows<T, kLayerNorm, true, false>(a, begin, end);
}

// One row at a time: more of them would share each reading of the sums, but their streams crowd the nearest cache.
template <typename T, bool kLayerNorm>
MEGALM_INLINE void backward_row(const NormBackward& a, int64_t row, bool past, float* dweight, float* dbias) {
  const T* weight = static_cast<const T*>(a.weight);
  const T* dy = static_cast<const T*>(a.dy) + row * a.size;
  const T* h = static_cast<const T*>(a.h) + row * a.size;
  const T* dh = a.dh ? static_cast<const T*>(a.dh) + row * a.size : nullptr;
  T* dx = static_cast<T*>(a.dx) + row * a.size;
  const float rstd = a.rstd[row], mean = kLayerNorm ? a.mean[row] : 0.f;
  const float scale = 1.f / float(a.size);
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
        forward_any<T, true>(a, begin, end);
      } else {
        forward_any<T, false>(a, begin, end);
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
