#include "common/bind.h"

#include "rope/op.h"

namespace megalm {
namespace {

void run(int index, Address stream, int type, bool interleaved, bool inverse, int64_t sequence, int64_t batch,
         int64_t heads, int64_t size, int64_t pairs, int64_t sequence_stride, int64_t batch_stride, int64_t head_stride,
         int64_t y_sequence_stride, int64_t y_batch_stride, int64_t y_head_stride, int64_t table_sequence_stride,
         int64_t table_batch_stride, Address x, Address cos, Address sin, Address y) {
  rotary({dtype(type),
          interleaved,
          inverse,
          sequence,
          batch,
          heads,
          size,
          pairs,
          sequence_stride,
          batch_stride,
          head_stride,
          y_sequence_stride,
          y_batch_stride,
          y_head_stride,
          table_sequence_stride,
          table_batch_stride,
          pointer(x),
          pointer<float>(cos),
          pointer<float>(sin),
          pointer(y)},
         device(index, stream));
}

}  // namespace

void register_rope(pybind11::module_& m) { m.def("rotary", &run, Released()); }

}  // namespace megalm
