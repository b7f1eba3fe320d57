// A copy in host memory and the checksum of what was copied, in one pass over it.
//
// out = XXH3_64bits(from[0 .. bytes)) with seed 0 and the default secret; to[i] = from[i]. The algorithm's long form is
// the only one here: bytes > 240. `from` and `to` do not overlap. Little-endian machines.
// Source: xxHash's specification, doc/xxhash_spec.md of github.com/Cyan4973/xxHash.
#pragma once

#include "common/op.h"

namespace megalm {

struct CopyDigest {
  const uint8_t* from;
  uint8_t* to;
  int64_t bytes;
  uint64_t* out;
};

MEGALM_DECLARE_CPU(copy_digest, CopyDigest)

inline void copy_digest(const CopyDigest& args) { MEGALM_RUN_CPU(copy_digest, args); }

}  // namespace megalm
