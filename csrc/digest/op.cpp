#include "digest/op.h"

#include <string.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "common/vec.h"

namespace megalm::MEGALM_ISA {
namespace {

constexpr uint64_t kPrime32[] = {0x9E3779B1u, 0x85EBCA77u, 0xC2B2AE3Du};
constexpr uint64_t kPrime64[] = {0x9E3779B185EBCA87u, 0xC2B2AE3D27D4EB4Fu, 0x165667B19E3779F9u, 0x85EBCA77C2B2AE63u,
                                 0x27D4EB2F165667C5u};
constexpr int kStripe = 64, kStripes = 16;  // bytes of a stripe; stripes of a block
constexpr int kSecretBytes = 192;

alignas(64) constexpr uint8_t kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4,
    0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e,
    0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43,
    0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb,
    0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19,
    0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7,
    0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78,
    0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16,
    0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

MEGALM_INLINE uint64_t read(const uint8_t* at) {
  uint64_t value;
  memcpy(&value, at, 8);
  return value;
}

MEGALM_INLINE void accumulate(uint64_t* __restrict acc, const uint8_t* __restrict stripe,
                              const uint8_t* __restrict secret) {
  for (int i = 0; i < 8; ++i) {
    const uint64_t value = read(stripe + 8 * i), key = value ^ read(secret + 8 * i);
    acc[i ^ 1] += value;
    acc[i] += (key & 0xFFFFFFFFu) * (key >> 32);
  }
}

MEGALM_INLINE void scramble(uint64_t* acc) {
  for (int i = 0; i < 8; ++i) {
    acc[i] ^= acc[i] >> 47;
    acc[i] ^= read(kSecret + kSecretBytes - kStripe + 8 * i);
    acc[i] *= kPrime32[0];
  }
}

MEGALM_INLINE uint64_t fold(uint64_t a, uint64_t b) {
  const unsigned __int128 product = (unsigned __int128)a * b;
  return uint64_t(product) ^ uint64_t(product >> 64);
}

// One stripe to a place that is aligned to 64 bytes, past the caches: nobody reads it soon.
MEGALM_INLINE void copy_stripe(uint8_t* __restrict to, const uint8_t* __restrict from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
  for (int i = 0; i < kStripe; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#else
  memcpy(to, from, kStripe);
#endif
}

MEGALM_INLINE void end_copies() {
#if defined(__AVX2__) || defined(__AVX512F__)
  _mm_sfence();
#endif
}

}  // namespace

void copy_digest(const CopyDigest& args) {
  const uint8_t* from = args.from;
  uint8_t* to = args.to;
  const bool aligned = reinterpret_cast<uintptr_t>(to) % kStripe == 0;
  uint64_t acc[8] = {kPrime32[2], kPrime64[0], kPrime64[1], kPrime64[2],
                     kPrime64[3], kPrime32[1], kPrime64[4], kPrime32[0]};
  // every stripe but the last, which may overlap the one before it; a scramble ends each block but the last
  const int64_t stripes = (args.bytes - 1) / kStripe;
  for (int64_t first = 0; first < stripes; first += kStripes) {
    const int count = int(stripes - first < kStripes ? stripes - first : kStripes);
    const uint8_t* block = from + first * kStripe;
    for (int n = 0; n < count; ++n) {
      if (aligned)
        copy_stripe(to + (first + n) * kStripe, block + n * kStripe);
      else
        memcpy(to + (first + n) * kStripe, block + n * kStripe, kStripe);
      accumulate(acc, block + n * kStripe, kSecret + 8 * n);
    }
    if (count == kStripes && first * kStripe + kStripes * kStripe <= args.bytes - 1) scramble(acc);
  }
  memcpy(to + stripes * kStripe, from + stripes * kStripe, size_t(args.bytes - stripes * kStripe));
  end_copies();
  accumulate(acc, from + args.bytes - kStripe, kSecret + kSecretBytes - kStripe - 7);

  uint64_t hash = uint64_t(args.bytes) * kPrime64[0];
  for (int i = 0; i < 4; ++i)
    hash += fold(acc[2 * i] ^ read(kSecret + 11 + 16 * i), acc[2 * i + 1] ^ read(kSecret + 19 + 16 * i));
  hash ^= hash >> 37;
  hash *= 0x165667919E3779F9u;
  *args.out = hash ^ (hash >> 32);
}

}  // namespace megalm::MEGALM_ISA
