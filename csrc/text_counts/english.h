// Words of English text as spaCy's rules make them (https://spacy.io/usage/linguistic-features#how-tokenizer-works).
#pragma once

#include "text_counts/characters.h"

namespace megalm::MEGALM_ISA {

class English {
 public:
  explicit English(const WordRules& rules) : rules_(rules), own_(rules.classes, rules.codes) {
    table_.begin(rules.exceptions + 1);
    for (int64_t i = 0; i < rules.exceptions; ++i) {
      put(i);
      *table_.find(own_.hash(0, own_.size()), own_.size(), int32_t(i)) = int32_t(i);
      if (own_.size() > longest_) longest_ = own_.size();
    }
    for (int64_t unit = 0, first = 0; unit < rules.units; ++unit) {
      if (rules.unit_ends[unit] - first > longest_unit_) longest_unit_ = rules.unit_ends[unit] - first;
      first = rules.unit_ends[unit];
    }
    starts_.begin(rules.exceptions + 1);
    // An exception that would be split is looked for among the words, too; as how many words it would be found there.
    for (int64_t i = 0; i < rules.exceptions; ++i) {
      put(i);
      words_.clear();
      const bool split = take(own_, {0, own_.size()}, false);
      const int64_t count = split ? words_.size : 0;
      joined_.push(int32_t(patterns_.size));
      if (count > 0) starts_.add(own_.hash(0, words_[0].end), words_[0].end);
      for (int64_t word = 0; word < count; ++word) patterns_.push(uint8_t(words_[word].size()));
      if (count > most_words_) most_words_ = count;
    }
    joined_.push(int32_t(patterns_.size));
  }

  // The words of characters [begin, end), one after another. With `blanks` also white space, but for single blanks, as
  // a word.
  void split(const Characters& text, int64_t begin, int64_t end, bool blanks, Buffer<Span>& out) {
    words_.clear();
    odd_.clear();
    int64_t at = begin;
    while (at < end) {
      int64_t stop = at;
      if (text.is(at, kSpace)) {
        while (stop < end && text.is(stop, kSpace)) ++stop;
        const int64_t first = at + (at > begin && text.code[at] == ' ');  // that blank belongs to the word before it
        if (blanks && first < stop) words_.push({first, stop});
        at = stop;
        continue;
      }
      uint32_t all = ~0u;
      for (; stop < end && !text.is(stop, kSpace); ++stop) all &= text.kind[stop];
      if ((all & kPlain) != 0 && (stop - at > longest_ || table_.look(text.hash(at, stop), stop - at) < 0)) {
        words_.push({at, stop});
      } else {
        odd_.push(words_.size);
        take(text, {at, stop}, true);
        odd_.push(words_.size);
      }
      at = stop;
    }
    find_joined(text);
    rejoin(out);
  }

 private:
  struct Match {
    int64_t begin, end;  // words
    int32_t found;
  };

  // Makes an exception the text of own_.
  void put(int64_t i) {
    own_.clear();
    const int64_t first = i > 0 ? rules_.exception_ends[i - 1] : 0;
    own_.reserve(rules_.exception_ends[i] - first);
    for (int64_t at = first; at < rules_.exception_ends[i]; ++at) own_.push(rules_.exception_codes[at]);
  }

  MEGALM_INLINE int32_t exception(const Characters& t, Span s) const {
    if (s.size() > longest_) return -1;
    return table_.look(t.hash(s.begin, s.end), s.size());
  }

  // Length of the prefix, or 0.
  static int64_t prefix(const Characters& t, Span s) {
    if (s.size() == 0) return 0;
    const uint32_t code = t.code[s.begin];
    if (t.is(s.begin, kPrefix)) return 1;
    const int64_t next = s.begin + 1;
    if (code == '+') return next < s.end && digit(t, next) ? 0 : 1;
    if (code == '.') {
      const int64_t points = run_of_points(t, s.begin, s.end);
      return points >= 2 ? points : 0;
    }
    if (code == 'U' && s.size() >= 3 && t.code[next] == 'S' && t.code[next + 1] == '$') return 3;
    if ((code == 'C' || code == 'A') && s.size() >= 2 && t.code[next] == '$') return 2;
    return 0;
  }

