// C4's rules for lines: which lines of a text stay, without citations, and what of a page they were counted in.
//
// A line (by any character that ends one) loses white space on both sides and marks of citations ([1], [edit],
// [citation needed]). It goes if a word of it has more than `max_word` characters, if it does not end in . ? ! " or ',
// or ends in three points (`terminal`), if it has fewer than `min_words` words (between white space, citations
// counted), or if it names javascript or a policy on cookies, privacy or terms of use. The lines that stay are joined
// by line feeds; white space on both sides of the whole goes.
//
// out has room for as many bytes as data; out_ends [texts] where each text ends there. counts [texts, kLineCounts] has
// the numbers of LineCount. Sentences are those of the lines that stay, as spaCy's sentencizer makes them.
// Source: Raffel et al. 2020 (arXiv:1910.10683), section 2.2; classes and words as in csrc/text_counts.
#pragma once

#include "common/op.h"

namespace megalm {

// As megalm/corpus/filter/edits.py names them: what a line went for, and what is counted of the others.
enum LineCount : int {
  kLongWordLines,
  kUnendedLines,
  kFewWordLines,
  kJavascriptLines,
  kPolicyLines,
  kStayingLines,
  kSentences,
  kLoremIpsumLines,
  kCurlyBracketLines,
  kLineCounts,
};

struct CleanLines {
  const uint8_t* data;
  const int64_t* ends;
  int64_t texts;
  const uint32_t* classes;
  int64_t codes;
  const uint32_t* exception_codes;
  const int64_t* exception_ends;
  int64_t exceptions;
  const uint8_t* pieces;
  const int64_t* piece_ends;
  const uint32_t* unit_codes;
  const int64_t* unit_ends;
  int64_t units;
  int64_t max_word;
  int64_t min_words;
  bool terminal;
  uint8_t* out;
  int64_t* out_ends;
  int64_t* counts;
};

MEGALM_DECLARE_CPU(clean_lines, CleanLines)

inline void clean_lines(const CleanLines& args) { MEGALM_RUN_CPU(clean_lines, args); }

}  // namespace megalm
