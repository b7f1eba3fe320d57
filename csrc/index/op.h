// Integer functions on the host: initial weights and keyed permutations. Exact, so that every machine and every
// implementation gives the same bits; megalm/parallel/initialize.py and megalm/data/order.py define them.
//
// fill:     h1, h2 = splitmix64 outputs 2 i and 2 i + 1 of the state `key`, i the element's index in the global tensor
//           out = float(scale * (2 * sum of their eight 16-bit parts - 8 * 65535))
//           The elements are `rows` runs of `columns`: run r begins at global index first + r * stride.
// permute:  a Feistel network of four double rounds over the smallest power of two that holds [0, size), walked until
//           it lands inside; out[i] is where index[i] goes under keys[i] (or under keys[0] where one_key).
//
// Sources: Steele, Lea and Flood 2014 (splitmix64); Black and Rogaway 2002 (cycle walking).
#pragma once

#include "common/op.h"

namespace megalm {

struct Fill {
  uint64_t key, first, stride;
  int64_t rows, columns;
  double scale;
  float* out;  // [rows, columns]
};

struct Permute {
  uint64_t size;
  int64_t count;
  bool one_key;
  const int64_t* index;
  const uint64_t* keys;
  int64_t* out;
};

MEGALM_DECLARE_CPU(fill, Fill)
MEGALM_DECLARE_CPU(permute, Permute)

inline void fill(const Fill& args) { MEGALM_RUN_CPU(fill, args); }
inline void permute(const Permute& args) { MEGALM_RUN_CPU(permute, args); }

}  // namespace megalm
