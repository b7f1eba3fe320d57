#include "clean_lines/op.h"

#include "text_counts/english.h"

namespace megalm::MEGALM_ISA {
namespace {

constexpr const char* kCitations[] = {"[edit]", "[citation needed]"};
constexpr const char* kPhrases[] = {"lorem ipsum",   "javascript",   "terms of use",   "privacy policy",
                                    "cookie policy", "uses cookies", "use of cookies", "use cookies"};
constexpr uint32_t kLoremIpsum = 1, kJavascript = 2;  // the others are policies

// Characters of UTF-8.
uint8_t* encode(uint32_t code, uint8_t* out) {
  if (code < 0x80) {
    *out++ = uint8_t(code);
    return out;
  }
  if (code < 0x800) {
    *out++ = uint8_t(0xC0 | (code >> 6));
  } else {
    if (code < 0x10000) {
      *out++ = uint8_t(0xE0 | (code >> 12));
    } else {
      *out++ = uint8_t(0xF0 | ((code >> 18) & 7));
      *out++ = uint8_t(0x80 | ((code >> 12) & 63));
    }
    *out++ = uint8_t(0x80 | ((code >> 6) & 63));
  }
  *out++ = uint8_t(0x80 | (code & 63));
  return out;
}

// A letter of ASCII in lower case, as Python has it: the sign of Kelvin is a k.
uint32_t lower(uint32_t code) {
  if (code >= 'A' && code <= 'Z') return code + 32;
  return code == 0x212A ? 'k' : code;
}

class Cleaner {
 public:
  explicit Cleaner(const CleanLines& args)
      : args_(args),
        text_(args.classes, args.codes),
        line_(args.classes, args.codes),
        english_({args.classes, args.codes, args.exception_codes, args.exception_ends, args.exceptions, args.pieces,
                  args.piece_ends, args.unit_codes, args.unit_ends, args.units}) {}

  // Returns the end of what was written.
  uint8_t* clean(const uint8_t* begin, const uint8_t* end, uint8_t* out, int64_t* counts) {
    text_.decode(begin, end);
    kept_.clear();
    for (int i = 0; i < kLineCounts; ++i) counts[i] = 0;
    for (int64_t at = 0; at < text_.size();) {
      int64_t stop = at;
      while (stop < text_.size() && !text_.is(stop, kLineBreak)) ++stop;
      if (stays(strip(text_, at, stop), counts)) {
        if (counts[kStayingLines]++ > 0) kept_.push('\n');
        kept_.reserve(kept_.size + line_.size());
        for (int64_t i = 0; i < line_.size(); ++i) kept_.push(line_.code[i]);
      }
      const bool pair = stop + 1 < text_.size() && text_.code[stop] == '\r' && text_.code[stop + 1] == '\n';
      at = stop + (pair ? 2 : 1);
    }
    line_.clear();
    line_.reserve(kept_.size);
    for (int64_t i = 0; i < kept_.size; ++i) line_.push(kept_[i]);
    const Span whole = strip(line_, 0, line_.size());
    for (int64_t i = whole.begin; i < whole.end; ++i) out = encode(line_.code[i], out);
    return out;
  }

 private:
  static Span strip(const Characters& t, int64_t begin, int64_t end) {
    while (begin < end && t.is(begin, kSpace)) ++begin;
    while (begin < end && t.is(end - 1, kSpace)) --end;
    return {begin, end};
  }

