#include "moe_router/op.h"

#include <math.h>

#include "common/vec.h"

namespace megalm::MEGALM_ISA {
namespace {

constexpr float kLowest = -INFINITY;

MEGALM_INLINE float rank_value(float v) { return v != v ? kLowest : v; }

// Puts (value, index) into a list of `size` kept in falling order; of equals the earlier stays ahead.
struct Best {
  float value[kRouterExperts];
  int index[kRouterExperts];
  int size = 0;

  MEGALM_INLINE void offer(float v, int at, int limit) {
    if (size == limit && !(v > value[limit - 1])) return;
    int i = size < limit ? size++ : limit - 1;
    for (; i > 0 && v > value[i - 1]; --i) {
      value[i] = value[i - 1];
      index[i] = index[i - 1];
    }
    value[i] = v;
    index[i] = at;
  }
};

// Scores of a row, s in `scores` and their sum in the return value; log_z in passing.
template <typename T>
MEGALM_INLINE float row_scores(const T* x, int64_t experts, Score score, float* scores, float* log_z) {
  Vec top = broadcast(kLowest);
  float peak = kLowest;
  int64_t i = 0;
  for (; i + kLanes <= experts; i += kLanes) top = maximum(top, load(x + i));
  peak = maximum(top);
  for (; i < experts; ++i) peak = to_float(x[i]) > peak ? to_float(x[i]) : peak;
  Vec sums{};
  float tail = 0.f;
  for (i = 0; i + kLanes <= experts; i += kLanes) {
    const Vec e = exp(load(x + i) - peak);
    store(scores + i, e);
    sums += e;
  }
  if (i < experts) {
    store_part(scores + i, exp(load_part(x + i, experts - i) - peak), experts - i);
    for (; i < experts; ++i) tail += scores[i];
  }
  const float total = sum(sums) + tail;
  *log_z = peak + logf(total);
  if (score == Score::kSoftmax) {
    const float inverse = 1.f / total;
    for_each_vec(experts, [&](int64_t at, auto get, auto put) { put(scores + at, get(scores + at) * inverse); });
    return 1.f;
  }
  for_each_vec(experts, [&](int64_t at, auto get, auto put) { put(scores + at, sigmoid(get(x + at))); });
  sums = Vec{};
  for (i = 0; i + kLanes <= experts; i += kLanes) sums += load(scores + i);
  tail = 0.f;
  for (; i < experts; ++i) tail += scores[i];
  return sum(sums) + tail;
}

MEGALM_INLINE float inverse_of(float total) { return total == 0.f ? 0.f : 1.f / total; }

// The chosen scores' shares of their sum, in `shares`.
template <typename T>
MEGALM_INLINE void chosen_shares(const T* x, const float* scores, const int* chosen, int64_t top_k, float* shares) {
  float largest = 0.f, peak = kLowest, total = 0.f;
  for (int64_t k = 0; k < top_k; ++k) {
    shares[k] = scores[chosen[k]];
    largest = shares[k] > largest ? shares[k] : largest;
    peak = to_float(x[chosen[k]]) > peak ? to_float(x[chosen[k]]) : peak;
  }
  const bool faint = largest < kRouterFaint && peak > kLowest;
  for (int64_t k = 0; k < top_k; ++k) {
    if (faint) shares[k] = expf(to_float(x[chosen[k]]) - peak);
    total += shares[k];
  }
  const float inverse = inverse_of(total);
  for (int64_t k = 0; k < top_k; ++k) shares[k] *= inverse;
}

MEGALM_INLINE void choose(const RouterForward& a, const float* values, Best& best) {
  const int experts = int(a.experts), top_k = int(a.top_k);
  best.size = 0;
  if (a.groups == 0) {
    for (int e = 0; e < experts; ++e) best.offer(rank_value(values[e]), e, top_k);
    return;
  }
  const int length = int(a.experts / a.groups), limit = int(a.group_scores);
  Best inside, groups;
  bool open[kRouterGroups] = {};
  for (int g = 0; g < int(a.groups); ++g) {
    inside.size = 0;
    for (int e = 0; e < length; ++e) inside.offer(rank_value(values[g * length + e]), e, limit);
    float total = 0.f;
    for (int i = 0; i < limit; ++i) total += inside.value[i];
    groups.offer(rank_value(total), g, int(a.top_groups));
  }
  for (int i = 0; i < groups.size; ++i) open[groups.index[i]] = true;
  for (int g = 0; g < int(a.groups); ++g) {
    if (!open[g]) continue;
    for (int e = g * length; e < (g + 1) * length; ++e) best.offer(rank_value(values[e]), e, top_k);
  }
}

template <typename T>
void forward_rows(const RouterForward& a, int64_t block, int64_t begin, int64_t end) {
  float scores[kRouterExperts], biased[kRouterExperts], shares[kRouterExperts];
  Best best;
  const int64_t experts = a.experts;
  float* probability = a.partial + block * experts;
  int64_t* counts = a.partial_counts + block * experts;
  __builtin_memset(probability, 0, size_t(experts) * sizeof(float));
  __builtin_memset(counts, 0, size_t(experts) * sizeof(int64_t));
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.logits) + row * experts;
    const float total = row_scores(x, experts, a.score, scores, a.log_z + row);
    const float log_z = a.log_z[row];
    if (a.score == Score::kSigmoid && log_z < kRouterFaintLog) {
      for_each_vec(experts, [&](int64_t i, auto get, auto put) {
        put(probability + i, get(probability + i) + exp(get(x + i) - log_z));
      });
    } else {
      const float share = a.score == Score::kSoftmax ? 1.f : inverse_of(total);
      for_each_vec(experts, [&](int64_t i, auto get, auto put) {
        put(probability + i, get(probability + i) + get(scores + i) * share);
      });
    }
    const float* values = scores;
    if (a.bias) {
      for_each_vec(experts, [&](int64_t i, auto get, auto put) { put(biased + i, get(scores + i) + get(a.bias + i)); });
      values = biased;
    }
    choose(a, values, best);
    if (a.normalize) chosen_shares(x, scores, best.index, a.top_k, shares);
    for (int64_t k = 0; k < a.top_k; ++k) {
      const int e = best.index[k];
      a.weights[row * a.top_k + k] = a.scale * (a.normalize ? shares[k] : scores[e]);
      a.chosen[row * a.top_k + k] = e;
      ++counts[e];
    }
  }
}

