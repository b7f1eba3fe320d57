#include "gradient_norm/op.h"

#include "common/vec.h"

namespace megalm::MEGALM_ISA {
namespace {

template <typename T>
void block(const GradientNorm& a, int64_t index) {
  const T* x = static_cast<const T*>(a.x) + index * kGradientNormBlock;
  const int64_t left = a.size - index * kGradientNormBlock;
  const int64_t count = left < kGradientNormBlock ? left : kGradientNormBlock;
  double total = 0.;
  int64_t bad = 0;
  // Each lane sums a few dozen squares in fp32 before they go on in fp64.
  constexpr int64_t kRun = 64 * kLanes;
  for (int64_t begin = 0; begin < count; begin += kRun) {
    Vec squares{};
    IntVec infinite{};
    for_each_vec(count - begin < kRun ? count - begin : kRun, [&](int64_t i, auto load, auto) {
      const Vec v = load(x + begin + i);
      squares += v * v;
      infinite -= (IntVec)(((UintVec)v & 0x7f800000u) == 0x7f800000u);
    });
    for (int i = 0; i < kLanes; ++i) {
      total += double(squares[i]);
      bad += infinite[i];
    }
  }
  a.partial[2 * index] = total;
  a.partial[2 * index + 1] = double(bad);
}

}  // namespace

void gradient_norm(const GradientNorm& a) {
  const int64_t blocks = (a.size + kGradientNormBlock - 1) / kGradientNormBlock;
  for_dtype(a.dtype, [&](auto type) {
    parallel_for(blocks, a.size, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) block<decltype(type)>(a, i);
    });
  });
  for (int64_t i = 0; i < blocks; ++i) {
    a.result[0] += a.partial[2 * i];
    a.result[1] += a.partial[2 * i + 1];
  }
}

}  // namespace megalm::MEGALM_ISA
