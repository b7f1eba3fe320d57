#include "common/kernel.cuh"
#include "moe_router/op.h"

namespace megalm::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kColumns = int(kRouterExperts) / kThreads;  // columns of a block's sums that a thread owns
constexpr int kNone = 0x7fffffff;

struct Choice {
  float value;
  int index;
};

// The larger value; of equals the lower index. The same result in every lane.
__device__ __forceinline__ Choice warp_best(Choice mine) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const float value = __shfl_xor_sync(kFullMask, mine.value, distance);
    const int index = __shfl_xor_sync(kFullMask, mine.index, distance);
    if (value > mine.value || (value == mine.value && index < mine.index)) mine = {value, index};
  }
  return mine;
}

__device__ __forceinline__ float rank_value(float v) { return v != v ? -INFINITY : v; }

__device__ __forceinline__ float sigmoid(float v) { return 1.f / (1.f + expf(-v)); }

__device__ __forceinline__ float inverse_of(float total) { return total == 0.f ? 0.f : 1.f / total; }

// What one of the chosen scores is measured by, and the peak that faint ones are measured from.
struct ChosenScale {
  bool faint;
  float peak, inverse;
};

// The same in every lane. score(k), logit(k): of the k-th chosen expert.
template <typename ScoreOf, typename LogitOf>
__device__ __forceinline__ ChosenScale scale_of_chosen(int lane, int top_k, ScoreOf&& score, LogitOf&& logit) {
  float largest = 0.f, peak = -INFINITY, total = 0.f;
  for (int k = lane; k < top_k; k += kWarp) {
    largest = fmaxf(largest, score(k));
    peak = fmaxf(peak, logit(k));
  }
  largest = warp_reduce<Max>(largest);
  peak = warp_reduce<Max>(peak);
  const bool faint = largest < kRouterFaint && peak > -INFINITY;
  for (int k = lane; k < top_k; k += kWarp) total += faint ? expf(logit(k) - peak) : score(k);
  return {faint, peak, inverse_of(warp_reduce<Sum>(total))};
}

// The largest value(i) over this lane's i < count (i = lane, lane + 32, ...) whose bit in `taken` is not set.
template <typename Value>
__device__ __forceinline__ Choice best_left(int lane, int count, unsigned taken, Value&& value) {
  Choice mine{-INFINITY, kNone};
  for (int i = lane, bit = 0; i < count; i += kWarp, ++bit) {
    if (taken >> bit & 1u) continue;
    const float v = rank_value(value(i));
    if (mine.index == kNone || v > mine.value) mine = {v, i};
  }
  return warp_best(mine);
}

// Sum of the `limit` largest of values[0, length), by one thread: each round takes what comes after the last one.
template <typename Value>
__device__ float sum_of_largest(int length, int limit, Value&& value) {
  float total = 0.f;
  Choice last{INFINITY, -1};
  for (int round = 0; round < limit; ++round) {
    Choice best{-INFINITY, kNone};
    for (int i = 0; i < length; ++i) {
      const float v = rank_value(value(i));
      const bool after = v < last.value || (v == last.value && i > last.index);
      if (after && (best.index == kNone || v > best.value)) best = {v, i};
    }
    total += best.value;
    last = best;
  }
  return total;
}

