#include "common/bind.h"

#include "digest/op.h"

namespace megalm {
namespace {

uint64_t run_copy_digest(Address from, Address to, int64_t bytes) {
  if (bytes <= 240) throw std::invalid_argument("copy_digest: bytes must be more than 240");
  uint64_t out = 0;
  copy_digest({pointer<uint8_t>(from), pointer<uint8_t>(to), bytes, &out});
  return out;
}

}  // namespace

void register_digest(pybind11::module_& m) { m.def("copy_digest", &run_copy_digest, Released()); }

}  // namespace megalm
