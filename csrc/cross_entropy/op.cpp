#include "cross_entropy/op.h"

#include <cmath>

#include "common/vec.h"

namespace megalm::MEGALM_ISA {
namespace {

// Columns looked at together: they stay in the first-level cache between the maximum and the exponentials.
constexpr int64_t kBlock = 2048;

template <typename T>
void forward_row(const CrossEntropyForward& a, int64_t row) {
  const T* x = static_cast<const T*>(a.logits) + row * a.stride;
  float peak = -HUGE_VALF;
  double total = 0., plain = 0.;
  for (int64_t begin = 0; begin < a.columns; begin += kBlock) {
    const int64_t count = a.columns - begin < kBlock ? a.columns - begin : kBlock;
    const int64_t whole = count / kLanes * kLanes;
    const T* block = x + begin;
    Vec top = broadcast(-HUGE_VALF), values{};
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Vec v = load(block + i);
      top = maximum(top, v);
      values += v;
    }
    float highest = maximum(top), rest = sum(values);
    for (int64_t i = whole; i < count; ++i) {
      const float v = to_float(block[i]);
      highest = v > highest ? v : highest;
      rest += v;
    }
    plain += rest;
    const float next = highest > peak ? highest : peak;
    const float shift = next == -HUGE_VALF ? 0.f : next;  // a block of -infinity adds 0, not NaN
    if (total != 0.) total *= std::exp(double(peak) - double(next));
    peak = next;
    Vec exponentials{};
    for (int64_t i = 0; i < whole; i += kLanes) exponentials += exp(load(block + i) - shift);
    float sum_of = sum(exponentials);
    if (whole < count) {
      const Vec tail = exp(load_part(block + whole, count - whole) - shift);
      for (int64_t i = 0; i < count - whole; ++i) sum_of += tail[i];
    }
    total += sum_of;
  }
  const int64_t label = a.labels[row] - a.first;
  a.peak[row] = peak;
  a.total[row] = float(total);
  a.target[row] = label >= 0 && label < a.columns ? to_float(x[label]) : 0.f;
  if (a.sum) a.sum[row] = float(plain);
}

template <typename T>
void backward_row(const CrossEntropyBackward& a, int64_t row) {
  const T* x = static_cast<const T*>(a.logits) + row * a.stride;
  T* out = static_cast<T*>(a.gradient) + row * a.stride;
  const float log_z = a.log_z[row], scale = a.scale[row], weight = a.weight[row];
  const int64_t label = a.labels[row] - a.first;
  const bool here = label >= 0 && label < a.columns;
  if (scale == 0.f && weight == 0.f) {  // a position that does not count
    __builtin_memset(out, 0, size_t(a.stride) * sizeof(T));
    return;
  }
  const float at_label = here ? to_float(x[label]) : 0.f;
  const float uniform = weight * a.uniform;
  const int64_t width = a.stride * int64_t(sizeof(T));
  const bool past = a.gradient != a.logits && streams(a.rows * width, width, a.gradient);
  for_each_vec(a.columns, past,
               [&](int64_t i, auto load, auto store) { store(out + i, scale * exp(load(x + i) - log_z) - uniform); });
  if (here) {
    if (past) stream_fence();
    // Again for the label, so that it is rounded once.
    const Vec v = scale * exp(broadcast(at_label - log_z)) - uniform - weight * (1.f - a.smoothing);
    store_part(out + label, v, 1);
  }
  if (a.columns < a.stride) __builtin_memset(out + a.columns, 0, size_t(a.stride - a.columns) * sizeof(T));
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& a) {
  for_dtype(a.dtype, [&](auto type) {
    parallel_for(a.rows, a.rows * a.columns, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) forward_row<decltype(type)>(a, row);
    });
  });
}

void cross_entropy_backward(const CrossEntropyBackward& a) {
  for_dtype(a.dtype, [&](auto type) {
    parallel_for(a.rows, a.rows * a.columns, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) backward_row<decltype(type)>(a, row);
    });
  });
}

}  // namespace megalm::MEGALM_ISA
