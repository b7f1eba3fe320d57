#include "common/bind.h"

#include "sequence/op.h"

namespace megalm {
namespace {

void run_move(int index, Address stream, int64_t n0, int64_t n1, int64_t n2, int64_t from0, int64_t from1,
              int64_t from2, int64_t to0, int64_t to1, int64_t to2, int64_t run, Address from, Address to) {
  move({{n0, n1, n2}, {from0, from1, from2}, {to0, to1, to2}, run, pointer<char>(from), pointer<char>(to)},
       device(index, stream));
}

void run_sum_parts(int index, Address stream, int type, int64_t parts, int64_t count, Address x, Address out) {
  sum_parts({dtype(type), parts, count, pointer(x), pointer(out)}, device(index, stream));
}

}  // namespace

void register_sequence(pybind11::module_& m) {
  m.def("sequence_move", &run_move, Released());
  m.def("sum_parts", &run_sum_parts, Released());
}

}  // namespace megalm
