#include "sequence/op.h"

#include "common/vec.h"

namespace megalm::MEGALM_ISA {

void move(const Move& given) {
  Move a = given;
  // Runs that lie one behind the other on both sides are one run, from the inside outwards.
  for (int d = 2; d >= 0 && (a.n[d] == 1 || (a.from_stride[d] == a.run && a.to_stride[d] == a.run)); --d) {
    a.run *= a.n[d];
    a.n[d] = 1;
  }
  const int64_t total = a.n[0] * a.n[1] * a.n[2] * a.run;
  if (total == 0) return;
  bool past = streams(total, a.run, a.to);
  for (int d = 0; d < 3; ++d) past = past && (a.n[d] == 1 || a.to_stride[d] % 64 == 0);
  // Pieces of long runs, so that one run, too, is shared among the threads.
  constexpr int64_t kPiece = 1 << 16;
  const int64_t pieces = (a.run + kPiece - 1) / kPiece;
  const int64_t rows = a.n[0] * a.n[1] * a.n[2] * pieces;
  parallel_for(rows, total / 4, [&](int64_t begin, int64_t end) {
    int64_t piece = begin % pieces, k = begin / pieces % a.n[2], j = begin / pieces / a.n[2] % a.n[1];
    int64_t i = begin / pieces / a.n[2] / a.n[1];
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = piece * kPiece, count = a.run - at < kPiece ? a.run - at : kPiece;
      copy_bytes(a.from + i * a.from_stride[0] + j * a.from_stride[1] + k * a.from_stride[2] + at,
                 a.to + i * a.to_stride[0] + j * a.to_stride[1] + k * a.to_stride[2] + at, count, past);
      if (++piece < pieces) continue;
      piece = 0;
      if (++k < a.n[2]) continue;
      k = 0;
      if (++j < a.n[1]) continue;
      j = 0;
      ++i;
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
    const bool past = streams(a.count * int64_t(sizeof(T)), 64, out);
    parallel_for(blocks, a.parts * a.count, [&](int64_t first, int64_t last) {
      const int64_t begin = first * kLanes, end = last * kLanes < a.count ? last * kLanes : a.count;
      for_each_vec(end - begin, past, [&](int64_t i, auto load, auto store) {
        Vec total{};
        for (int64_t p = 0; p < a.parts; ++p) total += load(x + p * a.count + begin + i);
        store(out + begin + i, total);
      });
    });
  });
}

}  // namespace megalm::MEGALM_ISA
