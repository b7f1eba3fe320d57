// The finaliser of splitmix64, which every keyed order and hash on the CPU is made of: a bijection of 64 bits.
// Source: Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators.
#pragma once

#include "common/vec.h"

namespace megalm::MEGALM_ISA {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

MEGALM_INLINE uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace megalm::MEGALM_ISA
