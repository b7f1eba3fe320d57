#include "dropout/op.h"

#include "common/mix.h"

namespace megalm::MEGALM_ISA {
namespace {

MEGALM_INLINE UintVec mix(UintVec h, uint32_t key) {
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h = ((h ^ (h >> 15)) + key) * 0x846CA68Bu;
  return h ^ (h >> 16);
}

template <typename T>
void run(const DropoutAdd& a, int64_t begin, int64_t end) {
  UintVec lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = uint32_t(i) * kDropoutColumn;
  const T* bias = static_cast<const T*>(a.bias);
  const int64_t width = a.size * int64_t(sizeof(T));
  const bool past = a.y != a.x && a.y != a.residual && streams(a.rows * width, width, a.y);
  for (int64_t row = begin; row < end; ++row) {
    const uint64_t id = uint64_t(a.row_ids ? a.row_ids[row] : row);
    const uint64_t state = mix_bits(a.seed + kDropoutGolden * (id + 1));
    const uint32_t low = uint32_t(state) + a.first_column * kDropoutColumn, high = uint32_t(state >> 32);
    const T* x = static_cast<const T*>(a.x) + row * a.size;
    const T* residual = a.residual ? static_cast<const T*>(a.residual) + row * a.size : nullptr;
    T* y = static_cast<T*>(a.y) + row * a.size;
    for_each_vec(a.size, past, [&](int64_t i, auto load, auto store) {
      const UintVec h = mix(lanes + (low + uint32_t(i) * kDropoutColumn), high);
      Vec v = load(x + i);
      if (bias) v += load(bias + i);
      v = h >= a.threshold ? v * a.scale : Vec{};
      if (residual) v += load(residual + i);
      store(y + i, v);
    });
  }
}

}  // namespace

void dropout_add(const DropoutAdd& a) {
  for_dtype(a.dtype, [&](auto type) {
    parallel_for(a.rows, a.rows * a.size, [&](int64_t begin, int64_t end) { run<decltype(type)>(a, begin, end); });
  });
}

}  // namespace megalm::MEGALM_ISA
