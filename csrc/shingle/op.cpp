#include "shingle/op.h"

#include <stdlib.h>
#include <string.h>

#include "common/mix.h"

namespace megalm::MEGALM_ISA {
namespace {

// Bytes of the character that begins with this byte, as far as the text goes.
MEGALM_INLINE int length_of(uint8_t byte, int64_t left) {
  const int length = byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
  return length < left ? length : int(left);
}

// The code of the character of so many bytes.
MEGALM_INLINE uint32_t code_of(const uint8_t* at, int length) {
  uint32_t code = length == 1 ? 0 : uint32_t(at[0] & (0xFF >> (length + 1)));
  for (int i = 1; i < length; ++i) code = (code << 6) | (at[i] & 63u);
  return code;
}

// A word that goes on: what its bytes add up to, and the power for the next one.
struct Word {
  uint64_t sum = 0, power = kGolden;

  MEGALM_INLINE void add(uint64_t letter) {
    sum += (letter + 1) * power;
    power *= kGolden;
  }
  MEGALM_INLINE bool begun() const { return power != kGolden; }
};

// Goes on from byte `at`, which is not ASCII, with the word before it, to a byte of ASCII behind one that separates
// words, or to the end; returns where that is. The hashes of the words that end before it are added to `out`.
const uint8_t* hash_beyond_ascii(const uint8_t* at, const uint8_t* end, const Shingles& a, Word word, uint64_t*& out) {
  uint64_t* found = out;
  const uint8_t *letters = a.letters, *classes = a.classes;
  const int64_t codes = a.codes;
  bool alone = false, joins = false;  // the word is none of letters; the next character that stands alone joins it
  const auto end_word = [&] {
    if (word.begun()) *found++ = mix_bits(word.sum);
    word = Word();
    alone = joins = false;
  };
  while (at < end) {
    if (*at < 0x80) {
      uint64_t letter = letters[*at];
      if (letter == 0) {
        end_word();
        if (++at < end && *at < 0x80) break;
        continue;
      }
      if (alone) end_word();
      joins = false;
      do {
        word.add(letter);
      } while (++at < end && *at < 0x80 && (letter = letters[*at]) != 0);
      continue;
    }
    const int length = length_of(*at, end - at);
    const uint32_t code = length == 2 ? (uint32_t(at[0] & 31u) << 6) | (at[1] & 63u) : code_of(at, length);
    uint8_t kind = int64_t(code) < codes ? classes[code] : uint8_t(kLetter);
    if (length == 2 && kind == kLetter && !alone) {
      joins = false;
      word.add(letters[at[0]]);
      word.add(letters[at[1]]);
    } else {
      if (length < 3 && (kind == kAlone || kind == kLeading)) kind = kLetter;
      const bool goes_on = kind == kMark || kind == kJoiner || (kind == kAlone && joins) || (kind == kLetter && !alone);
      if (!goes_on) end_word();
      if (kind == kSeparator) {
        at += length;
        continue;
      }
      if (kind == kAlone || kind == kLeading) alone = true;
      joins = kind == kLeading || kind == kJoiner;
      for (int byte = 0; byte < length; ++byte) word.add(letters[at[byte]]);
    }
    at += length;
  }
  end_word();
  out = found;
  return at;
}

// Hashes of the words of one text; returns how many. `ascii`: the letters, 0 for what is not ASCII.
int64_t hash_words(const uint8_t* at, const uint8_t* end, const uint8_t* ascii, const Shingles& a, uint64_t* out) {
  uint64_t* found = out;
  while (at < end) {
    uint64_t letter = ascii[*at];
    Word word;
    while (letter != 0) {
      word.add(letter);
      if (++at == end) break;
      letter = ascii[*at];
    }
    if (at < end && *at >= 0x80) {
      at = hash_beyond_ascii(at, end, a, word, found);
      continue;
    }
    if (word.begun()) *found++ = mix_bits(word.sum);
    at += at < end;  // what separates words
  }
  return found - out;
}

// Runs of `words` hashes in place: each entry becomes the hash of the run that begins there.
int64_t hash_runs(uint64_t* hashes, int64_t count, int64_t words) {
  if (count == 0) return 0;
  const int64_t runs = count >= words ? count - words + 1 : 1;
  for (int64_t i = 0; i < runs; ++i) {
    uint64_t sum = 0;
    for (int64_t j = 0; j < words; ++j) sum = sum * kGolden + (i + j < count ? hashes[i + j] : 0);
    hashes[i] = mix_bits(sum);
  }
  return runs;
}

constexpr int64_t kSmall = 48;  // entries up to which insertion is the fastest sort
constexpr int kMostBits = 20;   // of the values that buckets go by

void insert(uint64_t* values, int64_t count) {
  for (int64_t i = 1; i < count; ++i) {
    const uint64_t value = values[i];
    int64_t j = i;
    for (; j > 0 && values[j - 1] > value; --j) values[j] = values[j - 1];
    values[j] = value;
  }
}

// Bytes from the last to the first: in linear time whatever the values are. Eight moves end where they began.
void sort_bytes(uint64_t* values, uint64_t* spare, int64_t count) {
  int64_t places[8][256] = {};
  for (int64_t i = 0; i < count; ++i)
    for (int byte = 0; byte < 8; ++byte) ++places[byte][(values[i] >> (8 * byte)) & 255];
  for (int byte = 0; byte < 8; ++byte) {
    int64_t sum = 0;
    for (int64_t& place : places[byte]) {
      const int64_t here = place;
      place = sum;
      sum += here;
    }
    for (int64_t i = 0; i < count; ++i) spare[places[byte][(values[i] >> (8 * byte)) & 255]++] = values[i];
    uint64_t* moved = spare;
    spare = values;
    values = moved;
  }
}

int bucket_bits(int64_t count) {
  int bits = 1;
  while (bits < kMostBits && (int64_t(8) << bits) <= count) ++bits;
  return bits;
}

// Where the sorted values are: in place, or in spare. Hashes spread evenly over buckets by their first bits, so that a
// bucket holds about four; one that holds many, of a text that repeats itself, is sorted by bytes. `ends` has room for
// 2^bucket_bits(count).
const uint64_t* sort(uint64_t* values, uint64_t* spare, int64_t* ends, int64_t count) {
  if (count <= kSmall) {
    insert(values, count);
    return values;
  }
  const int bits = bucket_bits(count), shift = 64 - bits;
  const int64_t buckets = int64_t(1) << bits;
  for (int64_t bucket = 0; bucket < buckets; ++bucket) ends[bucket] = 0;
  for (int64_t i = 0; i < count; ++i) ++ends[values[i] >> shift];
  int64_t sum = 0;
  for (int64_t bucket = 0; bucket < buckets; ++bucket) {
    const int64_t here = ends[bucket];
    ends[bucket] = sum;
    sum += here;
  }
  for (int64_t i = 0; i < count; ++i) spare[ends[values[i] >> shift]++] = values[i];
  int64_t begin = 0;
  for (int64_t bucket = 0; bucket < buckets; ++bucket) {
    const int64_t size = ends[bucket] - begin;
    if (size <= kSmall)
      insert(spare + begin, size);
    else
      sort_bytes(spare + begin, values + begin, size);
    begin = ends[bucket];
  }
  return spare;
}

MEGALM_INLINE uint8_t* put(uint32_t code, uint8_t* out) {
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
      *out++ = uint8_t(0xF0 | (code >> 18));
      *out++ = uint8_t(0x80 | ((code >> 12) & 63));
    }
    *out++ = uint8_t(0x80 | ((code >> 6) & 63));
  }
  *out++ = uint8_t(0x80 | (code & 63));
  return out;
}

