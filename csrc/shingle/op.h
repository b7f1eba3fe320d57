// Sets of runs of words, as sorted hashes, for deduplication; megalm/corpus/dedup/shingles.py defines them.
//
// `letters` has an entry for each byte: what it counts as in a word (a capital as the small letter), 0 for ASCII that
// separates words. A character beyond ASCII is of the class that `classes` has for its code, a letter from `codes` on:
// a letter goes on with a word of letters, and begins one elsewhere; a separator ends the word; one that stands alone
// begins a word, which marks and joiners behind it go on with, and so does the next that stands alone behind a joiner
// or a leading character; a leading one begins a word; marks and joiners behind no word begin one of letters. A
// character of fewer than three bytes never stands alone or leads: it is a letter then. With M = 0x9E3779B97F4A7C15 and
// mix as in csrc/index: hash of a word = mix(sum over its bytes of (entry + 1) * M^(1 + place)); of a run of w words =
// mix(sum of hash_j * M^(w-1-j)). A text of fewer words than w, but not none, is one run of what it has, followed by
// zeros.
//
// values gets the sets of all texts one after another, each sorted and without repetition; offsets [texts + 1] where
// each begins. values has room for as many as there can be: half the bytes, and one for each text.
//
// lower_case copies texts in UTF-8 and replaces each character above ASCII by small[code], where code is below `codes`.
// One that `ascii` marks is copied as it is; of one with a character whose entry is kSpecial nothing is copied, and
// special[text] is 1. ends_out: where each ends in out, which has room for half as many bytes again: no entry of small
// may need more than that beside its code.
#pragma once

#include "common/op.h"

namespace megalm {

// As megalm/corpus/dedup/scripts.py has them.
enum CharacterClass : uint8_t { kLetter, kSeparator, kAlone, kMark, kLeading, kJoiner };

struct Shingles {
  const uint8_t* data;
  const int64_t* ends;  // where each text ends in data
  int64_t texts, words;
  const uint8_t* letters;  // [256]
  const uint8_t* classes;  // [codes]
  int64_t codes;
  uint64_t* values;
  int64_t* offsets;
  bool* ok;  // false where memory was not to be had
};

constexpr uint32_t kSpecial = 0xFFFFFFFFu;

struct LowerCase {
  const uint8_t* data;
  const int64_t* ends;
  const uint8_t* ascii;  // [texts]
  int64_t texts;
  const uint32_t* small;  // [codes]
  int64_t codes;
  uint8_t* out;
  int64_t* ends_out;
  uint8_t* special;  // [texts]
};

MEGALM_DECLARE_CPU(shingles, Shingles)
MEGALM_DECLARE_CPU(lower_case, LowerCase)

inline void shingles(const Shingles& args) { MEGALM_RUN_CPU(shingles, args); }
inline void lower_case(const LowerCase& args) { MEGALM_RUN_CPU(lower_case, args); }

}  // namespace megalm
