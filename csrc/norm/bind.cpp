#include "common/bind.h"

#include "norm/op.h"

namespace megalm {
namespace {

void forward(int index, Address stream, int type, bool layer_norm, int64_t rows, int64_t size, float eps, Address x,
             Address residual, Address weight, Address bias, Address h, Address y, Address mean, Address rstd) {
  norm_forward({dtype(type), layer_norm, rows, size, eps, pointer(x), pointer(residual), pointer(weight), pointer(bias),
                pointer(h), pointer(y), pointer<float>(mean), pointer<float>(rstd)},
               device(index, stream));
}

void backward(int index, Address stream, int type, bool layer_norm, int64_t rows, int64_t size, int64_t row_blocks,
              Address dy, Address dh, Address h, Address weight, Address mean, Address rstd, Address dx,
              Address dweight, Address dbias, Address partial) {
  norm_backward({dtype(type), layer_norm, rows, size, row_blocks, pointer(dy), pointer(dh), pointer(h), pointer(weight),
                 pointer<float>(mean), pointer<float>(rstd), pointer(dx), pointer(dweight), pointer(dbias),
                 pointer<float>(partial)},
                device(index, stream));
}

}  // namespace

void register_norm(pybind11::module_& m) {
  m.attr("NORM_ROW_BLOCKS") = kNormRowBlocks;
  m.attr("NORM_ROW_BLOCKS_CUDA") = kNormRowBlocksCuda;
  m.attr("NORM_SLACK") = kNormSlack;
  m.def("norm_forward", &forward, Released());
  m.def("norm_backward", &backward, Released());
}

}  // namespace megalm
