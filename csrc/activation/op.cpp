#include "activation/op.h"

#include "common/vec.h"

namespace megalm::MEGALM_ISA {
namespace {

struct Point {
  Vec value, slope;
};

// erf to about 1.3e-7: a polynomial in z^2 below 1, 1 - exp(-q(z)) with q fitted to -log erfc above.
MEGALM_INLINE Vec erf(Vec z) {
  const Vec size = z < 0.f ? -z : z, square = z * z;
  Vec near = broadcast(7.88249711e-05f);
  near = near * square - 0.000801885499f;
  near = near * square + 0.00518931194f;
  near = near * square - 0.0268543288f;
  near = near * square + 0.112835975f;
  near = near * square - 0.376126269f;
  near = near * square + 1.12837917f;
  const Vec t = minimum(size, broadcast(4.f));
  Vec q = broadcast(-1.61406163e-06f);
  q = q * t + 4.55906229e-05f;
  q = q * t - 0.000592769542f;
  q = q * t + 0.00474022237f;
  q = q * t - 0.0263647174f;
  q = q * t + 0.109978245f;
  q = q * t + 0.631937094f;
  q = q * t + 1.13016668f;
  q = q * t - 0.000303212998f;
  const Vec far = 1.f - exp(-q);
  const Vec signed_far = z < 0.f ? -far : far;
  return size < 1.f ? near * z : (z != z ? z : signed_far);
}

struct Sigmoid {
  Vec value, rest;  // rest = 1 - value, without its cancellation near value = 1
};

MEGALM_INLINE Sigmoid sigmoid_and_rest(Vec v) {
  const Vec e = exp(-minimum(maximum(v, broadcast(-80.f)), broadcast(80.f)));
  const Vec s = 1.f / (1.f + e);
  return {v != v ? v : s, e * s};
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
  parallel_for(a.rows, a.rows * size, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* out = y + row * size;
      if (a.gated) {
        const T* gate = x + row * 2 * size;
        for_each_vec(size, [&](int64_t i, auto load, auto store) {
          store(out + i, F::value(load(gate + i)) * load(gate + size + i));
        });
      } else {
        const T* in = x + row * size;
        for_each_vec(size, [&](int64_t i, auto load, auto store) {
          store(out + i, F::value(bias ? load(in + i) + load(bias + i) : load(in + i)));
        });
      }
    }
  });
}

template <typename T, typename F>
void backward(const ActivationBackward& a) {
  const T* x = static_cast<const T*>(a.x);
  const T* bias = static_cast<const T*>(a.bias);
  const T* dy = static_cast<const T*>(a.dy);
  T* dx = static_cast<T*>(a.dx);
  const int64_t size = a.size;
  parallel_for(a.rows, 2 * a.rows * size, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* up_gradient = dy + row * size;
      if (a.gated) {
        const T* gate = x + row * 2 * size;
        T* out = dx + row * 2 * size;
        for_each_vec(size, [&](int64_t i, auto load, auto store) {
          const Vec g = load(up_gradient + i), up = load(gate + size + i);
          const Point p = F::both(load(gate + i));
          store(out + i, g * up * p.slope);
          store(out + size + i, g * p.value);
        });
      } else {
        const T* in = x + row * size;
        T* out = dx + row * size;
        for_each_vec(size, [&](int64_t i, auto load, auto store) {
          const Vec at = bias ? load(in + i) + load(bias + i) : load(in + i);
          store(out + i, load(up_gradient + i) * F::both(at).slope);
        });
      }
    }
  });
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
  for_dtype(a.dtype, [&](auto type) { for_kind(a.kind, [&](auto f) { backward<decltype(type), decltype(f)>(a); }); });
}

}  // namespace megalm::MEGALM_ISA
