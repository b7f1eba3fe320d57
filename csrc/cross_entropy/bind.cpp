#include "common/bind.h"

#include "cross_entropy/op.h"

namespace megalm {
namespace {

void forward(int index, Address stream, int type, int64_t rows, int64_t columns, int64_t stride, int64_t first,
             Address logits, Address labels, Address peak, Address total, Address target, Address sum) {
  cross_entropy_forward({dtype(type), rows, columns, stride, first, pointer(logits), pointer<int64_t>(labels),
                         pointer<float>(peak), pointer<float>(total), pointer<float>(target), pointer<float>(sum)},
                        device(index, stream));
}

void backward(int index, Address stream, int type, int64_t rows, int64_t columns, int64_t stride, int64_t first,
              float smoothing, float uniform, Address logits, Address labels, Address log_z, Address scale,
              Address weight, Address gradient) {
  cross_entropy_backward(
      {dtype(type), rows, columns, stride, first, smoothing, uniform, pointer(logits), pointer<int64_t>(labels),
       pointer<float>(log_z), pointer<float>(scale), pointer<float>(weight), pointer(gradient)},
      device(index, stream));
}

}  // namespace

void register_cross_entropy(pybind11::module_& m) {
  m.def("cross_entropy_forward", &forward, Released());
  m.def("cross_entropy_backward", &backward, Released());
}

}  // namespace megalm
