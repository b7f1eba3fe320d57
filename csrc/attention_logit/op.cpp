#include "attention_logit/op.h"

#include <cmath>

#include "common/vec.h"

namespace megalm::MEGALM_ISA {
namespace {

constexpr int kParts = kAttentionLogitTile / kLanes;

// Up to kAttentionLogitTile queries that share a key head, one to a lane: whole heads, all queries of each.
struct Tile {
  int64_t group, first_head, heads;
};

// The queries of one sequence, a lane each: few[j] holds their elements j.
template <typename T>
void gather(const AttentionLogit& a, const Tile& tile, int64_t sequence, float* few) {
  __builtin_memset(few, 0, size_t(a.size * kAttentionLogitTile) * sizeof(float));
  for (int64_t lane = 0; lane < tile.heads * a.queries; ++lane) {
    const int64_t head = tile.first_head + lane / a.queries, position = a.length - 1 - lane % a.queries * a.every;
    const T* q = static_cast<const T*>(a.q) + position * a.q_step + sequence * a.q_batch + head * a.size;
    for (int64_t j = 0; j < a.size; ++j) few[j * kAttentionLogitTile + lane] = to_float(q[j]);
  }
}

// Products of kKeys neighbouring keys and all queries of the tile.
template <typename T, int kKeys>
MEGALM_INLINE void products(const AttentionLogit& a, const T* k, const float* few, Vec (&out)[kKeys][kParts]) {
  for (int key = 0; key < kKeys; ++key)
    for (int part = 0; part < kParts; ++part) out[key][part] = Vec{};
  for (int64_t j = 0; j < a.size; ++j) {
    Vec q[kParts];
    for (int part = 0; part < kParts; ++part) q[part] = load(few + j * kAttentionLogitTile + part * kLanes);
#pragma GCC unroll 4
    for (int key = 0; key < kKeys; ++key) {
      const float value = to_float(k[key * a.k_step + j]);
      for (int part = 0; part < kParts; ++part) out[key][part] += value * q[part];
    }
  }
}

template <typename T>
void run_tile(const AttentionLogit& a, const Tile& tile) {
  float few[kAttentionLogitSize * kAttentionLogitTile];
  const int64_t lanes = tile.heads * a.queries;
  int32_t positions[kAttentionLogitTile];
  for (int lane = 0; lane < kAttentionLogitTile; ++lane)
    positions[lane] = lane < lanes ? int32_t(a.length - 1 - lane % a.queries * a.every) : -1;
  IntVec position[kParts], bad[kParts] = {};
  Vec top[kParts];
  __builtin_memcpy(position, positions, sizeof position);
  for (Vec& each : top) each = broadcast(-HUGE_VALF);
  const auto take = [&](int64_t sequence, int64_t key, const Vec(&found)[kParts]) {
    for (int part = 0; part < kParts; ++part) {
      IntVec shown = position[part] >= IntVec{} + int32_t(key);
      if (a.mask) {
        const uint8_t* mask = a.mask + sequence * a.mask_batch + key;
        for (int i = 0; i < kLanes; ++i) shown[i] = shown[i] && mask[position[part][i] * a.mask_step] ? -1 : 0;
      }
      const Vec value = shown ? found[part] : broadcast(-HUGE_VALF);
      bad[part] |= (IntVec)(value != value);
      top[part] = maximum(value, top[part]);
    }
  };
  for (int64_t sequence = 0; sequence < a.batch; ++sequence) {
    gather<T>(a, tile, sequence, few);
    const T* k = static_cast<const T*>(a.k) + sequence * a.k_batch + tile.group * a.size;
    constexpr int kKeys = 4;
    int64_t key = 0;
    for (; key + kKeys <= a.length; key += kKeys) {
      Vec found[kKeys][kParts];
      products<T, kKeys>(a, k + key * a.k_step, few, found);
      for (int i = 0; i < kKeys; ++i) take(sequence, key + i, found[i]);
    }
    for (; key < a.length; ++key) {
      Vec found[1][kParts];
      products<T, 1>(a, k + key * a.k_step, few, found);
      take(sequence, key, found[0]);
    }
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    float& largest = a.largest[tile.first_head + lane / a.queries];
    const float value = bad[lane / kLanes][lane % kLanes] ? NAN : top[lane / kLanes][lane % kLanes] * a.scale;
    if (!(value <= largest) && largest == largest) largest = value;
  }
}

}  // namespace

void attention_logit(const AttentionLogit& a) {
  const int64_t together = kAttentionLogitTile / a.queries;  // heads of a tile
  const int64_t shared = a.heads / a.groups, tiles = (shared + together - 1) / together;
  for_dtype(a.dtype, [&](auto type) {
    parallel_for(a.groups * tiles, a.length * a.batch * a.groups * a.size, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i / tiles, first = i % tiles * together;
        const int64_t left = shared - first;
        run_tile<decltype(type)>(a, {group, group * shared + first, left < together ? left : together});
      }
    });
  });
}

}  // namespace megalm::MEGALM_ISA