  // Of all the suffixes that end the run, the longest.
  int64_t suffix(const Characters& t, Span s) const {
    const int64_t size = s.size();
    if (size == 0) return 0;
    const int64_t last = s.end - 1;
    const uint32_t code = t.code[last];
    int64_t found = t.is(last, kSuffix) ? 1 : 0;
    const auto before = [&](int64_t at, uint32_t bits) { return at > s.begin && t.is(at - 1, bits); };
    const auto digit_before = [&](int64_t at) { return at > s.begin && digit(t, at - 1); };
    if (code == 0x2026 && size >= 2 && t.code[last - 1] == 0x2026) found = 2;
    if (code == '.') {
      int64_t points = 1;
      while (points < size && t.code[last - points] == '.') ++points;
      if (points >= 2) {
        found = points;
      } else if (before(last, kBeforePoint) || (before(last, kUpper) && before(last - 1, kUpper))) {
        found = 1;
      } else if (size >= 3 && t.code[last - 2] == 0xB0) {
        const uint32_t scale = t.code[last - 1] | 0x20u;
        if (t.code[last - 1] < 0x80 && (scale == 'f' || scale == 'c' || scale == 'k')) found = 1;
      }
      return found;
    }
    if ((code == 's' || code == 'S') && size >= 2 && (t.code[last - 1] == '\'' || t.code[last - 1] == 0x2019)) return 2;
    if (code == '+' && digit_before(last)) return 1;
    if (t.is(last, kCurrency)) {
      if (found < 1 && digit_before(last)) found = 1;
      if (code == '$' && size >= 3) {
        if (t.code[last - 1] == 'S' && t.code[last - 2] == 'U' && digit_before(last - 2)) found = 3;
        if ((t.code[last - 1] == 'C' || t.code[last - 1] == 'A') && digit_before(last - 1) && found < 2) found = 2;
      }
      return found;
    }
    bool digits = false;  // most runs have none before what could be a unit
    for (int64_t at = last - 1; at >= s.begin && last - at <= longest_unit_; --at) digits |= digit(t, at);
    int64_t first = 0;
    for (int64_t unit = 0; digits && unit < rules_.units; ++unit) {
      const int64_t stop = rules_.unit_ends[unit], length = stop - first;
      if (rules_.unit_codes[stop - 1] == code && length > found && length < size && digit_before(s.end - length)) {
        int64_t same = 1;
        while (same < length && t.code[last - same] == rules_.unit_codes[stop - 1 - same]) ++same;
        if (same == length) found = length;
      }
      first = stop;
    }
    return found;
  }

  static bool digit(const Characters& t, int64_t at) { return t.code[at] >= '0' && t.code[at] <= '9'; }

  static int64_t run_of_points(const Characters& t, int64_t at, int64_t end) {
    int64_t stop = at;
    while (stop < end && t.code[stop] == '.') ++stop;
    return stop - at;
  }

  // Length of the infix that begins at this place, or 0.
  static int64_t infix(const Characters& t, Span s, int64_t at) {
    const uint32_t code = t.code[at];
    if (code == '.') {
      const int64_t points = run_of_points(t, at, s.end);
      if (points >= 2) return points;
    }
    if (code == 0x2026 || t.is(at, kIcon)) return 1;
    if (at == s.begin) return 0;  // all others stand between two
    const int64_t last = at - 1;
    const auto letter = [&](int64_t place) { return place < s.end && t.is(place, kEnglishLetter); };
    if (at + 1 < s.end) {
      const int64_t next = at + 1;
      if ((code == '+' || code == '-' || code == '*' || code == '^') && digit(t, last) &&
          (digit(t, next) || t.code[next] == '-')) {
        return 1;
      }
      if (code == '.' && t.is(last, kLower | kQuote) && t.is(next, kUpper | kQuote)) return 1;
      if (code == ',' && t.is(last, kEnglishLetter) && letter(next)) return 1;
    }
    if (t.is(last, kEnglishLetter) || digit(t, last)) {
      if (code == '-' || code == 0x2013 || code == 0x2014 || code == '~') {
        if (letter(at + 1)) return 1;
        const auto same = [&](int64_t place) { return place < s.end && t.code[place] == code; };
        if (code == '-' && same(at + 1)) {
          if (letter(at + 2)) return 2;
          if (same(at + 2) && letter(at + 3)) return 3;
        }
        if (code == 0x2014 && same(at + 1) && letter(at + 2)) return 2;
      }
      if ((code == ':' || code == '<' || code == '>' || code == '=' || code == '/') && letter(at + 1)) return 1;
    }
    return 0;
  }

