#include "index/op.h"

#include "common/vec.h"

namespace megalm::MEGALM_ISA {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
constexpr int kRounds = 4;

MEGALM_INLINE uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

MEGALM_INLINE uint64_t parts(uint64_t word) {
  constexpr uint64_t kEven = 0x0000FFFF0000FFFFu;
  return (word & kEven) + ((word >> 16) & kEven);
}

MEGALM_INLINE int64_t centred(uint64_t key, uint64_t index) {
  const uint64_t state = index * (2 * kGolden) + key + kGolden;
  const uint64_t both = parts(mix(state)) + parts(mix(state + kGolden));
  return 2 * int64_t((both & 0xFFFFFFFFu) + (both >> 32)) - 8 * 65535;
}

MEGALM_INLINE int64_t walk(uint64_t value, uint64_t size, uint64_t key, int right_bits, int left_bits) {
  const uint64_t right_mask = (uint64_t(1) << right_bits) - 1, left_mask = (uint64_t(1) << left_bits) - 1;
  do {
    uint64_t left = value >> right_bits, right = value & right_mask;
    for (uint64_t round = 0; round < kRounds; ++round) {
      left ^= mix(right + (key ^ ((2 * round + 1) * kGolden))) & left_mask;
      right ^= mix(left + (key ^ ((2 * round + 2) * kGolden))) & right_mask;
    }
    value = (left << right_bits) | right;
  } while (value >= size);
  return int64_t(value);
}

}  // namespace

void fill(const Fill& a) {
  const int64_t total = a.rows * a.columns;
  const auto run = [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / a.columns, column = begin % a.columns;
      const int64_t count = end - begin < a.columns - column ? end - begin : a.columns - column;
      const uint64_t start = a.first + uint64_t(row) * a.stride + uint64_t(column);
      float* out = a.out + begin;
      for (int64_t i = 0; i < count; ++i)
        out[i] = float(double(int32_t(centred(a.key, start + uint64_t(i)))) * a.scale);
      begin += count;
    }
  };
  parallel_for(total, total, run);
}

void permute(const Permute& a) {
  int bits = 64 - __builtin_clzll(a.size > 1 ? a.size - 1 : 1);
  if (bits < 2) bits = 2;
  parallel_for(a.count, a.count * 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      a.out[i] = walk(uint64_t(a.index[i]), a.size, a.keys[a.one_key ? 0 : i], bits / 2, bits - bits / 2);
    }
  });
}

}  // namespace megalm::MEGALM_ISA
