#include "activation/op.h"

#include "common/vec.h"

namespace megalm::MEGALM_ISA {
namespace {

struct Point {
  Vec value, slope;
};

// erf to about 3e-7: z P(z^2) / Q(z^2), fitted on [0, 4] with an error of 2e-8; beyond, erf is 1 in fp32.
MEGALM_INLINE Vec erf(Vec z) {
  const Vec t = clamp(z, -4.f, 4.f), square = t * t;
  Vec p = broadcast(1.97484861e-6f);
  p = p * square + 2.88040766e-4f;
  p = p * square + 4.00358559e-3f;
  p = p * square + 5.34672854e-2f;
  p = p * square + 1.9624747e-1f;
  p = p * square + 1.12837898f;
  Vec q = broadcast(3.74810255e-5f);
  q = q * square + 1.21634682e-3f;
  q = q * square + 1.54442972e-2f;
  q = q * square + 1.1647581e-1f;
  q = q * square + 5.07250951e-1f;
  q = q * square + 1.f;
  return t * p / q;
}

struct Sigmoid {
  Vec value, rest;  // rest = 1 - value, without its cancellation near value = 1
};

MEGALM_INLINE Sigmoid sigmoid_and_rest(Vec v) {
  const Vec e = exp(-clamp(v, -80.f, 80.f));
  const Vec s = 1.f / (1.f + e);
  return {s, e * s};
}

struct Silu {
  static MEGALM_INLINE Vec value(Vec a) { return a * sigmoid(a); }
  static MEGALM_INLINE Point both(Vec a) {
    const Sigmoid s = sigmoid_and_rest(a);
    return {a * s.value, s.value * (1.f + a * s.rest)};
  }
};

struct Gelu {
  static MEGALM_INLINE Vec value(Vec a) { return 0.5f * a * (1.f + erf(a * 0.707106781f)); }
  static MEGALM_INLINE Point both(Vec a) {
    const Vec cdf = 0.5f * (1.f + erf(a * 0.707106781f));
    return {a * cdf, cdf + a * 0.398942280f * exp(-0.5f * a * a)};
  }
};

// 1/2 (1 + tanh u) is sigmoid(2 u): without the cancellation near tanh u = -1.
struct GeluTanh {
  static MEGALM_INLINE Vec argument(Vec a) { return a * (1.59576912f + 0.0713548163f * (a * a)); }
  static MEGALM_INLINE Vec value(Vec a) { return a * sigmoid(argument(a)); }
  static MEGALM_INLINE Point both(Vec a) {
    const Sigmoid s = sigmoid_and_rest(argument(a));
    return {a * s.value, s.value * (1.f + a * s.rest * (1.59576912f + 0.214064449f * (a * a)))};
  }
};

template <typename T, typename F>
void forward(const ActivationForward& a) {
  const T* x = static_cast<const T*>(a.x);
  const T* bias = static_cast<const T*>(a.bias);
  T* y = static_cast<T*>(a.y);
  const int64_t size = a.size;
  const bool past = streams(a.rows * size * int64_t(sizeof(T)), size * int64_t(sizeof(T)), y);
  parallel_for(a.rows, a.rows * size, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* out = y + row * size;
      if (a.gated) {
        const T* gate = x + row * 2 * size;
        for_each_vec(size, past, [&](int64_t i, auto load, auto store) {
          store(out + i, F::value(load(gate + i)) * load(gate + size + i));
        });
      } else {
        const T* in = x + row * size;
        for_each_vec(size, past, [&](int64_t i, auto load, auto store) {
          store(out + i, F::value(bias ? load(in + i) + load(bias + i) : load(in + i)));
        });
      }
    }
  });
}

template <typename T, typename F>
void backward(const ActivationBackward& a) {
  const T* x = static_cast<const T*>(a.x);
  const T* dy = static_cast<const T*>(a.dy);
  T* dx = static_cast<T*>(a.dx);
  const int64_t size = a.size, width = (a.gated ? 2 : 1) * size * int64_t(sizeof(T));
  const bool past = dx != x && streams(a.rows * width, size * int64_t(sizeof(T)), dx);
  parallel_for(a.rows, 2 * a.rows * size, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* up_gradient = dy + row * size;
      if (a.gated) {
        const T* gate = x + row * 2 * size;
        T* out = dx + row * 2 * size;
        for_each_vec(size, past, [&](int64_t i, auto load, auto store) {
          const Vec g = load(up_gradient + i), up = load(gate + size + i);
          const Point p = F::both(load(gate + i));
          store(out + i, g * up * p.slope);
          store(out + size + i, g * p.value);
        });
      } else {
        const T* in = x + row * size;
        T* out = dx + row * size;
        for_each_vec(size, past, [&](int64_t i, auto load, auto store) {
          store(out + i, load(up_gradient + i) * F::both(load(in + i)).slope);
        });
      }
    }
  });
}

// With the bias' gradient: each of row_blocks blocks of rows sums its own, and these are added in their order.
template <typename T, typename F>
void backward_with_bias(const ActivationBackward& a) {
  const T* bias = static_cast<const T*>(a.bias);
  const int64_t size = a.size, blocks = a.rows < a.row_blocks ? a.rows : a.row_blocks;
  parallel_for(blocks, 2 * a.rows * size, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      float* dbias = a.partial + block * size;
      __builtin_memset(dbias, 0, size_t(size) * sizeof(float));
      for (int64_t row = a.rows * block / blocks; row < a.rows * (block + 1) / blocks; ++row) {
        const T* in = static_cast<const T*>(a.x) + row * size;
        const T* dy = static_cast<const T*>(a.dy) + row * size;
        T* out = static_cast<T*>(a.dx) + row * size;
        for_each_vec(size, [&](int64_t i, auto load, auto store) {
          const Vec v = load(dy + i) * F::both(load(in + i) + load(bias + i)).slope;
          store(out + i, v);
          store(dbias + i, load(dbias + i) + v);
        });
      }
    }
  });
  sum_rows(a.partial, blocks, size, size, static_cast<T*>(a.dbias));
}

template <typename Body>
void for_kind(Activation kind, Body&& body) {
  switch (kind) {
    case Activation::kSilu:
      return body(Silu{});
    case Activation::kGelu:
      return body(Gelu{});
    case Activation::kGeluTanh:
      return body(GeluTanh{});
  }
}

}  // namespace

void activation_forward(const ActivationForward& a) {
  for_dtype(a.dtype, [&](auto type) { for_kind(a.kind, [&](auto f) { forward<decltype(type), decltype(f)>(a); }); });
}

void activation_backward(const ActivationBackward& a) {
  for_dtype(a.dtype, [&](auto type) {
    for_kind(a.kind, [&](auto f) {
      if (a.bias) {
        backward_with_bias<decltype(type), decltype(f)>(a);
      } else {
        backward<decltype(type), decltype(f)>(a);
      }
    });
  });
}

}  // namespace megalm::MEGALM_ISA