template <typename T>
void backward_rows(const RouterBackward& a, int64_t begin, int64_t end) {
  // slope = the gradient of log s: it stays in range where s does not
  float scores[kRouterExperts], slope[kRouterExperts], shares[kRouterExperts];
  int chosen[kRouterExperts];
  const int64_t experts = a.experts;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.logits) + row * experts;
    T* dx = static_cast<T*>(a.dlogits) + row * experts;
    const float log_z = a.log_z[row], dlog_z = a.dlog_z ? a.dlog_z[row] : 0.f;
    const bool softmax = a.score == Score::kSoftmax, faint = !softmax && log_z < kRouterFaintLog;
    for_each_vec(experts, [&](int64_t i, auto get, auto put) {
      put(scores + i, softmax ? exp(get(x + i) - log_z) : sigmoid(get(x + i)));
    });
    if (!a.dprobability) {
      __builtin_memset(slope, 0, size_t(experts) * sizeof(float));
    } else if (softmax) {
      for_each_vec(experts,
                   [&](int64_t i, auto get, auto put) { put(slope + i, get(scores + i) * get(a.dprobability + i)); });
    } else {
      // q, the shares, in `slope` first
      for_each_vec(experts, [&](int64_t i, auto get, auto put) {
        put(slope + i, faint ? exp(get(x + i) - log_z) : get(scores + i));
      });
      Vec totals{}, dots{};
      int64_t i = 0;
      float total = 0.f, dot = 0.f;
      for (; i + kLanes <= experts; i += kLanes) {
        totals += load(slope + i);
        dots += load(slope + i) * load(a.dprobability + i);
      }
      for (; i < experts; ++i) {
        total += slope[i];
        dot += slope[i] * a.dprobability[i];
      }
      const float inverse = inverse_of(total + sum(totals)), mean = (dot + sum(dots)) * inverse;
      for_each_vec(experts, [&](int64_t at, auto get, auto put) {
        put(slope + at, get(slope + at) * inverse * (get(a.dprobability + at) - mean));
      });
    }
    if (a.dweights) {
      const float* dw = a.dweights + row * a.top_k;
      for (int64_t k = 0; k < a.top_k; ++k) chosen[k] = int(a.chosen[row * a.top_k + k]);
      float mean = 0.f;
      if (a.normalize) {
        chosen_shares(x, scores, chosen, a.top_k, shares);
        for (int64_t k = 0; k < a.top_k; ++k) mean += dw[k] * shares[k];
      } else {
        for (int64_t k = 0; k < a.top_k; ++k) shares[k] = scores[chosen[k]];
      }
      for (int64_t k = 0; k < a.top_k; ++k) slope[chosen[k]] += a.scale * shares[k] * (dw[k] - mean);
    }
    if (softmax) {
      Vec slopes{};
      float slope_sum = 0.f;
      int64_t i = 0;
      for (; i + kLanes <= experts; i += kLanes) slopes += load(slope + i);
      for (; i < experts; ++i) slope_sum += slope[i];
      const float shift = dlog_z - (slope_sum + sum(slopes));
      for_each_vec(experts,
                   [&](int64_t at, auto get, auto put) { put(dx + at, get(slope + at) + get(scores + at) * shift); });
    } else {
      for_each_vec(experts, [&](int64_t at, auto get, auto put) {
        Vec v = get(slope + at) * sigmoid(-get(x + at));
        if (a.dlog_z) v += dlog_z * exp(get(x + at) - log_z);
        put(dx + at, v);
      });
    }
  }
}

}  // namespace

void router_forward(const RouterForward& a) {
  for_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t blocks = a.rows < a.row_blocks ? a.rows : a.row_blocks;
    parallel_for(blocks, a.rows * a.experts, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) forward_rows<T>(a, b, a.rows * b / blocks, a.rows * (b + 1) / blocks);
    });
    for (int64_t e = 0; e < a.experts; ++e) {
      float probability = 0.f;
      int64_t count = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        probability += a.partial[b * a.experts + e];
        count += a.partial_counts[b * a.experts + e];
      }
      a.probability[e] = probability;
      a.counts[e] = count;
    }
  });
}

void router_backward(const RouterBackward& a) {
  for_dtype(a.dtype, [&](auto type) {
    parallel_for(a.rows, 2 * a.rows * a.experts,
                 [&](int64_t begin, int64_t end) { backward_rows<decltype(type)>(a, begin, end); });
  });
}

}  // namespace megalm::MEGALM_ISA
