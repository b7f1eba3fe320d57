// What heuristic filters ask of a text: counts of characters, words, lines, paragraphs, and of what repeats.
//
// classes[code] has the bits of CharacterBits for every character below `codes`; others have none. Words are those of
// English: runs without white space, of which prefixes, suffixes and infixes are split off; a run among the exceptions
// is split as it says there. megalm/corpus/filter/english.py has classes, exceptions and units, and says where they
// come from; csrc/text_counts/english.h has the rules.
//
// counts [texts, kTextCounts] gets, for each text, the numbers in the order of TextCount. Sizes are in characters.
// Source: Rae et al. 2021 (arXiv:2112.11446), table A1; Penedo et al. 2024 (arXiv:2406.17557), section 3.6.
#pragma once

#include "common/op.h"

namespace megalm {

// As megalm/corpus/filter/english.py has them.
enum CharacterBits : uint32_t {
  kSpace = 1u << 0,          // white space
  kLineBreak = 1u << 1,      // ends a line
  kAlphabetic = 1u << 2,     // a letter by its Unicode category
  kSymbol = 1u << 3,         // a word of nothing else counts as no word
  kTerminal = 1u << 4,       // ends a sentence, and so a line
  kEnglishLetter = 1u << 5,  // what the rules of words take for letters
  kLower = 1u << 6,
  kUpper = 1u << 7,
  kQuote = 1u << 8,
  kPrefix = 1u << 9,   // alone a prefix
  kSuffix = 1u << 10,  // alone a suffix
  kIcon = 1u << 11,
  kCurrency = 1u << 12,
  kBeforePoint = 1u << 13,  // a point behind it is a suffix
  kWordCharacter = 1u << 14,
  kDecimal = 1u << 15,
  kHost = 1u << 16,  // stands in names of hosts
  kSentenceEnd = 1u << 17,
  kPunctuation = 1u << 18,
  kPlain = 1u << 19,    // a letter of ASCII
  kCounted = 1u << 20,  // a number sign, a point, an ellipsis
};

// The columns of counts, as megalm/corpus/filter/scores.py names them.
enum TextCount : int {
  kCharacters,
  kNewlines,
  kWords,
  kPlainWords,           // with something else than symbols
  kPlainWordCharacters,  // of these
  kAlphabeticWords,
  kStopWords,  // different ones
  kHashes,
  kEllipses,
  kLines,
  kBulletLines,
  kEllipsisLines,
  kParagraphs,
  kRepeatedParagraphs,
  kRepeatedParagraphCharacters,
  kRuns,  // of characters between line feeds
  kRepeatedRuns,
  kRepeatedRunCharacters,
  kFilledLines,
  kTerminalLines,
  kShortLines,
  kRepeatedLineCharacters,
  kTop2Characters,
  kTop3Characters,
  kTop4Characters,
  kRepeated5Characters,
  kRepeated6Characters,
  kRepeated7Characters,
  kRepeated8Characters,
  kRepeated9Characters,
  kRepeated10Characters,
  kTextCounts,
};

// What words are made by: lists of strings as codes one after another, and where each ends.
struct WordRules {
  const uint32_t* classes;
  int64_t codes;
  const uint32_t* exception_codes;
  const int64_t* exception_ends;
  int64_t exceptions;
  const uint8_t* pieces;  // lengths of the words that each exception is split into
  const int64_t* piece_ends;
  const uint32_t* unit_codes;
  const int64_t* unit_ends;
  int64_t units;
};

struct TextCounts {
  const uint8_t* data;
  const int64_t* ends;  // where each text ends in data
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
  const uint32_t* stop_codes;
  const int64_t* stop_ends;
  int64_t stops;
  int64_t short_line;  // a line of at most so many characters is short
  int64_t* counts;
};

MEGALM_DECLARE_CPU(text_counts, TextCounts)

inline void text_counts(const TextCounts& args) { MEGALM_RUN_CPU(text_counts, args); }

}  // namespace megalm
