#include "moe_permute/op.h"

#include "common/vec.h"

namespace megalm::MEGALM_ISA {
namespace {

MEGALM_INLINE int64_t expert_of(const RowMap& a, int64_t slot) {
  const int64_t e = a.chosen[slot];
  return e >= 0 && e < a.experts ? e : a.experts;
}

template <typename T>
MEGALM_INLINE void scale_row(const T* from, T* to, int64_t size, const float* weight, bool past) {
  if (!weight) {
    copy_bytes((const char*)from, (char*)to, size * int64_t(sizeof(T)), past);
    return;
  }
  const float w = *weight;
  for_each_vec(size, past, [&](int64_t i, auto load, auto store) { store(to + i, load(from + i) * w); });
}

template <typename T>
void spread_tokens(const Spread& a, int64_t begin, int64_t end) {
  const int64_t total = a.tokens * a.top_k, width = a.size * int64_t(sizeof(T));
  const bool past = streams(total * width, width, a.out);
  for (int64_t token = begin; token < end; ++token) {
    const T* x = static_cast<const T*>(a.x) + token * a.size;
    for (int64_t slot = token * a.top_k; slot < (token + 1) * a.top_k; ++slot) {
      const bool dropped = a.rows[slot] < 0;
      const int64_t row = dropped ? -1 - a.rows[slot] : a.rows[slot];
      if (a.y) a.dweights[slot] = 0.f;
      if (row >= total) continue;
      T* out = static_cast<T*>(a.out) + row * a.size;
      if (dropped) {
        __builtin_memset(out, 0, size_t(a.size) * sizeof(T));
        continue;
      }
      if (!a.y) {
        scale_row(x, out, a.size, a.weights ? a.weights + slot : nullptr, past);
        continue;
      }
      const T* y = static_cast<const T*>(a.y) + row * a.size;
      const float w = a.weights ? a.weights[slot] : 1.f;
      Vec dot{};
      for_each_vec(a.size, past, [&](int64_t i, auto load, auto store) {
        const Vec g = load(x + i);
        dot += g * load(y + i);
        store(out + i, g * w);
      });
      a.dweights[slot] = sum(dot);
    }
  }
}

template <typename T>
void collect_tokens(const Collect& a, int64_t begin, int64_t end) {
  constexpr int64_t kTile = 16 * kLanes;  // columns whose sums stay in registers or the nearest cache
  const int64_t total = a.tokens * a.top_k;
  float sums[kTile];
  for (int64_t token = begin; token < end; ++token) {
    T* out = static_cast<T*>(a.out) + token * a.size;
    for (int64_t column = 0; column < a.size; column += kTile) {
      const int64_t width = a.size - column < kTile ? a.size - column : kTile;
      bool first = true;
      for (int64_t slot = token * a.top_k; slot < (token + 1) * a.top_k; ++slot) {
        const int64_t row = a.rows[slot];
        if (row < 0 || row >= total) continue;
        const T* x = static_cast<const T*>(a.x) + row * a.size + column;
        const float w = a.weights ? a.weights[slot] : 1.f;
        if (first) {
          for_each_vec(width, [&](int64_t i, auto load, auto store) { store(sums + i, load(x + i) * w); });
        } else {
          for_each_vec(width,
                       [&](int64_t i, auto load, auto store) { store(sums + i, load(sums + i) + load(x + i) * w); });
        }
        first = false;
      }
      if (first) {
        __builtin_memset(out + column, 0, size_t(width) * sizeof(T));
      } else {
        for_each_vec(width, [&](int64_t i, auto load, auto store) { store(out + column + i, load(sums + i)); });
      }
    }
  }
}

}  // namespace

void row_map(const RowMap& a) {
  const int64_t columns = a.experts + 1;
  const auto each_chunk = [&](auto&& body) {
    parallel_for(a.chunks, a.slots, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        body(a.partial + c * columns, a.slots * c / a.chunks, a.slots * (c + 1) / a.chunks);
      }
    });
  };
  each_chunk([&](int64_t* histogram, int64_t begin, int64_t end) {
    __builtin_memset(histogram, 0, size_t(columns) * sizeof(int64_t));
    for (int64_t slot = begin; slot < end; ++slot) ++histogram[expert_of(a, slot)];
  });
  int64_t at = 0;  // histograms become places: of each expert, chunk after chunk
  for (int64_t e = 0; e < columns; ++e) {
    const int64_t before = at;
    for (int64_t c = 0; c < a.chunks; ++c) {
      const int64_t count = a.partial[c * columns + e];
      a.partial[c * columns + e] = at;
      at += count;
    }
    if (e < a.experts) a.counts[e] = at - before;
  }
  each_chunk([&](int64_t* place, int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      const int64_t e = expert_of(a, slot), row = place[e]++;
      a.rows[slot] = e < a.experts ? row : -1 - row;
      a.sources[row] = slot;
    }
  });
}

void spread(const Spread& a) {
  for_dtype(a.dtype, [&](auto type) {
    parallel_for(a.tokens, a.tokens * a.top_k * a.size,
                 [&](int64_t begin, int64_t end) { spread_tokens<decltype(type)>(a, begin, end); });
  });
}

void collect(const Collect& a) {
  for_dtype(a.dtype, [&](auto type) {
    parallel_for(a.tokens, a.tokens * a.top_k * a.size,
                 [&](int64_t begin, int64_t end) { collect_tokens<decltype(type)>(a, begin, end); });
  });
}

}  // namespace megalm::MEGALM_ISA
