// Random inputs to the C++ that reads text for deduplication, every result checked by its definition, in buffers of
// exactly the size that the contract gives: build with -fsanitize=address,undefined. Arguments: inputs, seed.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

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

void fuzz_shingles(Random& rng, uint64_t input, const uint8_t* is_word) {
  const size_t texts = rng() % 5;
  std::vector<int64_t> ends(texts);
  int64_t size = 0;
  for (int64_t& end : ends) end = size += rng() % 3 ? int64_t(rng() % 40) : 0;
  if (rng() % 200 == 0 && texts > 0) ends[texts - 1] = size += 2000;
  const auto data = block<uint8_t>(size_t(size));
  const unsigned kind = rng() % 3;  // any bytes; letters and spaces; nearly only letters
  for (int64_t i = 0; i < size; ++i) data[i] = kind == 0 ? uint8_t(rng()) : " ab."[rng() % (kind == 1 ? 4 : 3)];
  const int64_t words = 1 + int64_t(rng() % 6);
  const auto values = block<uint64_t>(size_t(size) / 2 + texts + 1);
  const auto offsets = block<int64_t>(texts + 1);
  bool ok = false;
  megalm::shingles({data.get(), ends.data(), int64_t(texts), words, is_word, values.get(), offsets.get(), &ok});
  if (!ok) fail("shingles: no memory", input);
  int64_t begin = 0;
  for (size_t text = 0; text < texts; ++text) {
    int64_t count = 0;
    for (int64_t i = begin; i < ends[text]; ++i) count += is_word[data[i]] && (i == begin || !is_word[data[i - 1]]);
    begin = ends[text];
    const int64_t most = count >= words ? count - words + 1 : count > 0;
    const int64_t found = offsets[text + 1] - offsets[text];
    if (found > most || (found == 0) != (most == 0)) fail("shingles: a set of a wrong size", input);
    for (int64_t i = offsets[text] + 1; i < offsets[text + 1]; ++i)
      if (values[i - 1] >= values[i]) fail("shingles: a set out of order", input);
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
  uint8_t is_word[256];
  for (int byte = 0; byte < 256; ++byte)
    is_word[byte] =
        (byte >= '0' && byte <= '9') || (byte >= 'A' && byte <= 'Z') || (byte >= 'a' && byte <= 'z') || byte > 127;
  for (uint64_t input = 0; input < inputs; ++input) {
    switch (rng() % 6) {
      case 0:
        fuzz_suffixes<uint8_t, int32_t>(rng, input);
        break;
      case 1:
        fuzz_suffixes<uint16_t, int32_t>(rng, input);
        break;
      case 2:
        fuzz_suffixes<uint32_t, int64_t>(rng, input);
        break;
      default:
        fuzz_shingles(rng, input, is_word);
    }
  }
  printf("%llu inputs, no fault\n", static_cast<unsigned long long>(inputs));
  return 0;
}
