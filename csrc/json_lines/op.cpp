#include "json_lines/op.h"

#include <string.h>

#include "common/vec.h"

namespace megalm::MEGALM_ISA {
namespace {

constexpr int kDeepest = 64;        // objects and arrays inside one another
constexpr int64_t kLongest = 1000;  // digits of a number: Python refuses some thousands

#if defined(__AVX512BW__)
constexpr int kBlock = 64;
#elif defined(__AVX2__)
constexpr int kBlock = 32;
#elif defined(__SSE2__)
constexpr int kBlock = 16;
#else
constexpr int kBlock = 8;
#endif

MEGALM_INLINE bool is_special(uint8_t byte) { return byte < 0x20 || byte >= 0x80 || byte == '"' || byte == '\\'; }

// How many of the kBlock bytes from here come before a control character, a quote, a backslash or a byte beyond ASCII.
MEGALM_INLINE int plain(const uint8_t* at) {
#if defined(__AVX512BW__)
  const __m512i bytes = _mm512_loadu_si512(at);
  const uint64_t mask = _mm512_cmplt_epi8_mask(bytes, _mm512_set1_epi8(0x20)) |
                        _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8('"')) |
                        _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8('\\'));
  return mask ? __builtin_ctzll(mask) : kBlock;
#elif defined(__AVX2__)
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  const __m256i found = _mm256_or_si256(_mm256_cmpgt_epi8(_mm256_set1_epi8(0x20), bytes),
                                        _mm256_or_si256(_mm256_cmpeq_epi8(bytes, _mm256_set1_epi8('"')),
                                                        _mm256_cmpeq_epi8(bytes, _mm256_set1_epi8('\\'))));
  const uint32_t mask = uint32_t(_mm256_movemask_epi8(found));
  return mask ? __builtin_ctz(mask) : kBlock;
#elif defined(__SSE2__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  const __m128i found =
      _mm_or_si128(_mm_cmplt_epi8(bytes, _mm_set1_epi8(0x20)),
                   _mm_or_si128(_mm_cmpeq_epi8(bytes, _mm_set1_epi8('"')), _mm_cmpeq_epi8(bytes, _mm_set1_epi8('\\'))));
  const uint32_t mask = uint32_t(_mm_movemask_epi8(found));
  return mask ? __builtin_ctz(mask) : kBlock;
#else
  int count = 0;
  while (count < kBlock && !is_special(at[count])) ++count;
  return count;
#endif
}

MEGALM_INLINE bool between(uint8_t byte, uint8_t low, uint8_t high) { return byte >= low && byte <= high; }

// Bytes of the character that begins with this byte of 0x80 or above; 0 where it is not UTF-8.
MEGALM_INLINE int character(const uint8_t* at, const uint8_t* end) {
  const int64_t left = end - at;
  const auto follows = [&](int i) { return (at[i] & 0xC0) == 0x80; };
  if (between(at[0], 0xC2, 0xDF)) return left >= 2 && follows(1) ? 2 : 0;
  if (between(at[0], 0xE0, 0xEF)) {
    if (left < 3 || !follows(1) || !follows(2)) return 0;
    if (at[0] == 0xE0 && at[1] < 0xA0) return 0;
    return at[0] == 0xED && at[1] > 0x9F ? 0 : 3;  // a half of a surrogate pair is none
  }
  if (between(at[0], 0xF0, 0xF4)) {
    if (left < 4 || !follows(1) || !follows(2) || !follows(3)) return 0;
    if (at[0] == 0xF0 && at[1] < 0x90) return 0;
    return at[0] == 0xF4 && at[1] > 0x8F ? 0 : 4;
  }
  return 0;
}

// Reads one line. Each function moves `at` past what it reads, and returns false where the line is not a common one.
struct Reader {
  const uint8_t* at;
  const uint8_t* end;
  uint8_t* out;  // where the text goes
  bool ascii = true;

  MEGALM_INLINE void space() {
    while (at < end && (*at == ' ' || *at == '\t' || *at == '\r' || *at == '\n')) ++at;
  }
  MEGALM_INLINE bool take(uint8_t byte) {
    if (at == end || *at != byte) return false;
    ++at;
    return true;
  }

  // The four digits after \u, or -1.
  int32_t hexadecimal() {
    if (end - at < 4) return -1;
    int32_t value = 0;
    for (int i = 0; i < 4; ++i, ++at) {
      const uint8_t c = *at;
      const int digit = between(c, '0', '9')   ? c - '0'
                        : between(c, 'a', 'f') ? c - 'a' + 10
                        : between(c, 'A', 'F') ? c - 'A' + 10
                                               : -1;
      if (digit < 0) return -1;
      value = value * 16 + digit;
    }
    return value;
  }

  template <bool kWrite>
  MEGALM_INLINE void put(uint32_t code) {
    if (!kWrite) return;
    if (code < 0x80) {
      *out++ = uint8_t(code);
      return;
    }
    ascii = false;
    if (code < 0x800) {
      *out++ = uint8_t(0xC0 | (code >> 6));
    } else {
      if (code < 0x10000) {
        *out++ = uint8_t(0xE0 | (code >> 12));
      } else {
        *out++ = uint8_t(0xF0 | (code >> 18));
        *out++ = uint8_t(0x80 | ((code >> 12) & 63));
      }
      *out++ = uint8_t(0x80 | ((code >> 6) & 63));
    }
    *out++ = uint8_t(0x80 | (code & 63));
  }

