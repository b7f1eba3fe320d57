// The text field of JSON lines, without making the objects: for the common lines, and only where the answer is sure.
//
// data holds whole lines (the last one may lack its newline). Of line i, which begins at begins[i]:
//   kinds[i] = kBlank   white space only
//              kAscii   an object whose key `field` holds a string: its UTF-8, all below 128, is
//                       text[ends[i - 1] .. ends[i])  (ends[-1] = 0; what is no text takes none)
//              kText    the same, with bytes of 128 and above
//              kOther   anything else, to be looked at by a whole parser: broken lines, lines that are no object, a
//                       key that is missing, twice there, or written with escapes, half of a surrogate pair in the
//                       text, deep nesting, NaN and Infinity, long numbers, invalid UTF-8
// text has room for `size` bytes, begins, ends and kinds for every newline and one more. lines: how many there are.
// Sources: RFC 8259 (JSON), RFC 3629 (UTF-8).
#pragma once

#include "common/op.h"

namespace megalm {

enum class LineKind : uint8_t { kBlank = 0, kAscii = 1, kText = 2, kOther = 3 };

struct JsonLines {
  const uint8_t* data;
  int64_t size;
  const uint8_t* field;  // UTF-8
  int64_t field_size;
  uint8_t* text;
  int64_t* begins;
  int64_t* ends;
  uint8_t* kinds;
  int64_t* lines;
};

MEGALM_DECLARE_CPU(json_lines, JsonLines)

inline void json_lines(const JsonLines& args) { MEGALM_RUN_CPU(json_lines, args); }

}  // namespace megalm
