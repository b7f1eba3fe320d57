// Characters of a text with their classes and prefix hashes; arrays that grow. For ops that look at whole texts.
#pragma once

#include <stdlib.h>
#include <string.h>

#include <new>

#include "common/mix.h"
#include "text_counts/op.h"

namespace megalm::MEGALM_ISA {

// An array that grows; std::vector's functions would be shared between the instruction sets.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(data_); }

  // Makes room for this many in all; what is there stays.
  void reserve(int64_t room) {
    if (room <= room_) return;
    const int64_t more = room > 2 * room_ ? room : 2 * room_;
    T* data = static_cast<T*>(realloc(data_, size_t(more) * sizeof(T)));
    if (data == nullptr) throw std::bad_alloc();
    data_ = data;
    room_ = more;
  }
  void push(const T& value) {
    if (size == room_) {
      const T copy = value;
      reserve(size + 1);
      data_[size++] = copy;
    } else {
      data_[size++] = value;
    }
  }
  void clear() { size = 0; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  T* data() { return data_; }

  int64_t size = 0;

 private:
  T* data_ = nullptr;
  int64_t room_ = 0;
};

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The powers of the multiplier that hashes of texts are made with: hash = sum of (code_i + 1) * M^(last - i), mod 2^64.
class Powers {
 public:
  void grow(int64_t count) {
    if (powers_.size == 0) powers_.push(1);
    powers_.reserve(count + 1);
    while (powers_.size <= count) powers_.push(powers_[powers_.size - 1] * kGolden);
  }
  MEGALM_INLINE uint64_t operator[](int64_t exponent) const { return powers_[exponent]; }

 private:
  Buffer<uint64_t> powers_;
};

// A text as characters: code, class (the bits of CharacterBits) and the hash of what is before.
class Characters {
 public:
  Characters(const uint32_t* classes, int64_t codes) : classes_(classes), codes_(codes) {}

  // Bytes that are no UTF-8 become some characters, at most one for each.
  void decode(const uint8_t* at, const uint8_t* end) {
    clear();
    reserve(end - at);
    uint32_t *codes = code.data(), *kinds = kind.data();
    uint64_t *hashes = before.data(), hash = 0;
    int64_t count = 0;
    while (at < end) {
      uint32_t one = *at;
      int64_t length = 1;
      if (one >= 0x80) {
        length = one < 0xE0 ? 2 : one < 0xF0 ? 3 : 4;
        if (length > end - at) length = end - at;
        one = length > 1 ? one & (0xFFu >> (length + 1)) : uint32_t('?');
        for (int64_t i = 1; i < length; ++i) one = (one << 6) | (at[i] & 63u);
      }
      at += length;
      codes[count] = one;
      kinds[count] = int64_t(one) < codes_ ? classes_[one] : 0;
      hashes[++count] = hash = hash * kGolden + one + 1;
    }
    code.size = kind.size = count;
    before.size = count + 1;
  }
  void clear() {
    code.clear();
    kind.clear();
    before.clear();
    before.push(0);
  }
  void reserve(int64_t count) {
    code.reserve(count);
    kind.reserve(count);
    before.reserve(count + 1);
    powers.grow(count);
  }
  MEGALM_INLINE void push(uint32_t one) {
    code.push(one);
    kind.push(int64_t(one) < codes_ ? classes_[one] : 0);
    before.push(before[before.size - 1] * kGolden + one + 1);
  }
  int64_t size() const { return code.size; }
  MEGALM_INLINE uint64_t hash(int64_t begin, int64_t end) const {
    return before[end] - before[begin] * powers[end - begin];
  }
  MEGALM_INLINE bool is(int64_t i, uint32_t bits) const { return (kind[i] & bits) != 0; }

  Buffer<uint32_t> code, kind;
  Buffer<uint64_t> before;
  Powers powers;

 private:
  const uint32_t* classes_;
  int64_t codes_;
};

// A table of hashes; the value of one that was not there is what it was first looked up with.
class HashTable {
 public:
  void begin(int64_t most) {
    int64_t room = 16;
    while (room < 2 * most) room *= 2;
    keys_.reserve(room);
    values_.reserve(room);
    memset(keys_.data(), 0, size_t(room) * sizeof(uint64_t));
    mask_ = uint64_t(room - 1);
    shift_ = 64;
    while (room > 1) {
      room /= 2;
      --shift_;
    }
  }
  // The value that the key has, which is `value` if it is new.
  MEGALM_INLINE int32_t* find(uint64_t hash, int64_t length, int32_t value) {
    const uint64_t key = key_of(hash, length);
    uint64_t slot = place_of(key);
    while (keys_[int64_t(slot)] != key) {
      if (keys_[int64_t(slot)] == 0) {
        keys_[int64_t(slot)] = key;
        values_[int64_t(slot)] = value;
        break;
      }
      slot = (slot + 1) & mask_;
    }
    return &values_[int64_t(slot)];
  }
  // The value, or -1.
  MEGALM_INLINE int32_t look(uint64_t hash, int64_t length) const {
    const uint64_t key = key_of(hash, length);
    for (uint64_t slot = place_of(key);; slot = (slot + 1) & mask_) {
      if (keys_[int64_t(slot)] == key) return values_[int64_t(slot)];
      if (keys_[int64_t(slot)] == 0) return -1;
    }
  }
  MEGALM_INLINE bool has(uint64_t hash, int64_t length) const {
    const uint64_t key = key_of(hash, length);
    for (uint64_t slot = place_of(key);; slot = (slot + 1) & mask_) {
      if (keys_[int64_t(slot)] == key) return true;
      if (keys_[int64_t(slot)] == 0) return false;
    }
  }
  // Whether it was not there before.
  MEGALM_INLINE bool add(uint64_t hash, int64_t length) {
    const uint64_t key = key_of(hash, length);
    uint64_t slot = place_of(key);
    while (keys_[int64_t(slot)] != key) {
      if (keys_[int64_t(slot)] == 0) {
        keys_[int64_t(slot)] = key;
        return true;
      }
      slot = (slot + 1) & mask_;
    }
    return false;
  }

 private:
  static MEGALM_INLINE uint64_t key_of(uint64_t hash, int64_t length) {
    const uint64_t key = hash ^ (uint64_t(length) * 0xD6E8FEB86659FD93u);
    return key + (key == 0);
  }
  // By the first bits of a product, which depend on all of the key's.
  MEGALM_INLINE uint64_t place_of(uint64_t key) const { return ((key ^ (key >> 32)) * kGolden) >> shift_; }

  Buffer<uint64_t> keys_;
  Buffer<int32_t> values_;
  uint64_t mask_ = 0;
  int shift_ = 64;
};

}  // namespace megalm::MEGALM_ISA
