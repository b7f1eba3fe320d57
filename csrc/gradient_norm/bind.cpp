#include "common/bind.h"

#include "gradient_norm/op.h"

namespace megalm {
namespace {

void run(int index, Address stream, int type, int64_t size, Address x, Address partial, Address result) {
  gradient_norm({dtype(type), size, pointer(x), pointer<double>(partial), pointer<double>(result)},
                device(index, stream));
}

}  // namespace

void register_gradient_norm(pybind11::module_& m) {
  m.attr("GRADIENT_NORM_BLOCK") = kGradientNormBlock;
  m.def("gradient_norm", &run, Released());
}

}  // namespace megalm
