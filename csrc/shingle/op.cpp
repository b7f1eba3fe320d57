#include "shingle/op.h"

#include <stdlib.h>

#include "common/vec.h"

namespace megalm::MEGALM_ISA {
namespace {

constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15u;

MEGALM_INLINE uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// Hashes of the words of one text; returns how many.
int64_t hash_words(const uint8_t* data, int64_t size, const uint8_t* is_word, uint64_t* out) {
  int64_t count = 0;
  for (int64_t i = 0; i < size;) {
    if (!is_word[data[i]]) {
      ++i;
      continue;
    }
    uint64_t sum = 0, power = kMultiplier;
    for (; i < size && is_word[data[i]]; ++i, power *= kMultiplier) sum += (uint64_t(data[i]) + 1) * power;
    out[count++] = mix(sum);
  }
  return count;
}

// Runs of `words` hashes in place: each entry becomes the hash of the run that begins there.
int64_t hash_runs(uint64_t* hashes, int64_t count, int64_t words) {
  if (count == 0) return 0;
  const int64_t runs = count >= words ? count - words + 1 : 1;
  for (int64_t i = 0; i < runs; ++i) {
    uint64_t sum = 0;
    for (int64_t j = 0; j < words; ++j) sum = sum * kMultiplier + (i + j < count ? hashes[i + j] : 0);
    hashes[i] = mix(sum);
  }
  return runs;
}

// Insertion below this many, a byte at a time above: a few hundred entries are a document of some kilobytes.
constexpr int64_t kSmall = 48;

void sort(uint64_t* values, uint64_t* spare, int64_t count) {
  if (count <= kSmall) {
    for (int64_t i = 1; i < count; ++i) {
      const uint64_t value = values[i];
      int64_t j = i;
      for (; j > 0 && values[j - 1] > value; --j) values[j] = values[j - 1];
      values[j] = value;
    }
    return;
  }
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

}  // namespace

void shingles(const Shingles& a) {
  int64_t longest = 0, begin = 0;
  for (int64_t text = 0; text < a.texts; ++text) {
    if (a.ends[text] - begin > longest) longest = a.ends[text] - begin;
    begin = a.ends[text];
  }
  uint64_t* spare = static_cast<uint64_t*>(malloc(size_t(longest / 2 + 1) * sizeof(uint64_t)));
  *a.ok = spare != nullptr;
  if (spare == nullptr) return;
  int64_t found = begin = 0;
  a.offsets[0] = 0;
  for (int64_t text = 0; text < a.texts; ++text) {
    uint64_t* values = a.values + found;
    const int64_t count = hash_words(a.data + begin, a.ends[text] - begin, a.is_word, values);
    const int64_t runs = hash_runs(values, count, a.words);
    sort(values, spare, runs);
    int64_t kept = 0;
    for (int64_t i = 0; i < runs; ++i)
      if (i == 0 || values[i] != values[kept - 1]) values[kept++] = values[i];
    found += kept;
    begin = a.ends[text];
    a.offsets[text + 1] = found;
  }
  free(spare);
}

}  // namespace megalm::MEGALM_ISA
