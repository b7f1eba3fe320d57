#include "common/bind.h"

#include "suffix/op.h"

namespace megalm {
namespace {

bool run_suffix_array(Address text, int text_bytes, int64_t count, int64_t symbols, Address out, int out_bytes) {
  bool ok = false;
  suffix_array({pointer(text), text_bytes, count, symbols, pointer(out), out_bytes, &ok});
  return ok;
}

int64_t run_repeats(Address text, int text_bytes, int64_t length, int64_t runs, Address lists, Address counts,
                    Address bases, Address out) {
  int64_t found = 0;
  repeats({pointer(text), text_bytes, length, runs, pointer<const uint32_t* const>(lists), pointer<int64_t>(counts),
           pointer<int64_t>(bases), pointer<int64_t>(out), &found});
  return found;
}

}  // namespace

void register_suffix(pybind11::module_& m) {
  m.def("suffix_array", &run_suffix_array, Released());
  m.def("repeats", &run_repeats, Released());
}

}  // namespace megalm
