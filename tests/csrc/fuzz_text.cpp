// Random inputs to the C++ that reads text, every result checked by its definition, in buffers of
// exactly the size that the contract gives: build with -fsanitize=address,undefined. Arguments: inputs, seed.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "fuzz_counts.h"
#include "json_lines/op.h"
#include "minhash/op.h"
#include "shingle/op.h"
#include "suffix/op.h"

namespace {

using Random = std::mt19937_64;

[[noreturn]] void fail(const char* what, uint64_t input) {
  fprintf(stderr, "input %llu: %s\n", static_cast<unsigned long long>(input), what);
  exit(1);
}

// A heap block of exactly this many elements: one access beyond it is seen.
template <typename T>
std::unique_ptr<T[]> block(size_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

// How many words a text has, by the definition in csrc/shingle/op.h: bytes become (code, length) first, then classes.
int64_t count_words(const uint8_t* data, int64_t size, const uint8_t* letters, const std::vector<uint8_t>& classes) {
  std::vector<uint8_t> kinds;
  for (int64_t i = 0; i < size;) {
    const int64_t whole = data[i] < 0x80 ? 1 : data[i] < 0xE0 ? 2 : data[i] < 0xF0 ? 3 : 4;
    const int64_t length = std::min(whole, size - i);
    uint8_t kind = letters[data[i]] ? megalm::kLetter : megalm::kSeparator;
    if (data[i] >= 0x80) {
      uint32_t code = length == 1 ? 0 : data[i] & (0xFFu >> (length + 1));
      for (int64_t byte = 1; byte < length; ++byte) code = code * 64 + (data[i + byte] & 63u);
      kind = code < classes.size() ? classes[code] : megalm::kLetter;
      if (length < 3 && (kind == megalm::kAlone || kind == megalm::kLeading)) kind = megalm::kLetter;
    }
    kinds.push_back(kind);
    i += length;
  }
  int64_t words = 0;
  for (size_t i = 0; i < kinds.size(); ++i) {
    const uint8_t before = i > 0 ? kinds[i - 1] : uint8_t(megalm::kSeparator);
    size_t base = i;  // what the word before is made of
    while (base > 0 && (kinds[base - 1] == megalm::kMark || kinds[base - 1] == megalm::kJoiner)) --base;
    const uint8_t made_of = base > 0 ? kinds[base - 1] : uint8_t(megalm::kSeparator);
    const bool alone = made_of == megalm::kAlone || made_of == megalm::kLeading;
    switch (kinds[i]) {
      case megalm::kLetter:
        words += before == megalm::kSeparator || alone;
        break;
      case megalm::kAlone:
        words += before != megalm::kLeading && before != megalm::kJoiner;
        break;
      case megalm::kLeading:
        ++words;
        break;
      case megalm::kMark:
      case megalm::kJoiner:
        words += before == megalm::kSeparator;
        break;
      default:
        break;
    }
  }
  return words;
}

void fuzz_shingles(Random& rng, uint64_t input, const uint8_t* letters) {
  const size_t texts = rng() % 5;
  std::vector<int64_t> ends(texts);
  int64_t size = 0;
  for (int64_t& end : ends) end = size += rng() % 3 ? int64_t(rng() % 40) : 0;
  if (rng() % 200 == 0 && texts > 0) ends[texts - 1] = size += 2000;
  const auto data = block<uint8_t>(size_t(size));
  const unsigned kind = rng() % 4;  // any bytes; letters and spaces; nearly only letters; characters of three bytes
  for (int64_t i = 0; i < size; ++i)
    data[i] = kind == 0   ? uint8_t(rng())
              : kind == 3 ? "\xE1\x82\x83 a"[rng() % 5]
                          : " ab."[rng() % (kind == 1 ? 4 : 3)];
  if (kind == 3)  // most of them whole
    for (int64_t i = 0; i + 2 < size; ++i)
      if (data[i] == 0xE1 && rng() % 8)
        data[i + 1] = uint8_t(0x80 | rng() % 64), data[i + 2] = uint8_t(0x80 | rng() % 64);
  std::vector<uint8_t> classes(rng() % 4 ? 0x2000 + rng() % 64 : rng() % 0x1000);
  for (uint8_t& one : classes) one = uint8_t(rng() % 6);
  const int64_t words = 1 + int64_t(rng() % 6);
  const auto values = block<uint64_t>(size_t(size) / 2 + texts + 1);
  const auto offsets = block<int64_t>(texts + 1);
  bool ok = false;
  megalm::shingles({data.get(), ends.data(), int64_t(texts), words, letters, classes.data(), int64_t(classes.size()),
                    values.get(), offsets.get(), &ok});
  if (!ok) fail("shingles: no memory", input);
  int64_t begin = 0;
  for (size_t text = 0; text < texts; ++text) {
    const int64_t count = count_words(data.get() + begin, ends[text] - begin, letters, classes);
    begin = ends[text];
    const int64_t most = count >= words ? count - words + 1 : count > 0;
    const int64_t found = offsets[text + 1] - offsets[text];
    if (found > most || (found == 0) != (most == 0)) fail("shingles: a set of a wrong size", input);
    for (int64_t i = offsets[text] + 1; i < offsets[text + 1]; ++i)
      if (values[i - 1] >= values[i]) fail("shingles: a set out of order", input);
  }
}

// Lines near to JSON, and any bytes: what is said of each line must hold of it.
void fuzz_json_lines(Random& rng, uint64_t input) {
  static const char* const kParts[] = {"{",
                                       "}",
                                       "\"text\"",
                                       ":",
                                       "\"",
                                       "\\",
                                       "\\u00e9",
                                       "\\ud83d\\ude00",
                                       "\\n",
                                       "text",
                                       "a",
                                       " ",
                                       "\n",
                                       "\xc3\xa9",
                                       "\xff",
                                       "[",
                                       "]",
                                       "-1.5e3",
                                       "true",
                                       "0",
                                       "\"a\"",
                                       ",",
                                       "{\"text\": \"",
                                       "\"}\n",
                                       "\t",
                                       "\xe2\x82\xac",
                                       "\xf0\x9f\x98\x80",
                                       "long long long long long long long long long text "};
  std::vector<uint8_t> bytes;
  for (uint64_t part = rng() % 24; part > 0; --part) {
    const char* chosen = kParts[rng() % (sizeof kParts / sizeof *kParts)];
    if (rng() % 30 == 0)
      bytes.push_back(uint8_t(rng()));
    else
      bytes.insert(bytes.end(), chosen, chosen + strlen(chosen));
  }
  const size_t size = bytes.size();
  const auto data = block<uint8_t>(size);
  std::copy(bytes.begin(), bytes.end(), data.get());
  const size_t most = size_t(std::count(bytes.begin(), bytes.end(), '\n')) + 1;
  const auto text = block<uint8_t>(size);
  const auto begins = block<int64_t>(most), ends = block<int64_t>(most);
  const auto kinds = block<uint8_t>(most);
  int64_t lines = 0;
  megalm::json_lines({data.get(), int64_t(size), reinterpret_cast<const uint8_t*>("text"), 4, text.get(), begins.get(),
                      ends.get(), kinds.get(), &lines});
  if (lines > int64_t(most) || (lines == 0) != (size == 0)) fail("json_lines: a wrong number", input);
  for (int64_t i = 0; i < lines; ++i) {
    const int64_t end = i + 1 < lines ? begins[i + 1] : int64_t(size), taken = ends[i] - (i > 0 ? ends[i - 1] : 0);
    if (begins[i] >= end || (i > 0 && data[begins[i] - 1] != '\n')) fail("json_lines: a line begins elsewhere", input);
    const bool has_text = kinds[i] == 1 || kinds[i] == 2;
    if (kinds[i] > 3 || taken < 0 || taken > end - begins[i] || (!has_text && taken > 0))
      fail("json_lines: a text of a wrong size", input);
    bool ascii = true;
    for (int64_t at = ends[i] - taken; at < ends[i]; ++at) ascii = ascii && text[at] < 128;
    if (has_text && ascii != (kinds[i] == 1)) fail("json_lines: a wrong kind", input);
  }
}

void fuzz_lower_case(Random& rng, uint64_t input) {
  const int64_t texts = int64_t(rng() % 4), codes = int64_t(rng() % 3000);
  const auto ends = block<int64_t>(size_t(texts)), ends_out = block<int64_t>(size_t(texts));
  const auto ascii = block<uint8_t>(size_t(texts)), special = block<uint8_t>(size_t(texts));
  int64_t size = 0;
  for (int64_t i = 0; i < texts; ++i) ends[i] = size += int64_t(rng() % 40), ascii[i] = rng() % 4 == 0;
  const auto data = block<uint8_t>(size_t(size)), out = block<uint8_t>(size_t(size + size / 2));
  for (int64_t i = 0; i < size; ++i) data[i] = rng() % 2 ? uint8_t(rng()) : uint8_t('A' + rng() % 26);
  const auto small = block<uint32_t>(size_t(codes));
  for (int64_t i = 0; i < codes; ++i)  // of two bytes to three at most
    small[i] = rng() % 50 == 0 ? megalm::kSpecial : i < 0x80 ? uint32_t(i) : uint32_t(rng() % 0x10000);
  megalm::lower_case(
      {data.get(), ends.get(), ascii.get(), texts, small.get(), codes, out.get(), ends_out.get(), special.get()});
  for (int64_t i = 0; i < texts; ++i) {
    const int64_t taken = ends_out[i] - (i > 0 ? ends_out[i - 1] : 0), given = ends[i] - (i > 0 ? ends[i - 1] : 0);
    if (taken < 0 || 2 * taken > 3 * given || special[i] > 1 || (ascii[i] && taken != given))
      fail("lower_case: a text of a wrong size", input);
  }
}

void fuzz_sets(Random& rng, uint64_t input) {
  const int64_t sets = int64_t(rng() % 5), bands = 1 + int64_t(rng() % 5), rows = 1 + int64_t(rng() % 9);
  const auto offsets = block<int64_t>(size_t(sets) + 1);
  offsets[0] = 0;
  for (int64_t i = 0; i < sets; ++i) offsets[i + 1] = offsets[i] + int64_t(rng() % 30);
  const auto values = block<uint64_t>(size_t(offsets[sets]));
  for (int64_t i = 0; i < sets; ++i) {
    uint64_t value = 0;
    for (int64_t at = offsets[i]; at < offsets[i + 1]; ++at) values[at] = value += 1 + rng() % 3;
  }
  const auto factors = block<uint32_t>(size_t(bands * rows)), addends = block<uint32_t>(size_t(bands * rows));
  for (int64_t i = 0; i < bands * rows; ++i) factors[i] = uint32_t(rng()) | 1, addends[i] = uint32_t(rng());
  const auto out = block<uint64_t>(size_t(bands * sets));
  bool ok = false;
  megalm::minhash({values.get(), offsets.get(), sets, bands, rows, factors.get(), addends.get(), out.get(), &ok});
  if (!ok) fail("minhash: no memory", input);
  for (int64_t a = 0; a < sets; ++a)
    for (int64_t b = 0; b < sets; ++b) {
      const uint64_t *first = values.get() + offsets[a], *second = values.get() + offsets[b];
      const int64_t size_a = offsets[a + 1] - offsets[a], size_b = offsets[b + 1] - offsets[b];
      int64_t common = -1, expected = 0;
      megalm::intersections({1, &first, &second, &size_a, &size_b, &common});
      for (int64_t i = 0; i < size_a; ++i) expected += std::binary_search(second, second + size_b, first[i]);
      if (common != expected) fail("intersections: a wrong size", input);
      if (common == size_a && common == size_b)
        for (int64_t band = 0; band < bands; ++band)
          if (out[band * sets + a] != out[band * sets + b]) fail("minhash: equal sets differ", input);
    }
}

template <typename Symbol, typename Index>
void fuzz_suffixes(Random& rng, uint64_t input) {
  const int64_t count = int64_t(rng() % 50), symbols = 1 + int64_t(rng() % (rng() % 2 ? 3 : 250));
  const auto text = block<Symbol>(size_t(count));
  const int64_t period = rng() % 2 ? 1 + int64_t(rng() % 9) : count + 1;
  for (int64_t i = 0; i < count; ++i) text[i] = i < period ? Symbol(rng() % uint64_t(symbols)) : text[i - period];
  const auto order = block<Index>(size_t(count));
  bool ok = false;
  megalm::suffix_array({text.get(), int(sizeof(Symbol)), count, symbols, order.get(), int(sizeof(Index)), &ok});
  if (!ok) fail("suffix_array: no memory", input);
  std::vector<bool> seen(size_t(count), false);
  for (int64_t i = 0; i < count; ++i) {
    if (order[i] < 0 || order[i] >= count || seen[size_t(order[i])]) fail("suffix_array: no permutation", input);
    seen[size_t(order[i])] = true;
    const Symbol *begin = text.get(), *end = begin + count;
    if (i > 0 && !std::lexicographical_compare(begin + order[i - 1], end, begin + order[i], end))
      fail("suffix_array: out of order", input);
  }

  // The windows dealt to lists, each in the order of the suffixes, as chunks are.
  const int64_t length = 1 + int64_t(rng() % 8), runs = 1 + int64_t(rng() % 4);
  std::vector<std::vector<uint32_t>> lists(static_cast<size_t>(runs));
  for (int64_t i = 0; i < count; ++i)
    if (order[i] + length <= count) lists[rng() % uint64_t(runs)].push_back(uint32_t(order[i]));
  std::vector<std::unique_ptr<uint32_t[]>> own;
  std::vector<const uint32_t*> pointers;
  std::vector<int64_t> counts, bases(size_t(runs), 0);
  size_t windows = 0;
  for (const auto& list : lists) {
    own.push_back(block<uint32_t>(list.size()));
    std::copy(list.begin(), list.end(), own.back().get());
    pointers.push_back(own.back().get());
    counts.push_back(int64_t(list.size()));
    windows += list.size();
  }
  const auto out = block<int64_t>(2 * windows);
  int64_t found = 0;
  megalm::repeats(
      {text.get(), int(sizeof(Symbol)), length, runs, pointers.data(), counts.data(), bases.data(), out.get(), &found});
  int64_t expected = 0;
  for (int64_t place = 0; place + length <= count; ++place)
    for (int64_t first = 0; first <= place; ++first)
      if (std::equal(&text[place], &text[place] + length, &text[first])) {
        expected += place >= first + length;
        break;
      }
  if (found != expected) fail("repeats: a wrong number", input);
  for (int64_t i = 0; i < found; ++i) {
    const int64_t place = out[2 * i], first = out[2 * i + 1];
    if (place < first + length || !std::equal(&text[place], &text[place] + length, &text[first]))
      fail("repeats: not a repeat", input);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t inputs = argc > 1 ? strtoull(argv[1], nullptr, 10) : 1000000;
  Random rng(argc > 2 ? strtoull(argv[2], nullptr, 10) : 1);
  uint8_t letters[256];
  for (int byte = 0; byte < 256; ++byte)
    letters[byte] = (byte >= '0' && byte <= '9') || (byte >= 'a' && byte <= 'z') || byte > 127 ? uint8_t(byte)
                    : byte >= 'A' && byte <= 'Z'                                               ? uint8_t(byte + 32)
                                                                                               : 0;
  for (uint64_t input = 0; input < inputs; ++input) {
    switch (rng() % 12) {
      case 0:
        fuzz_suffixes<uint8_t, int32_t>(rng, input);
        break;
      case 1:
        fuzz_suffixes<uint16_t, int32_t>(rng, input);
        break;
      case 2:
        fuzz_suffixes<uint32_t, int64_t>(rng, input);
        break;
      case 3:
        fuzz_lower_case(rng, input);
        break;
      case 4:
        fuzz_sets(rng, input);
        break;
      case 5:
      case 6:
        fuzz_json_lines(rng, input);
        break;
      case 10:
      case 11:
        if (!fuzz_counts(rng)) fail("counts: one is out of its bounds", input);
        break;
      default:
        fuzz_shingles(rng, input, letters);
    }
  }
  printf("%llu inputs, no fault\n", static_cast<unsigned long long>(inputs));
  return 0;
}
