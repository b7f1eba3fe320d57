#include "index/op.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "common/mix.h"

namespace megalm::MEGALM_ISA {
namespace {

constexpr int kRounds = 4;

MEGALM_INLINE uint64_t parts(uint64_t word) {
  constexpr uint64_t kEven = 0x0000FFFF0000FFFFu;
  return (word & kEven) + ((word >> 16) & kEven);
}

MEGALM_INLINE int64_t centred(uint64_t key, uint64_t index) {
  const uint64_t state = index * (2 * kGolden) + key + kGolden;
  const uint64_t both = parts(mix_bits(state)) + parts(mix_bits(state + kGolden));
  return 2 * int64_t((both & 0xFFFFFFFFu) + (both >> 32)) - 8 * 65535;
}

MEGALM_INLINE int64_t walk(uint64_t value, uint64_t size, uint64_t key, int right_bits, int left_bits) {
  const uint64_t right_mask = (uint64_t(1) << right_bits) - 1, left_mask = (uint64_t(1) << left_bits) - 1;
  do {
    uint64_t left = value >> right_bits, right = value & right_mask;
    for (uint64_t round = 0; round < kRounds; ++round) {
      left ^= mix_bits(right + (key ^ ((2 * round + 1) * kGolden))) & left_mask;
      right ^= mix_bits(left + (key ^ ((2 * round + 2) * kGolden))) & right_mask;
    }
    value = (left << right_bits) | right;
  } while (value >= size);
  return int64_t(value);
}

// On its own, so that no compiler fuses it with what follows into one rounding.
__attribute__((noinline)) double rounded_product(double a, double b) { return a * b; }

}  // namespace

void fill(const Fill& a) {
  const int64_t total = a.rows * a.columns;
  const auto run = [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / a.columns, column = begin % a.columns;
      const int64_t count = end - begin < a.columns - column ? end - begin : a.columns - column;
      const uint64_t start = a.first + uint64_t(row) * a.stride + uint64_t(column);
      float* out = a.out + begin;
      for (int64_t i = 0; i < count; ++i)
        out[i] = float(double(int32_t(centred(a.key, start + uint64_t(i)))) * a.scale);
      begin += count;
    }
  };
  parallel_for(total, total, run);
}

void permute(const Permute& a) {
  int bits = 64 - __builtin_clzll(a.size > 1 ? a.size - 1 : 1);
  if (bits < 2) bits = 2;
  parallel_for(a.count, a.count * 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      a.out[i] = walk(uint64_t(a.index[i]), a.size, a.keys[a.one_key ? 0 : i], bits / 2, bits - bits / 2);
    }
  });
}

void deal(const Deal& a) {
  const int64_t n = a.sources;
  std::vector<int64_t> release(n), deadline(n);
  const auto next = [&](int64_t i) {
    const int64_t k = a.given[i];
    release[i] = (k * a.unit + a.slack + a.shares[i] - 1) / a.shares[i];
    deadline[i] = ((k + 1) * a.unit - a.slack) / a.shares[i] + 1;
  };
  for (int64_t i = 0; i < n; ++i) next(i);
  for (int64_t j = 0; j < a.count; ++j) {
    const int64_t slot = a.first + 1 + j;
    int64_t best = 0, earliest = std::numeric_limits<int64_t>::max();
    for (int64_t i = 0; i < n; ++i) {
      const bool better = release[i] <= slot && deadline[i] < earliest;
      best = better ? i : best;
      earliest = better ? deadline[i] : earliest;
    }
    a.source[j] = best;
    a.rank[j] = a.given[best]++;
    next(best);
  }
}

void dealt(const Dealt& a) {
  // What is not certain are the samples that may have come by now and need not have: one of a source at most. Of those
  // with the j earliest deadlines, with all that are certain, min over s <= t of (released by s) + t - s have come (the
  // busy period of a queue); before the first of the uncertain was released that is t.
  struct Uncertain {
    int64_t source, release, deadline;
  };
  const int64_t n = a.sources, t = a.slots;
  std::vector<Uncertain> open;
  int64_t certain = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t share = a.shares[i], done = (t * share + a.slack - 1) / a.unit;
    a.given[i] = done;
    certain += done;
    const int64_t release = (done * a.unit + a.slack + share - 1) / share;
    if (release <= t) open.push_back({i, release, ((done + 1) * a.unit - a.slack) / share + 1});
  }
  const int64_t count = int64_t(open.size()), missing = t - certain;
  if (missing == 0) return;
  if (missing == count) {
    for (const Uncertain& u : open) ++a.given[u.source];
    return;
  }
  std::stable_sort(open.begin(), open.end(), [](const auto& x, const auto& y) { return x.deadline < y.deadline; });
  std::vector<int64_t> releases(count);
  for (int64_t j = 0; j < count; ++j) releases[j] = open[j].release;
  std::sort(releases.begin(), releases.end());
  // surplus(s) = released by s - s; its minimum over each stretch between two releases of uncertain samples
  std::vector<int32_t> rest(n), share(n);
  int64_t surplus = -t;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t value = t * a.shares[i] - a.slack;
    const int64_t whole = value >= 0 ? value / a.unit : -1;
    surplus += whole + 1;
    rest[i] = int32_t(value - whole * a.unit);
    share[i] = int32_t(a.shares[i]);
  }
  std::vector<int64_t> lowest(count, std::numeric_limits<int64_t>::max());
  const int32_t unit = int32_t(a.unit);
  int64_t stretch = count - 1;
  for (int64_t s = t; s >= releases[0]; --s) {
    while (releases[stretch] > s) --stretch;
    lowest[stretch] = std::min(lowest[stretch], surplus);
    int32_t fewer = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t left = rest[i] - share[i], below = left >> 31;
      rest[i] = left + (below & unit);
      fewer += below;
    }
    surplus += 1 + fewer;
  }
  int64_t before = certain;
  for (int64_t j = 0; j < count; ++j) {
    int64_t least = 0;
    for (int64_t q = 0; q < count; ++q) {
      if (lowest[q] == std::numeric_limits<int64_t>::max()) continue;  // two releases at once: an empty stretch
      int64_t later = 0;
      for (int64_t k = j + 1; k < count; ++k) later += open[k].release <= releases[q];
      least = std::min(least, lowest[q] - later);
    }
    const int64_t come = t + least;
    a.given[open[j].source] += come - before;
    before = come;
  }
}

void greedy(const Greedy& a) {
  for (int64_t i = 0; i < a.count; ++i) {
    const double at = double(i > 1 ? i : 1);
    int64_t best = 0;
    double lag = rounded_product(a.shares[0], at) - double(a.counts[0]);
    for (int64_t s = 1; s < a.sources; ++s) {
      const double behind = rounded_product(a.shares[s], at) - double(a.counts[s]);
      best = behind > lag ? s : best;
      lag = behind > lag ? behind : lag;
    }
    a.source[i] = int16_t(best);
    a.rank[i] = a.counts[best]++;
  }
}

void starts(const Starts& a) {
  int64_t entry = 0, begin = 0, end = a.samples > 0 ? a.sizes[a.order[0] - a.first] : 0;
  for (int64_t i = 0; i < a.samples; ++i) {
    const int64_t token = i * a.length;
    while (end <= token) {
      begin = end;
      end += a.sizes[a.order[++entry] - a.first];
    }
    a.entries[i] = entry;
    a.offsets[i] = token - begin;
  }
}

}  // namespace megalm::MEGALM_ISA