  // The words of one run; whether it was split in any way other than by an exception.
  bool take(const Characters& t, Span s, bool with_exceptions) {
    suffixes_.clear();
    int64_t before = 0;
    bool split = false;
    const auto known = [&](Span part) { return with_exceptions && part.size() > 0 && exception(t, part) >= 0; };
    while (s.size() > 0 && s.size() != before) {
      if (known(s)) break;
      before = s.size();
      const int64_t front = prefix(t, s);
      if (front > 0 && known({s.begin + front, s.end})) {
        words_.push({s.begin, s.begin + front});
        s.begin += front;
        break;
      }
      const int64_t back = suffix(t, {s.begin + front, s.end});
      if (back > 0 && known({s.begin, s.end - back})) {
        suffixes_.push({s.end - back, s.end});
        s.end -= back;
        break;
      }
      split |= front > 0 || back > 0;
      if (front > 0) words_.push({s.begin, s.begin + front});
      if (back > 0) suffixes_.push({s.end - back, s.end});
      s = {s.begin + front, s.end - back};
    }
    if (s.size() > 0) split |= take_middle(t, s, with_exceptions);
    for (int64_t i = suffixes_.size - 1; i >= 0; --i) words_.push(suffixes_[i]);
    return split;
  }

  // What is left when prefixes and suffixes are off.
  bool take_middle(const Characters& t, Span s, bool with_exceptions) {
    const int32_t found = with_exceptions ? exception(t, s) : -1;
    if (found >= 0) {
      put_pieces(found, s.begin, words_);
      return false;
    }
    int64_t start = s.begin;
    bool split = false;
    const bool whole = is_address(t, s);
    for (int64_t at = s.begin; !whole && at < s.end;) {
      const int64_t length = infix(t, s, at);
      if (length == 0) {
        ++at;
        continue;
      }
      split = true;
      if (at > s.begin) {
        if (at > start) words_.push({start, at});
        words_.push({at, at + length});
        start = at + length;
      }
      at += length;
    }
    if (start < s.end) words_.push({start, s.end});
    return split;
  }

  // Whether a run is an address of the web: [scheme://] [user@] host [:port] [/path], with a host by name or number.
  static bool is_address(const Characters& t, Span s) {
    int64_t point = s.begin;
    while (point < s.end && t.code[point] != '.') ++point;
    if (point == s.end) return false;
    if (is_host(t, s)) return true;
    int64_t at = s.begin;
    while (at < s.end && (t.is(at, kWordCharacter) || t.code[at] == '+' || t.code[at] == '-' || t.code[at] == '.'))
      ++at;
    if (at - s.begin >= 2 && s.end - at > 3 && t.code[at] == ':' && t.code[at + 1] == '/' && t.code[at + 2] == '/') {
      if (is_host(t, {at + 3, s.end})) return true;
    }
    for (at = s.begin + 1; at < s.end; ++at) {
      if (t.code[at] == '@' && is_host(t, {at + 1, s.end})) return true;
    }
    return false;
  }

  static bool is_host(const Characters& t, Span s) { return is_numbered_host(t, s) || is_named_host(t, s); }

  static bool ends_host(const Characters& t, int64_t at, int64_t end) {
    if (at == end) return true;
    if (t.code[at] == ':') {
      int64_t stop = at + 1;
      while (stop < end && t.is(stop, kDecimal)) ++stop;
      if (stop - at - 1 < 2 || stop - at - 1 > 5) return false;
      at = stop;
    }
    return at == end || t.code[at] == '/' || t.code[at] == '?' || t.code[at] == '#';
  }

  static bool is_named_host(const Characters& t, Span s) {
    int64_t label = s.begin, labels = 0;
    for (int64_t at = s.begin; at < s.end; ++at) {
      if (t.code[at] == '.') {
        const int64_t size = at - label;
        if (size < 1 || size > 64 || !t.is(label, kHost) || !t.is(at - 1, kHost)) break;
        ++labels;
        label = at + 1;
      } else if (!t.is(at, kHost) && t.code[at] != '_' && t.code[at] != '-') {
        break;
      }
    }
    if (labels == 0) return false;
    int64_t stop = label;
    while (stop < s.end && t.is(stop, kLower)) ++stop;
    return stop - label >= 2 && stop - label <= 63 && ends_host(t, stop, s.end);
  }

  // Four numbers, of an address that is not for private use.
  static bool is_numbered_host(const Characters& t, Span s) {
    int64_t at = s.begin, parts[4];
    for (int part = 0; part < 4; ++part) {
      int64_t value = 0, digits = 0;
      const int64_t first = at;
      while (at < s.end && digit(t, at) && digits < 4) {
        value = 10 * value + int64_t(t.code[at++] - '0');
        ++digits;
      }
      const bool outer = part == 0 || part == 3;
      if (digits == 0 || digits > 3 || value > (part == 0 ? 223 : part == 3 ? 254 : 255)) return false;
      if (outer && t.code[first] == '0') return false;
      if (!outer && digits == 3 && t.code[first] == '0') return false;
      parts[part] = value;
      if (part < 3 && (at == s.end || t.code[at++] != '.')) return false;
    }
    if (parts[0] == 10 || parts[0] == 127) return false;
    if ((parts[0] == 169 && parts[1] == 254) || (parts[0] == 192 && parts[1] == 168)) return false;
    if (parts[0] == 172 && parts[1] >= 16 && parts[1] <= 31) return false;
    return ends_host(t, at, s.end);
  }

