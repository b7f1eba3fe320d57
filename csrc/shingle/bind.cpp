#include "common/bind.h"

#include "shingle/op.h"

namespace megalm {
namespace {

bool run_shingles(Address data, Address ends, int64_t texts, int64_t words, Address letters, Address values,
                  Address offsets) {
  bool ok = false;
  shingles({pointer<uint8_t>(data), pointer<int64_t>(ends), texts, words, pointer<uint8_t>(letters),
            pointer<uint64_t>(values), pointer<int64_t>(offsets), &ok});
  return ok;
}

}  // namespace

void register_shingle(pybind11::module_& m) { m.def("shingles", &run_shingles, Released()); }

}  // namespace megalm
