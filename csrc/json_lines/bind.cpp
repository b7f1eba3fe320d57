#include "common/bind.h"

#include "json_lines/op.h"

namespace megalm {
namespace {

int64_t run_json_lines(Address data, int64_t size, Address field, int64_t field_size, Address text, Address begins,
                       Address ends, Address kinds) {
  int64_t lines = 0;
  json_lines({pointer<uint8_t>(data), size, pointer<uint8_t>(field), field_size, pointer<uint8_t>(text),
              pointer<int64_t>(begins), pointer<int64_t>(ends), pointer<uint8_t>(kinds), &lines});
  return lines;
}

}  // namespace

void register_json_lines(pybind11::module_& m) { m.def("json_lines", &run_json_lines, Released()); }

}  // namespace megalm
