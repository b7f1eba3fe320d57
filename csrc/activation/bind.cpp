#include "common/bind.h"

#include "activation/op.h"

namespace megalm {
namespace {

void forward(int index, Address stream, int type, int kind, bool gated, int64_t rows, int64_t size, Address x,
             Address bias, Address y) {
  activation_forward(
      {dtype(type), static_cast<Activation>(kind), gated, rows, size, pointer(x), pointer(bias), pointer(y)},
      device(index, stream));
}

void backward(int index, Address stream, int type, int kind, bool gated, int64_t rows, int64_t size, Address dy,
              Address x, Address bias, Address dx, Address dbias, int64_t row_blocks, Address partial) {
  activation_backward({dtype(type), static_cast<Activation>(kind), gated, rows, size, pointer(dy), pointer(x),
                       pointer(bias), pointer(dx), pointer(dbias), row_blocks, pointer<float>(partial)},
                      device(index, stream));
}

}  // namespace

void register_activation(pybind11::module_& m) {
  m.attr("ACTIVATION_ROW_BLOCKS") = kActivationRowBlocks;
  m.attr("ACTIVATION_ROW_BLOCKS_CUDA") = kActivationRowBlocksCuda;
  m.def("activation_forward", &forward, Released());
  m.def("activation_backward", &backward, Released());
}

}  // namespace megalm
