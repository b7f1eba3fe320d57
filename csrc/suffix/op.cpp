#include "suffix/op.h"

#include <stdlib.h>

#include "common/vec.h"

namespace megalm::MEGALM_ISA {
namespace {

constexpr int64_t kAhead = 24;  // entries between a prefetch and its use: a memory access takes about as long

template <typename T>
struct Memory {
  T* data;
  explicit Memory(int64_t count) : data(static_cast<T*>(malloc(size_t(count > 0 ? count : 1) * sizeof(T)))) {}
  ~Memory() { free(data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

// One level of induced sorting. A suffix is of type S if it is smaller than the next one, else of type L (the last one
// is L: the end is smaller than any symbol); an S after an L begins an LMS substring.
template <typename Symbol, typename Index>
struct Level {
  const Symbol* text;
  Index* out;
  int64_t count, symbols;
  const uint8_t* smaller;  // 1: type S
  const Index* ends;       // where the bucket of each symbol ends; bucket s begins at ends[s - 1]
  Index* place;            // of each bucket: what is filled next

  MEGALM_INLINE bool is_lms(int64_t i) const { return i > 0 && smaller[i] && !smaller[i - 1]; }

  void to_begins() {
    place[0] = 0;
    for (int64_t s = 1; s < symbols; ++s) place[s] = ends[s - 1];
  }
  void to_ends() {
    for (int64_t s = 0; s < symbols; ++s) place[s] = ends[s];
  }

  MEGALM_INLINE void prefetch(int64_t entry) const {
    const Index next = out[entry];
    if (next > 0) {
      __builtin_prefetch(text + next - 1);
      __builtin_prefetch(smaller + next - 1);
    }
  }

  // From LMS suffixes at the ends of their buckets: all suffixes of type L left to right, then those of type S.
  void induce() {
    to_begins();
    out[place[text[count - 1]]++] = Index(count - 1);
    for (int64_t i = 0; i < count; ++i) {
      if (i + kAhead < count) prefetch(i + kAhead);
      const Index j = out[i];
      if (j > 0 && !smaller[j - 1]) out[place[text[j - 1]]++] = j - 1;
    }
    to_ends();
    for (int64_t i = count - 1; i >= 0; --i) {
      if (i >= kAhead) prefetch(i - kAhead);
      const Index j = out[i];
      if (j > 0 && smaller[j - 1]) out[--place[text[j - 1]]] = j - 1;
    }
  }

  // Whether the LMS substrings at a and b are equal, the LMS that ends them included.
  bool equal(int64_t a, int64_t b) const {
    for (int64_t i = 0;; ++i) {
      if (a + i >= count || b + i >= count || text[a + i] != text[b + i] || smaller[a + i] != smaller[b + i])
        return false;
      if (i > 0 && is_lms(a + i)) return is_lms(b + i);
      if (i > 0 && is_lms(b + i)) return false;
    }
  }
};

template <typename Symbol, typename Index>
bool sort_suffixes(const Symbol* text, Index* out, int64_t count, int64_t symbols) {
  if (count == 0) return true;
  Memory<uint8_t> smaller(count);
  Memory<Index> ends(symbols), place(symbols);
  if (!smaller.data || !ends.data || !place.data) return false;
  smaller.data[count - 1] = 0;
  for (int64_t i = count - 2; i >= 0; --i)
    smaller.data[i] = text[i] < text[i + 1] || (text[i] == text[i + 1] && smaller.data[i + 1]);
  for (int64_t s = 0; s < symbols; ++s) ends.data[s] = 0;
  for (int64_t i = 0; i < count; ++i) ++ends.data[text[i]];
  for (int64_t s = 1; s < symbols; ++s) ends.data[s] += ends.data[s - 1];
  Level<Symbol, Index> level{text, out, count, symbols, smaller.data, ends.data, place.data};

  for (int64_t i = 0; i < count; ++i) out[i] = -1;
  level.to_ends();
  for (int64_t i = 1; i < count; ++i)
    if (level.is_lms(i)) out[--place.data[text[i]]] = Index(i);
  level.induce();

  // The sorted LMS substrings to the front, their names (equal ones share one) behind, by half their position.
  int64_t number = 0;
  for (int64_t i = 0; i < count; ++i)
    if (level.is_lms(out[i])) out[number++] = out[i];
  Index* behind = out + number;
  for (int64_t i = number; i < count; ++i) out[i] = -1;
  int64_t names = 0, before = -1;
  for (int64_t i = 0; i < number; ++i) {
    const int64_t at = out[i];
    if (before < 0 || !level.equal(before, at)) ++names;
    before = at;
    behind[at / 2] = Index(names - 1);
  }
  Index* reduced = out + (count - number);
  for (int64_t i = count - 1, j = count - 1; i >= number; --i)
    if (out[i] >= 0) out[j--] = out[i];
  if (names < number) {
    if (!sort_suffixes<Index, Index>(reduced, out, number, names)) return false;
  } else {
    for (int64_t i = 0; i < number; ++i) out[reduced[i]] = Index(i);
  }
  for (int64_t i = 1, j = 0; i < count; ++i)
    if (level.is_lms(i)) reduced[j++] = Index(i);
  for (int64_t i = 0; i < number; ++i) out[i] = reduced[out[i]];
  for (int64_t i = number; i < count; ++i) out[i] = -1;
  level.to_ends();
  for (int64_t i = number - 1; i >= 0; --i) {
    const Index j = out[i];
    out[i] = -1;
    out[--place.data[text[j]]] = j;
  }
  level.induce();
  return true;
}

template <typename Index>
bool sort_any(const SuffixArray& a) {
  Index* out = static_cast<Index*>(a.out);
  if (a.text_bytes == 1) return sort_suffixes(static_cast<const uint8_t*>(a.text), out, a.count, a.symbols);
  if (a.text_bytes == 2) return sort_suffixes(static_cast<const uint16_t*>(a.text), out, a.count, a.symbols);
  return sort_suffixes(static_cast<const uint32_t*>(a.text), out, a.count, a.symbols);
}

// The first symbols of the window, as a number of the same order: most comparisons end there.
template <typename Symbol>
MEGALM_INLINE uint64_t beginning(const Symbol* text, int64_t length) {
  constexpr int kFit = int(8 / sizeof(Symbol));
  uint64_t value = 0;
  for (int i = 0; i < kFit; ++i) value = (value << (8 * sizeof(Symbol) % 64)) | (i < length ? uint64_t(text[i]) : 0);
  return value;
}

template <typename Symbol>
struct Head {
  uint64_t key;
  int64_t position, run;
};

template <typename Symbol>
int compare(const Symbol* a, const Symbol* b, int64_t length) {
  for (int64_t i = 0; i < length; ++i)
    if (a[i] != b[i]) return a[i] < b[i] ? -1 : 1;
  return 0;
}

template <typename Symbol>
void merge(const Repeats& args) {
  const Symbol* text = static_cast<const Symbol*>(args.text);
  Memory<Head<Symbol>> heads(args.runs);
  Memory<int64_t> next(args.runs);
  if (!heads.data || !next.data) {
    *args.found = -1;
    return;
  }
  Head<Symbol>* heap = heads.data;
  int64_t size = 0, found = 0;
  const auto less = [&](const Head<Symbol>& a, const Head<Symbol>& b) {
    if (a.key != b.key) return a.key < b.key;
    return compare(text + a.position, text + b.position, args.length) < 0;
  };
  const auto sink = [&](int64_t at) {
    const Head<Symbol> moved = heap[at];
    for (int64_t child; (child = 2 * at + 1) < size; at = child) {
      if (child + 1 < size && less(heap[child + 1], heap[child])) ++child;
      if (!less(heap[child], moved)) break;
      heap[at] = heap[child];
    }
    heap[at] = moved;
  };
  const auto take = [&](int64_t run, int64_t at) {
    const uint32_t* list = args.lists[run];
    const int64_t i = next.data[run]++;
    if (i + kAhead < args.counts[run]) __builtin_prefetch(text + args.bases[run] + list[i + kAhead]);
    const int64_t position = args.bases[run] + int64_t(list[i]);
    heap[at] = {beginning(text + position, args.length), position, run};
  };
  for (int64_t run = 0; run < args.runs; ++run) {
    next.data[run] = 0;
    if (args.counts[run] > 0) take(run, size++);
  }
  for (int64_t i = size / 2 - 1; i >= 0; --i) sink(i);

  // A group of equal windows is gathered behind what was found, and becomes pairs when it is whole.
  int64_t group = 0, smallest = 0, before = -1;
  uint64_t before_key = 0;
  const auto close = [&] {
    int64_t* at = args.out + 2 * found;
    int64_t kept = 0;
    for (int64_t i = 0; group > 1 && i < group; ++i) {
      const int64_t position = at[2 * i];
      if (position < smallest + args.length) continue;
      at[2 * kept] = position;
      at[2 * kept + 1] = smallest;
      ++kept;
    }
    found += kept;
    group = 0;
  };
  while (size > 0) {
    const Head<Symbol> head = heap[0];
    if (next.data[head.run] < args.counts[head.run])
      take(head.run, 0);
    else
      heap[0] = heap[--size];
    if (size > 1) sink(0);
    const bool same =
        before >= 0 && head.key == before_key && compare(text + head.position, text + before, args.length) == 0;
    if (!same) {
      close();
      smallest = head.position;
    }
    if (head.position < smallest) smallest = head.position;
    args.out[2 * (found + group++)] = head.position;
    before = head.position;
    before_key = head.key;
  }
  close();
  *args.found = found;
}

}  // namespace

void suffix_array(const SuffixArray& a) { *a.ok = a.out_bytes == 4 ? sort_any<int32_t>(a) : sort_any<int64_t>(a); }

void repeats(const Repeats& a) {
  if (a.text_bytes == 1) return merge<uint8_t>(a);
  if (a.text_bytes == 2) return merge<uint16_t>(a);
  return merge<uint32_t>(a);
}

}  // namespace megalm::MEGALM_ISA
