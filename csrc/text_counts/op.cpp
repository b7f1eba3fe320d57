#include "text_counts/op.h"

#include "text_counts/english.h"

namespace megalm::MEGALM_ISA {
namespace {

constexpr uint32_t kEllipsis = 0x2026, kBullet = 0x2022;

struct Repeats {
  int64_t parts = 0, repeated = 0, characters = 0;
};

// One text's counts, in the order of op.h.
class Counter {
 public:
  explicit Counter(const TextCounts& args)
      : args_(args),
        text_(args.classes, args.codes),
        english_({args.classes, args.codes, args.exception_codes, args.exception_ends, args.exceptions, args.pieces,
                  args.piece_ends, args.unit_codes, args.unit_ends, args.units}) {
    Characters word(args.classes, args.codes);
    stops_.begin(args.stops + 1);
    for (int64_t i = 0, at = 0; i < args.stops; ++i) {
      word.clear();
      word.reserve(args.stop_ends[i] - at);
      for (; at < args.stop_ends[i]; ++at) word.push(args.stop_codes[at]);
      stops_.find(word.hash(0, word.size()), word.size(), int32_t(i));
      stop_seen_.push(-1);
    }
  }

  void count(int64_t number, const uint8_t* begin, const uint8_t* end, int64_t* counts) {
    text_.decode(begin, end);
    for (int i = 0; i < kTextCounts; ++i) counts[i] = 0;
    counts[kCharacters] = text_.size();
    count_characters(counts);
    count_lines(counts);
    count_parts(counts);
    count_words(number, counts);
  }

 private:
  // Number signs and ellipses; where lines end, by any character and by a line feed.
  void count_characters(int64_t* counts) {
    line_ends_.clear();
    feeds_.clear();
    int64_t points = 0, last = -1;  // points one after another, up to this place
    for (int64_t i = 0; i < text_.size(); ++i) {
      if (!text_.is(i, kLineBreak | kCounted)) continue;
      const uint32_t code = text_.code[i];
      if (code == '.') {
        points = last == i - 1 ? points + 1 : 1;
        last = i;
        if (points == 3) {
          ++counts[kEllipses];
          points = 0;
        }
      } else if (code == '#') {
        ++counts[kHashes];
      } else if (code == kEllipsis) {
        ++counts[kEllipses];
      } else {
        line_ends_.push(i);
        if (code == '\n') feeds_.push(i);
      }
    }
    counts[kNewlines] = feeds_.size;
  }

  // The part of [begin, end) that is left when white space on both sides is off.
  Span strip(int64_t begin, int64_t end) const {
    while (begin < end && text_.is(begin, kSpace)) ++begin;
    while (begin < end && text_.is(end - 1, kSpace)) --end;
    return {begin, end};
  }

  // Lines by every character that ends one: which begin as an item of a list, which end in an ellipsis.
  void count_lines(int64_t* counts) {
    int64_t at = 0;
    for (int64_t i = 0; i <= line_ends_.size; ++i) {
      const int64_t stop = i < line_ends_.size ? line_ends_[i] : text_.size();
      if (i == line_ends_.size ? at == stop
                               : stop > 0 && at == stop && text_.code[stop] == '\n' && text_.code[stop - 1] == '\r') {
        at = stop + 1;  // nothing behind the last one, or the second half of a pair
        continue;
      }
      const Span line = strip(at, stop);
      ++counts[kLines];
      if (line.size() > 0) {
        const uint32_t first = text_.code[line.begin], last = text_.code[line.end - 1];
        counts[kBulletLines] += first == kBullet || first == '-';
        const bool points =
            line.size() >= 3 && last == '.' && text_.code[line.end - 2] == '.' && text_.code[line.end - 3] == '.';
        counts[kEllipsisLines] += points || last == kEllipsis;
      }
      at = stop + 1;
    }
  }

  // Parts between runs of at least so many line feeds: how many there are, and which were there before.
  Repeats count_repeated(Span all, int64_t least) {
    Repeats found;
    seen_.begin(feeds_.size + 1);
    int64_t start = all.begin;
    for (int64_t i = 0; i < feeds_.size;) {
      const int64_t first = feeds_[i];
      int64_t run = 1;
      while (i + run < feeds_.size && feeds_[i + run] == first + run) ++run;
      i += run;
      if (run < least || first < all.begin || first >= all.end) continue;
      add({start, first}, found);
      start = first + run;
    }
    add({start, all.end}, found);
    return found;
  }

  void add(Span part, Repeats& found) {
    ++found.parts;
    if (!seen_.add(text_.hash(part.begin, part.end), part.size())) {
      ++found.repeated;
      found.characters += part.size();
    }
  }

