#include "common/bind.h"

#include "dropout/op.h"

namespace megalm {
namespace {

void run(int index, Address stream, int type, int64_t rows, int64_t size, uint64_t seed, uint32_t threshold,
         float scale, uint32_t first_column, Address row_ids, Address x, Address bias, Address residual, Address y) {
  dropout_add({dtype(type), rows, size, seed, threshold, scale, first_column, pointer<int64_t>(row_ids), pointer(x),
               pointer(bias), pointer(residual), pointer(y)},
              device(index, stream));
}

}  // namespace

void register_dropout(pybind11::module_& m) { m.def("dropout_add", &run, Released()); }

}  // namespace megalm
