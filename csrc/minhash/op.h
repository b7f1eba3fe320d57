// MinHash signatures of sets, as hashes of their bands, and how much two sets have in common, for deduplication.
//
// minhash:        out[band, set] = h_rows, with h_0 = 0 and h_{r+1} = mix(h_r + m_{band * rows + r} * M), where
//                 m_k = min over the set's values of (multipliers[k] * (value >> 32) + addends[k]) mod 2^32, of an
//                 empty set 2^32 - 1; M and mix are those of csrc/shingle.
// intersections:  common[i] = size of the intersection of two sorted sets without repetition, given by address and
// size.
//
// Sources: Broder 1997; Dietzfelbinger et al. 1997 (multiply-add hashing).
#pragma once

#include "common/op.h"

namespace megalm {

struct MinHash {
  const uint64_t* values;
  const int64_t* offsets;  // [sets + 1]: where each set begins
  int64_t sets, bands, rows;
  const uint32_t* multipliers;  // [bands * rows]
  const uint32_t* addends;
  uint64_t* out;  // [bands, sets]
  bool* ok;       // false where memory was not to be had
};

struct Intersections {
  int64_t pairs;
  const uint64_t* const* first;  // [pairs]
  const uint64_t* const* second;
  const int64_t* first_sizes;
  const int64_t* second_sizes;
  int64_t* common;
};

MEGALM_DECLARE_CPU(minhash, MinHash)
MEGALM_DECLARE_CPU(intersections, Intersections)

inline void minhash(const MinHash& args) { MEGALM_RUN_CPU(minhash, args); }
inline void intersections(const Intersections& args) { MEGALM_RUN_CPU(intersections, args); }

}  // namespace megalm
