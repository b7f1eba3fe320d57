#include "adamw/op.h"
#include "common/kernel.cuh"

namespace megalm::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) adamw_kernel(AdamW a) {
  if (a.skip && *a.skip != 0.f) return;
  const float scale = a.grad_scale_pointer ? *a.grad_scale_pointer : a.grad_scale;
  const float keep = 1.f - a.lr * a.weight_decay, rate = a.lr / a.correction1, root = rsqrtf(a.correction2);
  const int64_t step = int64_t(gridDim.x) * blockDim.x * N;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < a.size; i += step) {
    const Pack<float, N> g = load_pack<N>(a.grad + i);
    Pack<float, N> w = load_pack<N>(a.master + i), m = load_pack<N>(a.exp_avg + i), v = load_pack<N>(a.exp_avg_sq + i);
    Pack<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float scaled = g.v[j] * scale;
      m.v[j] = a.beta1 * m.v[j] + (1.f - a.beta1) * scaled;
      v.v[j] = a.beta2 * v.v[j] + (1.f - a.beta2) * (scaled * scaled);
      w.v[j] = w.v[j] * keep - rate * m.v[j] / (sqrtf(v.v[j]) * root + a.eps);
      out.v[j] = w.v[j];
    }
    store_pack(a.master + i, w);
    store_pack(a.exp_avg + i, m);
    store_pack(a.exp_avg_sq + i, v);
    if (a.out) store_pack(static_cast<T*>(a.out) + i, out);
  }
}

}  // namespace

void adamw(const AdamW& a, void* stream) {
  if (a.size == 0) return;
  const bool packed = packable<float>(a.size, a.master, a.grad, a.exp_avg, a.exp_avg_sq, a.out);
  for_dtype(
      a.out ? a.out_dtype : DType::kFloat32, [](auto) { return true; },
      [&](auto type, auto) {
        using T = decltype(type);
        const int64_t wanted = (a.size / (packed ? 4 : 1) + kThreads - 1) / kThreads;
        const unsigned blocks = unsigned(wanted < 1 ? 1 : wanted > 1 << 20 ? 1 << 20 : wanted);
        if (packed) {
          LAUNCH((adamw_kernel<T, 4>), blocks, kThreads, stream, a);
        } else {
          LAUNCH((adamw_kernel<T, 1>), blocks, kThreads, stream, a);
        }
      });
}

}  // namespace megalm::cuda