// Returns the end of what was written; nullptr at a special character.
uint8_t* lower(const uint8_t* at, const uint8_t* end, const uint32_t* small, int64_t codes, uint8_t* out) {
  while (at < end) {
    uint64_t eight;
    while (end - at >= 8) {
      memcpy(&eight, at, 8);
      if (eight & 0x8080808080808080u) break;
      memcpy(out, &eight, 8);
      at += 8;
      out += 8;
    }
    while (at < end && *at < 0x80) *out++ = *at++;
    while (at < end && *at >= 0x80) {
      const int length = length_of(*at, end - at);
      const uint32_t code = code_of(at, length);
      if (length > 1 && int64_t(code) < codes && small[code] != code) {
        if (small[code] == kSpecial) return nullptr;
        out = put(small[code], out);
        at += length;
      } else {
        for (int i = 0; i < length; ++i) *out++ = *at++;
      }
    }
  }
  return out;
}

}  // namespace

void lower_case(const LowerCase& a) {
  uint8_t* out = a.out;
  int64_t begin = 0;
  for (int64_t text = 0; text < a.texts; ++text) {
    const uint8_t *from = a.data + begin, *end = a.data + a.ends[text];
    a.special[text] = 0;
    if (a.ascii[text]) {
      if (end > from) memcpy(out, from, size_t(end - from));
      out += end - from;
    } else {
      uint8_t* written = lower(from, end, a.small, a.codes, out);
      a.special[text] = written == nullptr;
      if (written != nullptr) out = written;
    }
    begin = a.ends[text];
    a.ends_out[text] = out - a.out;
  }
}

void shingles(const Shingles& a) {
  int64_t longest = 0, begin = 0;
  for (int64_t text = 0; text < a.texts; ++text) {
    if (a.ends[text] - begin > longest) longest = a.ends[text] - begin;
    begin = a.ends[text];
  }
  const int64_t most = longest / 2 + 1, buckets = int64_t(1) << bucket_bits(most);
  uint64_t* spare = static_cast<uint64_t*>(malloc(size_t(most) * sizeof(uint64_t)));
  int64_t* bucket_ends = static_cast<int64_t*>(malloc(size_t(buckets) * sizeof(int64_t)));
  *a.ok = spare != nullptr && bucket_ends != nullptr;
  uint8_t ascii[256] = {};
  memcpy(ascii, a.letters, 128);
  int64_t found = begin = 0;
  a.offsets[0] = 0;
  for (int64_t text = 0; *a.ok && text < a.texts; ++text) {
    uint64_t* values = a.values + found;
    const int64_t count = hash_words(a.data + begin, a.data + a.ends[text], ascii, a, values);
    const int64_t runs = hash_runs(values, count, a.words);
    const uint64_t* sorted = sort(values, spare, bucket_ends, runs);
    int64_t kept = 0;
    for (int64_t i = 0; i < runs; ++i)
      if (i == 0 || sorted[i] != values[kept - 1]) values[kept++] = sorted[i];
    found += kept;
    begin = a.ends[text];
    a.offsets[text + 1] = found;
  }
  free(bucket_ends);
  free(spare);
}

}  // namespace megalm::MEGALM_ISA
