#include "common/bind.h"

#include "shingle/op.h"

namespace megalm {
namespace {

bool run_shingles(Address data, Address ends, int64_t texts, int64_t words, Address letters, Address classes,
                  int64_t codes, Address values, Address offsets) {
  bool ok = false;
  shingles({pointer<uint8_t>(data), pointer<int64_t>(ends), texts, words, pointer<uint8_t>(letters),
            pointer<uint8_t>(classes), codes, pointer<uint64_t>(values), pointer<int64_t>(offsets), &ok});
  return ok;
}

void run_lower_case(Address data, Address ends, Address ascii, int64_t texts, Address small, int64_t codes, Address out,
                    Address ends_out, Address special) {
  lower_case({pointer<uint8_t>(data), pointer<int64_t>(ends), pointer<uint8_t>(ascii), texts, pointer<uint32_t>(small),
              codes, pointer<uint8_t>(out), pointer<int64_t>(ends_out), pointer<uint8_t>(special)});
}

}  // namespace

void register_shingle(pybind11::module_& m) {
  m.def("word_shingles", &run_shingles, Released());
  m.def("lower_case", &run_lower_case, Released());
}

}  // namespace megalm
