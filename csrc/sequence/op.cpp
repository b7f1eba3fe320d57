#include "sequence/op.h"

#include "common/vec.h"

namespace megalm::MEGALM_ISA {

void move(const Move& a) {
  const int64_t rows = a.n[0] * a.n[1];
  parallel_for(rows, rows * a.n[2] * a.run / 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t i = row / a.n[1], j = row % a.n[1];
      const char* from = a.from + i * a.from_stride[0] + j * a.from_stride[1];
      char* to = a.to + i * a.to_stride[0] + j * a.to_stride[1];
      if (a.from_stride[2] == a.run && a.to_stride[2] == a.run) {
        __builtin_memcpy(to, from, size_t(a.n[2] * a.run));
        continue;
      }
      for (int64_t k = 0; k < a.n[2]; ++k) {
        __builtin_memcpy(to + k * a.to_stride[2], from + k * a.from_stride[2], size_t(a.run));
      }
    }
  });
}

void sum_parts(const SumParts& a) {
  for_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const T* x = static_cast<const T*>(a.x);
    T* out = static_cast<T*>(a.out);
    // Whole registers for each thread: the sums do not depend on how many there are.
    const int64_t blocks = (a.count + kLanes - 1) / kLanes;
    parallel_for(blocks, a.parts * a.count, [&](int64_t first, int64_t last) {
      const int64_t begin = first * kLanes, end = last * kLanes < a.count ? last * kLanes : a.count;
      for_each_vec(end - begin, [&](int64_t i, auto load, auto store) {
        Vec total{};
        for (int64_t p = 0; p < a.parts; ++p) total += load(x + p * a.count + begin + i);
        store(out + begin + i, total);
      });
    });
  });
}

}  // namespace megalm::MEGALM_ISA