  // Puts the line without citations into line_, counts it, and says whether it stays.
  bool stays(Span line, int64_t* counts) {
    int64_t words = 0, longest = 0, word = 0;
    for (int64_t at = line.begin; at < line.end; ++at) {
      word = text_.is(at, kSpace) ? 0 : word + 1;
      words += word == 1;
      if (word > longest) longest = word;
    }
    if (args_.max_word >= 0 && longest > args_.max_word) {
      ++counts[kLongWordLines];
      return false;
    }
    take_off_citations(line);
    const int64_t size = line_.size();
    if (args_.terminal) {
      const uint32_t last = size > 0 ? line_.code[size - 1] : 0;
      const bool ends = last == '.' || last == '?' || last == '!' || last == '"' || last == '\'';
      const bool points = size >= 3 && last == '.' && line_.code[size - 2] == '.' && line_.code[size - 3] == '.';
      if (!ends || points) {
        ++counts[kUnendedLines];
        return false;
      }
    }
    if (words < args_.min_words) {
      ++counts[kFewWordLines];
      return false;
    }
    const uint32_t named = find_phrases();
    counts[kLoremIpsumLines] += (named & kLoremIpsum) != 0;
    if ((named & kJavascript) != 0) {
      ++counts[kJavascriptLines];
      return false;
    }
    bool curly = false;
    for (int64_t i = 0; i < size; ++i) curly |= line_.code[i] == '{';
    counts[kCurlyBracketLines] += curly;
    if (named > kJavascript + kLoremIpsum) {
      ++counts[kPolicyLines];
      return false;
    }
    counts[kSentences] += count_sentences();
    return true;
  }

  void take_off_citations(Span line) {
    line_.clear();
    line_.reserve(line.size());
    for (int64_t at = line.begin; at < line.end;) {
      const int64_t length = text_.code[at] == '[' ? citation(at, line.end) : 0;
      if (length == 0) line_.push(text_.code[at]);
      at += length > 0 ? length : 1;
    }
  }

  // Length of the citation that begins at an opening bracket, or 0.
  int64_t citation(int64_t at, int64_t end) const {
    int64_t stop = at + 1;
    while (stop < end && text_.is(stop, kDecimal)) ++stop;
    if (stop < end && text_.code[stop] == ']') return stop + 1 - at;
    for (const char* mark : kCitations) {
      const int64_t length = int64_t(strlen(mark));
      int64_t same = 0;
      while (same < length && at + same < end && text_.code[at + same] == uint32_t(mark[same])) ++same;
      if (same == length) return length;
    }
    return 0;
  }

  // Which of the phrases the line has, in any case: a bit for each.
  uint32_t find_phrases() const {
    uint32_t found = 0;
    for (int64_t at = 0; at < line_.size(); ++at) {
      const uint32_t first = lower(line_.code[at]);
      if (first < 'c' || first > 'u') continue;
      uint32_t bit = 1;
      for (const char* phrase : kPhrases) {
        if (uint32_t(phrase[0]) == first) {
          int64_t same = 1;
          while (phrase[same] != 0 && at + same < line_.size() &&
                 lower(line_.code[at + same]) == uint32_t(phrase[same])) {
            ++same;
          }
          if (phrase[same] == 0) found |= bit;
        }
        bit *= 2;
      }
    }
    return found;
  }

  // A sentence begins with the first word that is no punctuation behind a mark that ends one.
  int64_t count_sentences() {
    words_.clear();
    english_.split(line_, 0, line_.size(), true, words_);
    int64_t sentences = 1;
    bool ended = false;
    for (int64_t i = 0; i < words_.size; ++i) {
      const Span word = words_[i];
      const bool ends = word.size() == 1 && line_.is(word.begin, kSentenceEnd);
      uint32_t all = kPunctuation;
      for (int64_t at = word.begin; at < word.end; ++at) all &= line_.kind[at];
      if (ended && all == 0 && !ends) {
        ++sentences;
        ended = false;
      } else if (ends) {
        ended = true;
      }
    }
    return sentences;
  }

  const CleanLines& args_;
  Characters text_, line_;
  English english_;
  Buffer<uint32_t> kept_;
  Buffer<Span> words_;
};

}  // namespace

void clean_lines(const CleanLines& a) {
  Cleaner cleaner(a);
  uint8_t* out = a.out;
  int64_t begin = 0;
  for (int64_t text = 0; text < a.texts; ++text) {
    out = cleaner.clean(a.data + begin, a.data + a.ends[text], out, a.counts + text * kLineCounts);
    a.out_ends[text] = out - a.out;
    begin = a.ends[text];
  }
}

}  // namespace megalm::MEGALM_ISA
