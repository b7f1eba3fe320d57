#include "common/bind.h"

#include "minhash/op.h"

namespace megalm {
namespace {

bool run_minhash(Address values, Address offsets, int64_t sets, int64_t bands, int64_t rows, Address multipliers,
                 Address addends, Address out) {
  bool ok = false;
  minhash({pointer<uint64_t>(values), pointer<int64_t>(offsets), sets, bands, rows, pointer<uint32_t>(multipliers),
           pointer<uint32_t>(addends), pointer<uint64_t>(out), &ok});
  return ok;
}

void run_intersections(int64_t pairs, Address first, Address second, Address first_sizes, Address second_sizes,
                       Address common) {
  intersections({pairs, pointer<const uint64_t* const>(first), pointer<const uint64_t* const>(second),
                 pointer<int64_t>(first_sizes), pointer<int64_t>(second_sizes), pointer<int64_t>(common)});
}

}  // namespace

void register_minhash(pybind11::module_& m) {
  m.def("minhash", &run_minhash, Released());
  m.def("intersections", &run_intersections, Released());
}

}  // namespace megalm
