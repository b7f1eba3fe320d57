// Suffix arrays on the host: over bytes, or over tokens of 16 or 32 bits, with indices of 32 or 64 bits.
//
// suffix_array:  out is the permutation of [0, count) that sorts the suffixes of text; a suffix that is the beginning
// of
//                another one comes first. Every symbol is below `symbols`. Time O(count + symbols); memory beyond text
//                and out: a byte for each symbol of text, and 2 * symbols indices, at each of at most log2(count)
//                levels that halve the count. Returns false where memory was not to be had.
// repeats:       `runs` lists of positions, each sorted by the `length` symbols from there, are merged; where several
//                positions have equal symbols, out gets (position, smallest position) of all that do not overlap the
//                smallest. Positions are bases[r] + lists[r][i]; text holds `length` symbols after each. out has room
//                for a pair for each position. Returns the number of pairs, or -1 where memory was not to be had.
//
// Sources: Nong, Zhang and Chan 2009 (induced sorting); Lee et al. 2022, arXiv:2107.06499 (what it is for).
#pragma once

#include "common/op.h"

namespace megalm {

struct SuffixArray {
  const void* text;
  int text_bytes;  // of a symbol: 1, 2 or 4
  int64_t count, symbols;
  void* out;
  int out_bytes;  // of an index: 4 (count < 2^31) or 8
  bool* ok;
};

struct Repeats {
  const void* text;
  int text_bytes;
  int64_t length, runs;
  const uint32_t* const* lists;
  const int64_t* counts;
  const int64_t* bases;
  int64_t* out;  // [positions, 2]
  int64_t* found;
};

MEGALM_DECLARE_CPU(suffix_array, SuffixArray)
MEGALM_DECLARE_CPU(repeats, Repeats)

inline void suffix_array(const SuffixArray& args) { MEGALM_RUN_CPU(suffix_array, args); }
inline void repeats(const Repeats& args) { MEGALM_RUN_CPU(repeats, args); }

}  // namespace megalm