  // Words one after another, also with a blank between them, that are what an exception is split into elsewhere. None
  // of these has words of letters alone, so they are looked for around words that were made in a less simple way.
  void find_joined(const Characters& t) {
    matches_.clear();
    int64_t next = 0;
    for (int64_t run = 0; run < odd_.size; run += 2) {
      int64_t i = odd_[run] - most_words_ + 1;
      if (i < next) i = next;
      for (; i < odd_[run + 1]; ++i) {
        if (!starts_.has(t.hash(words_[i].begin, words_[i].end), words_[i].size())) continue;
        uint64_t hash = 0;
        int64_t length = 0;
        for (int64_t j = i; j < words_.size && j - i < most_words_; ++j) {
          const Span word = words_[j];
          if (length + word.size() > longest_ || (j > i && !is_beside(t, words_[j - 1].end, word.begin))) break;
          length += word.size();
          hash = hash * t.powers[word.size()] + t.hash(word.begin, word.end);
          if (j == i) continue;  // an exception that is split is at least two words
          const int32_t found = table_.look(hash, length);
          if (found >= 0 && is_pattern(found, i, j + 1)) matches_.push({i, j + 1, found});
        }
      }
      next = odd_[run + 1];
    }
  }

  static bool is_beside(const Characters& t, int64_t end, int64_t begin) {
    return begin == end || (begin == end + 1 && t.code[end] == ' ');
  }

  // Such words become what the exception says, where nothing is between them. Where they overlap, the longest is chosen
  // first, then the first; those that are not chosen keep others from their words all the same.
  void rejoin(Buffer<Span>& out) {
    int64_t word = 0;
    for (int64_t first = 0; first < matches_.size;) {
      int64_t last = first, end = matches_[first].end;
      for (++last; last < matches_.size && matches_[last].begin < end; ++last) {
        if (matches_[last].end > end) end = matches_[last].end;
      }
      const int64_t begin = matches_[first].begin;
      choose(first, last, begin, end);
      while (word < begin) out.push(words_[word++]);
      while (word < end) {
        const int32_t match = seen_[word - begin];
        if (match < 0 || !is_one(matches_[match])) {
          out.push(words_[word++]);
          continue;
        }
        put_pieces(matches_[match].found, words_[word].begin, out);
        word = matches_[match].end;
      }
      first = last;
    }
    while (word < words_.size) out.push(words_[word++]);
  }

  // Of words [begin, end), the number of the match that begins there, or something below 0.
  void choose(int64_t first, int64_t last, int64_t begin, int64_t end) {
    seen_.clear();
    for (int64_t i = begin; i < end; ++i) seen_.push(-1);
    for (int64_t length = most_words_; length > 0; --length) {
      for (int64_t i = first; i < last; ++i) {
        const Match& m = matches_[i];
        if (m.end - m.begin != length) continue;
        const bool free = seen_[m.begin - begin] == -1 && seen_[m.end - 1 - begin] == -1;
        for (int64_t word = m.begin; word < m.end; ++word) {
          if (seen_[word - begin] == -1) seen_[word - begin] = -2;
        }
        if (free) seen_[m.begin - begin] = int32_t(i);
      }
    }
  }

  bool is_one(const Match& m) const {
    for (int64_t word = m.begin + 1; word < m.end; ++word) {
      if (words_[word].begin != words_[word - 1].end) return false;
    }
    return true;
  }

  void put_pieces(int32_t found, int64_t at, Buffer<Span>& out) const {
    for (int64_t i = found > 0 ? rules_.piece_ends[found - 1] : 0; i < rules_.piece_ends[found]; ++i) {
      out.push({at, at + rules_.pieces[i]});
      at += rules_.pieces[i];
    }
  }

  bool is_pattern(int32_t found, int64_t begin, int64_t end) const {
    const int64_t first = joined_[found];
    if (joined_[found + 1] - first != end - begin) return false;
    for (int64_t i = begin; i < end; ++i) {
      if (words_[i].size() != patterns_[first + i - begin]) return false;
    }
    return true;
  }

  WordRules rules_;
  Characters own_;
  HashTable table_;
  HashTable starts_;  // the first words of exceptions that are split elsewhere
  int64_t longest_ = 0, most_words_ = 0, longest_unit_ = 0;
  Buffer<int32_t> joined_, seen_;
  Buffer<int64_t> odd_;  // where runs of such words begin and end
  Buffer<uint8_t> patterns_;
  Buffer<Span> words_, suffixes_;
  Buffer<Match> matches_;
};

}  // namespace megalm::MEGALM_ISA
