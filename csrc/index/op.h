// Integer functions on the host: initial weights and keyed permutations. Exact, so that every machine and every
// implementation gives the same bits; megalm/parallel/initialize.py and megalm/data/order.py define them.
//
// fill:     h1, h2 = splitmix64 outputs 2 i and 2 i + 1 of the state `key`, i the element's index in the global tensor
//           out = float(scale * (2 * sum of their eight 16-bit parts - 8 * 65535))
//           The elements are `rows` runs of `columns`: run r begins at global index first + r * stride.
// permute:  a Feistel network of four double rounds over the smallest power of two that holds [0, size), walked until
//           it lands inside; out[i] is where index[i] goes under keys[i] (or under keys[0] where one_key).
// deal:     slots first + 1 .. first + count of the chairman's assignment; megalm/data/blend.py defines it. Source i
// has
//           shares[i] of `unit` slots; its sample k may come from slot ceil((k unit + slack) / share) on and must have
//           come by slot floor(((k + 1) unit - slack) / share) + 1; each slot takes the earliest deadline, the first of
//           equals. given[i], in and out: how many of i came before. rank[j]: how many of source[j] came before it.
// dealt:    given[i] after `slots` slots, without dealing them.
// greedy:   Megatron's blending: sample i goes to the source with the largest shares[s] * max(i, 1) - counts[s], in
//           fp64 with both operations rounded; the first of equals. rank[i] = counts[s] before it.
// starts:   Megatron's sample index: sample i's first token is token i * length of the documents in their order, and
//           stands at offsets[i] of entry entries[i] of that order. Tokens end behind the last sample's first one.
//
// Sources: Steele, Lea and Flood 2014 (splitmix64); Black and Rogaway 2002 (cycle walking); Tijdeman 1980 (chairman);
// Shoeybi et al. 2019 (Megatron-LM, arXiv:1909.08053).
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

struct Deal {
  int64_t sources, unit, slack, first, count;
  const int64_t* shares;
  int64_t* given;
  int64_t* source;
  int64_t* rank;
};

struct Greedy {
  int64_t sources, count;
  const double* shares;
  int64_t* counts;  // [sources], 0 at first
  int16_t* source;
  int64_t* rank;
};

struct Starts {
  int64_t samples, length, first;
  const int32_t* order;  // documents, numbered from `first`
  const int64_t* sizes;  // of each document
  int64_t* entries;
  int64_t* offsets;
};

struct Dealt {
  int64_t sources, unit, slack, slots;
  const int64_t* shares;
  int64_t* given;
};

MEGALM_DECLARE_CPU(fill, Fill)
MEGALM_DECLARE_CPU(permute, Permute)
MEGALM_DECLARE_CPU(deal, Deal)
MEGALM_DECLARE_CPU(dealt, Dealt)
MEGALM_DECLARE_CPU(greedy, Greedy)
MEGALM_DECLARE_CPU(starts, Starts)

inline void fill(const Fill& args) { MEGALM_RUN_CPU(fill, args); }
inline void permute(const Permute& args) { MEGALM_RUN_CPU(permute, args); }
inline void deal(const Deal& args) { MEGALM_RUN_CPU(deal, args); }
inline void dealt(const Dealt& args) { MEGALM_RUN_CPU(dealt, args); }
inline void greedy(const Greedy& args) { MEGALM_RUN_CPU(greedy, args); }
inline void starts(const Starts& args) { MEGALM_RUN_CPU(starts, args); }

}  // namespace megalm