// One warp a row, kWarps rows at a time; between them the block's threads add the rows' probabilities to their columns,
// so that the sums over rows are taken in one order whatever the warps do.
template <typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(RouterForward a) {
  SHARED(float, scores, kWarps* kRouterExperts);
  SHARED(float, group_values, kWarps* kRouterGroups);
  SHARED(int, histogram, kRouterExperts);
  SHARED(float, shares, kWarps);  // what a row's scores are multiplied by to be its shares of the probability
  SHARED(float, log_zs, kWarps);  // of a row whose scores are faint; +INFINITY: its shares are of the scores themselves
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, experts = int(a.experts);
  float* s = scores + warp * int(kRouterExperts);
  float* group_value = group_values + warp * int(kRouterGroups);
  float columns[kColumns] = {};
  for (int e = threadIdx.x; e < experts; e += kThreads) histogram[e] = 0;
  __syncthreads();
  const int64_t begin = a.rows * blockIdx.x / gridDim.x, end = a.rows * (blockIdx.x + 1) / gridDim.x;
  for (int64_t first = begin; first < end; first += kWarps) {
    const int64_t row = first + warp;
    if (row < end) {
      const T* x = static_cast<const T*>(a.logits) + row * experts;
      float peak = -INFINITY;
      for (int e = lane; e < experts; e += kWarp) {
        s[e] = static_cast<float>(x[e]);
        peak = fmaxf(peak, s[e]);
      }
      peak = warp_reduce<Max>(peak);
      float total = 0.f, score_total = 0.f;
      for (int e = lane; e < experts; e += kWarp) {
        const float power = expf(s[e] - peak);
        total += power;
        s[e] = a.score == Score::kSoftmax ? power : sigmoid(s[e]);
        score_total += s[e];
      }
      total = warp_reduce<Sum>(total);
      float share = 1.f;
      if (a.score == Score::kSoftmax) {
        const float inverse = 1.f / total;
        for (int e = lane; e < experts; e += kWarp) s[e] *= inverse;
      } else {
        share = inverse_of(warp_reduce<Sum>(score_total));
      }
      const float log_z = peak + logf(total);
      if (lane == 0) {
        a.log_z[row] = log_z;
        shares[warp] = share;
        log_zs[warp] = a.score == Score::kSigmoid && log_z < kRouterFaintLog ? log_z : INFINITY;
      }
      const auto value = [&](int e) { return a.bias ? s[e] + a.bias[e] : s[e]; };
      unsigned taken = 0;  // bit i: expert lane + 32 i is out
      if (a.groups > 0) {
        const int groups = int(a.groups), length = experts / groups;
        __syncwarp(kFullMask);
        for (int g = lane; g < groups; g += kWarp) {
          group_value[g] = sum_of_largest(length, int(a.group_scores), [&](int i) { return value(g * length + i); });
        }
        __syncwarp(kFullMask);
        unsigned groups_taken = 0;
        taken = ~0u;
        for (int round = 0; round < int(a.top_groups); ++round) {
          const int g = best_left(lane, groups, groups_taken, [&](int i) { return group_value[i]; }).index;
          if (g % kWarp == lane) groups_taken |= 1u << g / kWarp;
          for (int e = lane, bit = 0; e < experts; e += kWarp, ++bit) {
            if (e / length == g) taken &= ~(1u << bit);
          }
        }
      }
      for (int k = 0; k < int(a.top_k); ++k) {
        const int e = best_left(lane, experts, taken, value).index;
        if (e % kWarp == lane) {
          taken |= 1u << e / kWarp;
          a.chosen[row * a.top_k + k] = e;
          atomicAdd(&histogram[e], 1);  // integers: the order does not matter
        }
      }
      __syncwarp(kFullMask);
      const int64_t* chosen = a.chosen + row * a.top_k;
      const auto score = [&](int k) { return s[chosen[k]]; };
      const auto logit = [&](int k) { return static_cast<float>(x[chosen[k]]); };
      if (a.normalize) {
        const ChosenScale scale = scale_of_chosen(lane, int(a.top_k), score, logit);
        for (int k = lane; k < int(a.top_k); k += kWarp) {
          const float v = scale.faint ? expf(logit(k) - scale.peak) : score(k);
          a.weights[row * a.top_k + k] = a.scale * (v * scale.inverse);
        }
      } else {
        for (int k = lane; k < int(a.top_k); k += kWarp) a.weights[row * a.top_k + k] = a.scale * score(k);
      }
    }
    __syncthreads();
    const int there = int(end - first < kWarps ? end - first : kWarps);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int e = i * kThreads + int(threadIdx.x);
      if (e < experts) {
        for (int w = 0; w < there; ++w) {
          const float faint = log_zs[w];
          columns[i] +=
              faint < INFINITY
                  ? expf(static_cast<float>(static_cast<const T*>(a.logits)[(first + w) * experts + e]) - faint)
                  : scores[w * int(kRouterExperts) + e] * shares[w];
        }
      }
    }
    __syncthreads();
  }
  float* probability = a.partial + int64_t(blockIdx.x) * experts;
  int64_t* counts = a.partial_counts + int64_t(blockIdx.x) * experts;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int e = i * kThreads + int(threadIdx.x);
    if (e < experts) {
      probability[e] = columns[i];
      counts[e] = histogram[e];
    }
  }
}

__global__ void __launch_bounds__(kThreads) sum_kernel(RouterForward a, int64_t blocks) {
  const int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e >= a.experts) return;
  float probability = 0.f;
  int64_t count = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    probability += a.partial[b * a.experts + e];
    count += a.partial_counts[b * a.experts + e];
  }
  a.probability[e] = probability;
  a.counts[e] = count;
}