  void count_parts(int64_t* counts) {
    const Repeats paragraphs = count_repeated(strip(0, text_.size()), 2);
    counts[kParagraphs] = paragraphs.parts;
    counts[kRepeatedParagraphs] = paragraphs.repeated;
    counts[kRepeatedParagraphCharacters] = paragraphs.characters;
    const Repeats runs = count_repeated({0, text_.size()}, 1);
    counts[kRuns] = runs.parts;
    counts[kRepeatedRuns] = runs.repeated;
    counts[kRepeatedRunCharacters] = runs.characters;
    Repeats filled;
    seen_.begin(feeds_.size + 1);
    int64_t at = 0;
    for (int64_t i = 0; i <= feeds_.size; ++i) {
      const int64_t stop = i < feeds_.size ? feeds_[i] : text_.size();
      int64_t first = at;
      while (first < stop && text_.is(first, kSpace)) ++first;
      if (first < stop) {
        add({at, stop}, filled);
        counts[kTerminalLines] += text_.is(stop - 1, kTerminal);
        counts[kShortLines] += stop - at <= args_.short_line;
      }
      at = stop + 1;
    }
    counts[kFilledLines] = filled.parts;
    counts[kRepeatedLineCharacters] = filled.characters;
  }

  void count_words(int64_t number, int64_t* counts) {
    words_.clear();
    english_.split(text_, 0, text_.size(), false, words_);
    const int64_t words = counts[kWords] = words_.size;
    concatenated_.clear();
    joined_.clear();
    places_.clear();
    concatenated_.push(0);
    joined_.push(0);
    places_.push(0);
    for (int64_t i = 0; i < words; ++i) {
      const Span word = words_[i];
      uint32_t all = ~0u, any = 0;
      for (int64_t at = word.begin; at < word.end; ++at) {
        all &= text_.kind[at];
        any |= text_.kind[at];
      }
      if ((all & kSymbol) == 0) {
        ++counts[kPlainWords];
        counts[kPlainWordCharacters] += word.size();
      }
      counts[kAlphabeticWords] += (any & kAlphabetic) != 0;
      const uint64_t hash = text_.hash(word.begin, word.end), power = text_.powers[word.size()];
      const int32_t stop = stops_.look(hash, word.size());
      if (stop >= 0 && stop_seen_[stop] != number) {
        stop_seen_[stop] = number;
        ++counts[kStopWords];
      }
      concatenated_.push(concatenated_[i] * power + hash);
      joined_.push((joined_[i] * kGolden + ' ' + 1) * power + hash);
      places_.push(places_[i] + word.size());
    }
    text_.powers.grow(places_[words] + words);
    for (int64_t n = 2; n <= 4; ++n) counts[kTop2Characters + n - 2] = count_top(n);
    for (int64_t n = 5; n <= 10; ++n) counts[kRepeated5Characters + n - 5] = count_repeated_runs(n);
  }

  // Characters of all places of the run of n words, joined by blanks, that occurs most often; the first of several.
  int64_t count_top(int64_t n) {
    const int64_t runs = words_.size - n + 1;
    if (runs <= 0) return 0;
    seen_.begin(runs);
    often_.clear();
    lengths_.clear();
    for (int64_t i = 0; i < runs; ++i) {
      const int64_t length = places_[i + n] - places_[i] + n;  // with a blank in front
      const uint64_t hash = joined_[i + n] - joined_[i] * text_.powers[length];
      const int32_t entry = *seen_.find(hash, length, int32_t(often_.size));
      if (entry == often_.size) {
        often_.push(1);
        lengths_.push(length - 1);
      } else {
        ++often_[entry];
      }
    }
    int64_t top = 0;
    for (int64_t i = 1; i < often_.size; ++i) {
      if (often_[i] > often_[top]) top = i;
    }
    return often_[top] * lengths_[top];
  }

  // Characters of runs of n words that were there before; what is counted once is no part of another run.
  int64_t count_repeated_runs(int64_t n) {
    const int64_t runs = words_.size - n + 1;
    if (runs <= 0) return 0;
    seen_.begin(runs);
    int64_t characters = 0;
    for (int64_t i = 0; i < runs;) {
      const int64_t length = places_[i + n] - places_[i];
      const uint64_t hash = concatenated_[i + n] - concatenated_[i] * text_.powers[length];
      if (seen_.add(hash, length)) {
        ++i;
      } else {
        characters += length;
        i += n;
      }
    }
    return characters;
  }

  const TextCounts& args_;
  Characters text_;
  English english_;
  HashTable stops_, seen_;
  Buffer<int64_t> stop_seen_, places_, often_, lengths_;
  Buffer<uint64_t> concatenated_, joined_;
  Buffer<int64_t> line_ends_, feeds_;
  Buffer<Span> words_;
};

}  // namespace

void text_counts(const TextCounts& a) {
  Counter counter(a);
  int64_t begin = 0;
  for (int64_t text = 0; text < a.texts; ++text) {
    counter.count(text, a.data + begin, a.data + a.ends[text], a.counts + text * kTextCounts);
    begin = a.ends[text];
  }
}

}  // namespace megalm::MEGALM_ISA
