#include "softmax/op.h"

#include <cmath>

#include "common/vec.h"

namespace megalm::MEGALM_ISA {
namespace {

// The keys that a row's query sees.
struct Window {
  int64_t begin, end;
};

template <typename Args>
Window window(const Args& a, int64_t row) {
  const int64_t position = a.keys - a.queries + row % a.queries;
  const int64_t sequence = row / (a.heads * a.queries);
  return {a.starts ? a.starts[sequence * a.keys + position] : 0, position + 1};
}

template <typename T>
void zero(T* row, Window w, int64_t keys) {
  __builtin_memset(row, 0, size_t(w.begin) * sizeof(T));
  __builtin_memset(row + w.end, 0, size_t(keys - w.end) * sizeof(T));
}

template <typename T>
void forward_row(const SoftmaxForward& a, int64_t row) {
  const Window w = window(a, row);
  const T* x = static_cast<const T*>(a.x) + row * a.keys + w.begin;
  T* y = static_cast<T*>(a.y) + row * a.keys;
  const int64_t count = w.end - w.begin, whole = count / kLanes * kLanes;
  const float slope = a.slopes ? a.slopes[row / a.queries % a.heads] : 0.f;
  Vec lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = float(i);
  // The bias of key i of the window, up to one constant for all: slope * (i - count).
  const auto value = [&](Vec raw, int64_t i) { return raw * a.scale + slope * (lanes + float(i - count)); };
  Vec top = broadcast(-HUGE_VALF);
  for (int64_t i = 0; i < whole; i += kLanes) top = maximum(top, value(load(x + i), i));
  float peak = maximum(top);
  const Vec tail = whole < count ? value(load_part(x + whole, count - whole), whole) : Vec{};
  for (int64_t i = 0; i < count - whole; ++i) peak = tail[i] > peak ? tail[i] : peak;
  const float shift = peak == -HUGE_VALF ? 0.f : peak;
  Vec exponentials{};
  for (int64_t i = 0; i < whole; i += kLanes) exponentials += exp(value(load(x + i), i) - shift);
  float total = sum(exponentials);
  const Vec last = exp(tail - shift);
  for (int64_t i = 0; i < count - whole; ++i) total += last[i];
  const float inverse = 1.f / total;
  for_each_vec(count, [&](int64_t i, auto load, auto store) {
    store(y + w.begin + i, exp(value(load(x + i), i) - shift) * inverse);
  });
  zero(y, w, a.keys);
}

template <typename T>
void backward_row(const SoftmaxBackward& a, int64_t row) {
  const Window w = window(a, row);
  const T* dy = static_cast<const T*>(a.dy) + row * a.keys + w.begin;
  const T* y = static_cast<const T*>(a.y) + row * a.keys + w.begin;
  T* dx = static_cast<T*>(a.dx) + row * a.keys;
  Vec dots{};
  for_each_vec(w.end - w.begin, [&](int64_t i, auto load, auto) { dots += load(dy + i) * load(y + i); });
  const float dot = sum(dots);
  for_each_vec(w.end - w.begin, [&](int64_t i, auto load, auto store) {
    store(dx + w.begin + i, a.scale * load(y + i) * (load(dy + i) - dot));
  });
  zero(dx, w, a.keys);
}

}  // namespace

void softmax_forward(const SoftmaxForward& a) {
  const int64_t rows = a.batch * a.heads * a.queries;
  for_dtype(a.dtype, [&](auto type) {
    parallel_for(rows, rows * a.keys, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) forward_row<decltype(type)>(a, row);
    });
  });
}

void softmax_backward(const SoftmaxBackward& a) {
  const int64_t rows = a.batch * a.heads * a.queries;
  for_dtype(a.dtype, [&](auto type) {
    parallel_for(rows, rows * a.keys, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) backward_row<decltype(type)>(a, row);
    });
  });
}

}  // namespace megalm::MEGALM_ISA