  // What follows a backslash. An escape is never shorter than what it stands for.
  template <bool kWrite>
  bool escape() {
    if (at == end) return false;
    switch (*at++) {
      case '"':
        put<kWrite>('"');
        return true;
      case '\\':
        put<kWrite>('\\');
        return true;
      case '/':
        put<kWrite>('/');
        return true;
      case 'b':
        put<kWrite>('\b');
        return true;
      case 'f':
        put<kWrite>('\f');
        return true;
      case 'n':
        put<kWrite>('\n');
        return true;
      case 'r':
        put<kWrite>('\r');
        return true;
      case 't':
        put<kWrite>('\t');
        return true;
      case 'u':
        break;
      default:
        return false;
    }
    const int32_t first = hexadecimal();
    if (first < 0) return false;
    if (!kWrite || first < 0xD800 || first > 0xDFFF) {
      put<kWrite>(uint32_t(first));
      return true;
    }
    if (first > 0xDBFF || !take('\\') || !take('u')) return false;
    const int32_t second = hexadecimal();
    if (second < 0xDC00 || second > 0xDFFF) return false;
    put<kWrite>(0x10000u + (uint32_t(first - 0xD800) << 10) + uint32_t(second - 0xDC00));
    return true;
  }

  // After the opening quote, to behind the closing one.
  template <bool kWrite>
  bool string() {
    for (;;) {
      while (end - at >= kBlock) {
        const int count = plain(at);
        if (kWrite) {
          memcpy(out, at, kBlock);  // text has room: it is never longer than what was read
          out += count;
        }
        at += count;
        if (count < kBlock) break;
      }
      while (at < end && !is_special(*at)) {
        if (kWrite) *out++ = *at;
        ++at;
      }
      if (at == end || *at < 0x20) return false;
      if (*at == '"') {
        ++at;
        return true;
      }
      if (*at == '\\') {
        ++at;
        if (!escape<kWrite>()) return false;
        continue;
      }
      ascii = false;
      do {
        const int count = character(at, end);
        if (count == 0) return false;
        for (int i = 0; i < count; ++i, ++at)
          if (kWrite) *out++ = *at;
      } while (at < end && *at >= 0x80);
    }
  }

  bool digits() {
    const uint8_t* begin = at;
    while (at < end && between(*at, '0', '9')) ++at;
    return at > begin && at - begin <= kLongest;
  }

  bool number() {
    if (at < end && *at == '-') ++at;
    if (at == end) return false;
    if (*at == '0')
      ++at;
    else if (!digits())
      return false;
    if (at < end && *at == '.') {
      ++at;
      if (!digits()) return false;
    }
    if (at < end && (*at == 'e' || *at == 'E')) {
      ++at;
      if (at < end && (*at == '+' || *at == '-')) ++at;
      if (!digits()) return false;
    }
    return true;
  }

  bool word(const char* letters, int64_t count) {
    if (end - at < count || memcmp(at, letters, size_t(count)) != 0) return false;
    at += count;
    return true;
  }

  bool value(int depth) {
    if (at == end || depth > kDeepest) return false;
    switch (*at) {
      case '"':
        ++at;
        return string<false>();
      case 't':
        return word("true", 4);
      case 'f':
        return word("false", 5);
      case 'n':
        return word("null", 4);
      case '[':
      case '{':
        return inside(depth);
      default:
        return number();
    }
  }

  bool inside(int depth) {
    const bool object = *at++ == '{';
    const uint8_t close = object ? '}' : ']';
    space();
    if (take(close)) return true;
    for (;;) {
      if (object) {
        if (!take('"') || !string<false>()) return false;
        space();
        if (!take(':')) return false;
        space();
      }
      if (!value(depth + 1)) return false;
      space();
      if (take(close)) return true;
      if (!take(',')) return false;
      space();
    }
  }

  // The whole line: an object with one text under the key.
  bool line(const uint8_t* field, int64_t field_size) {
    bool found = false, text_is_ascii = true;
    space();
    if (!take('{')) return false;
    space();
    for (;;) {
      if (!take('"')) return false;
      const uint8_t* key = at;
      if (!string<false>()) return false;
      const int64_t size = at - 1 - key;
      if (memchr(key, '\\', size_t(size)) != nullptr) return false;
      space();
      if (!take(':')) return false;
      space();
      if (size == field_size && memcmp(key, field, size_t(size)) == 0) {
        if (found || !take('"')) return false;
        ascii = true;
        if (!string<true>()) return false;
        found = true;
        text_is_ascii = ascii;
      } else if (!value(1)) {
        return false;
      }
      space();
      if (take('}')) break;
      if (!take(',')) return false;
      space();
    }
    space();
    ascii = text_is_ascii;
    return found && at == end;
  }
};

bool is_blank(const uint8_t* at, const uint8_t* end) {
  for (; at < end; ++at)
    if (*at != ' ' && !between(*at, '\t', '\r')) return false;
  return true;
}

}  // namespace

void json_lines(const JsonLines& args) {
  const uint8_t* at = args.data;
  const uint8_t* end = args.data + args.size;
  uint8_t* out = args.text;
  int64_t count = 0;
  for (; at < end; ++count) {
    const void* newline = memchr(at, '\n', size_t(end - at));
    const uint8_t* next = newline ? static_cast<const uint8_t*>(newline) + 1 : end;
    Reader reader{at, next, out};
    LineKind kind = LineKind::kOther;
    if (reader.line(args.field, args.field_size)) {
      kind = reader.ascii ? LineKind::kAscii : LineKind::kText;
      out = reader.out;
    } else if (is_blank(at, next)) {
      kind = LineKind::kBlank;
    }
    args.begins[count] = at - args.data;
    args.ends[count] = out - args.text;
    args.kinds[count] = uint8_t(kind);
    at = next;
  }
  *args.lines = count;
}

}  // namespace megalm::MEGALM_ISA