// One warp a row.
template <typename T>
__global__ void __launch_bounds__(kThreads) backward_kernel(RouterBackward a) {
  SHARED(float, scores, kWarps* kRouterExperts);
  SHARED(float, slopes, kWarps* kRouterExperts);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, experts = int(a.experts);
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp;
  if (row >= a.rows) return;
  float* s = scores + warp * int(kRouterExperts);
  float* slope = slopes + warp * int(kRouterExperts);
  const T* x = static_cast<const T*>(a.logits) + row * experts;
  T* dx = static_cast<T*>(a.dlogits) + row * experts;
  const int64_t* chosen = a.chosen + row * a.top_k;
  const float log_z = a.log_z[row], dlog_z = a.dlog_z ? a.dlog_z[row] : 0.f;
  const bool softmax = a.score == Score::kSoftmax, faint = !softmax && log_z < kRouterFaintLog;
  // slope: the gradient of log s, which stays in range where s does not
  float total = 0.f, dot = 0.f;
  for (int e = lane; e < experts; e += kWarp) {
    const float logit = static_cast<float>(x[e]), g = a.dprobability ? a.dprobability[e] : 0.f;
    s[e] = softmax ? expf(logit - log_z) : sigmoid(logit);
    slope[e] = softmax ? s[e] * g : faint ? expf(logit - log_z) : s[e];
    total += slope[e];
    dot += slope[e] * g;
  }
  if (!softmax) {
    const float inverse = inverse_of(warp_reduce<Sum>(total)), mean = warp_reduce<Sum>(dot) * inverse;
    for (int e = lane; e < experts; e += kWarp) {
      slope[e] = a.dprobability ? slope[e] * inverse * (a.dprobability[e] - mean) : 0.f;
    }
  }
  if (a.dweights) {
    const float* dw = a.dweights + row * a.top_k;
    const auto score = [&](int k) { return s[chosen[k]]; };
    const auto logit = [&](int k) { return static_cast<float>(x[chosen[k]]); };
    __syncwarp(kFullMask);
    ChosenScale scale{false, 0.f, 1.f};
    float mean = 0.f;
    if (a.normalize) scale = scale_of_chosen(lane, int(a.top_k), score, logit);
    const auto share = [&](int k) { return (scale.faint ? expf(logit(k) - scale.peak) : score(k)) * scale.inverse; };
    if (a.normalize) {
      for (int k = lane; k < int(a.top_k); k += kWarp) mean += dw[k] * share(k);
      mean = warp_reduce<Sum>(mean);
    }
    for (int k = lane; k < int(a.top_k); k += kWarp) slope[chosen[k]] += a.scale * share(k) * (dw[k] - mean);
    __syncwarp(kFullMask);
  }
  if (softmax) {
    float slope_sum = 0.f;
    for (int e = lane; e < experts; e += kWarp) slope_sum += slope[e];
    const float shift = dlog_z - warp_reduce<Sum>(slope_sum);
    for (int e = lane; e < experts; e += kWarp) dx[e] = static_cast<T>(slope[e] + s[e] * shift);
  } else {
    for (int e = lane; e < experts; e += kWarp) {
      const float logit = static_cast<float>(x[e]);
      float v = slope[e] * sigmoid(-logit);
      if (a.dlog_z) v += dlog_z * expf(logit - log_z);
      dx[e] = static_cast<T>(v);
    }
  }
}

template <typename Body>
void for_type(DType dtype, Body&& body) {
  for_dtype(
      dtype, [](auto) { return false; },
      [&](auto type, auto count) {
        if constexpr (decltype(count)::value == 1) body(type);
      });
}

}  // namespace

void router_forward(const RouterForward& a, void* stream) {
  if (a.experts == 0) return;
  const int64_t blocks = a.rows < a.row_blocks * kWarps ? (a.rows + kWarps - 1) / kWarps : a.row_blocks;
  if (blocks > 0) {
    for_type(a.dtype,
             [&](auto type) { LAUNCH((forward_kernel<decltype(type)>), unsigned(blocks), kThreads, stream, a); });
  }
  LAUNCH(sum_kernel, unsigned((a.experts + kThreads - 1) / kThreads), kThreads, stream, a, blocks);
}

void router_backward(const RouterBackward& a, void* stream) {
  if (a.rows == 0 || a.experts == 0) return;
  for_type(a.dtype, [&](auto type) {
    LAUNCH((backward_kernel<decltype(type)>), unsigned((a.rows + kWarps - 1) / kWarps), kThreads, stream, a);
  });
}

}  // namespace megalm::cuda
