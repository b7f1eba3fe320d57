#include "minhash/op.h"

#include <stdlib.h>
#include <string.h>

#include "common/mix.h"

namespace megalm::MEGALM_ISA {
namespace {

constexpr int kTogether = 4;                    // registers of minima: their multiplications hide one another's time
constexpr int64_t kBlock = kTogether * kLanes;  // functions of one pass over a set

MEGALM_INLINE UintVec read(const uint32_t* at) {
  UintVec value;
  memcpy(&value, at, sizeof value);
  return value;
}

// The minima of kBlock functions over a set.
MEGALM_INLINE void minima(const uint64_t* values, int64_t count, const uint32_t* multipliers, const uint32_t* addends,
                          uint32_t* out) {
  UintVec factor[kTogether], addend[kTogether], least[kTogether];
  for (int i = 0; i < kTogether; ++i) {
    factor[i] = read(multipliers + i * kLanes);
    addend[i] = read(addends + i * kLanes);
    least[i] = UintVec{} - 1;
  }
  for (int64_t at = 0; at < count; ++at) {
    const UintVec value = UintVec{} + uint32_t(values[at] >> 32);
    for (int i = 0; i < kTogether; ++i) {
      const UintVec hash = factor[i] * value + addend[i];
      least[i] = hash < least[i] ? hash : least[i];
    }
  }
  for (int i = 0; i < kTogether; ++i) memcpy(out + i * kLanes, &least[i], sizeof least[i]);
}

}  // namespace

void minhash(const MinHash& a) {
  const int64_t functions = a.bands * a.rows, padded = (functions + kBlock - 1) / kBlock * kBlock;
  uint32_t* memory = static_cast<uint32_t*>(calloc(size_t(3 * padded) + 1, sizeof(uint32_t)));
  *a.ok = memory != nullptr;
  if (memory == nullptr) return;
  uint32_t *factors = memory, *addends = memory + padded, *least = memory + 2 * padded;
  memcpy(factors, a.multipliers, size_t(functions) * sizeof(uint32_t));
  memcpy(addends, a.addends, size_t(functions) * sizeof(uint32_t));
  for (int64_t set = 0; set < a.sets; ++set) {
    const uint64_t* values = a.values + a.offsets[set];
    const int64_t count = a.offsets[set + 1] - a.offsets[set];
    for (int64_t k = 0; k < padded; k += kBlock) minima(values, count, factors + k, addends + k, least + k);
    for (int64_t band = 0; band < a.bands; ++band) {
      uint64_t hash = 0;
      for (int64_t row = 0; row < a.rows; ++row) hash = mix_bits(hash + least[band * a.rows + row] * kGolden);
      a.out[band * a.sets + set] = hash;
    }
  }
  free(memory);
}

void intersections(const Intersections& a) {
  for (int64_t pair = 0; pair < a.pairs; ++pair) {
    const uint64_t *x = a.first[pair], *x_end = x + a.first_sizes[pair];
    const uint64_t *y = a.second[pair], *y_end = y + a.second_sizes[pair];
    int64_t common = 0;
    while (x < x_end && y < y_end) {  // without a branch on what cannot be foreseen
      const uint64_t p = *x, q = *y;
      common += p == q;
      x += p <= q;
      y += q <= p;
    }
    a.common[pair] = common;
  }
}

}  // namespace megalm::MEGALM_ISA
