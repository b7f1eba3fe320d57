#include "common/bind.h"

#include "softmax/op.h"

namespace megalm {
namespace {

void forward(int index, Address stream, int type, int64_t batch, int64_t heads, int64_t queries, int64_t keys,
             float scale, Address x, Address slopes, Address starts, Address y) {
  softmax_forward({dtype(type), batch, heads, queries, keys, scale, pointer(x), pointer<float>(slopes),
                   pointer<int32_t>(starts), pointer(y)},
                  device(index, stream));
}

void backward(int index, Address stream, int type, int64_t batch, int64_t heads, int64_t queries, int64_t keys,
              float scale, Address dy, Address y, Address starts, Address dx) {
  softmax_backward(
      {dtype(type), batch, heads, queries, keys, scale, pointer(dy), pointer(y), pointer<int32_t>(starts), pointer(dx)},
      device(index, stream));
}

}  // namespace

void register_softmax(pybind11::module_& m) {
  m.def("softmax_forward", &forward, Released());
  m.def("softmax_backward", &backward, Released());
}

}  // namespace megalm
