#include "common/bind.h"

#include "quantize/op.h"

namespace megalm {
namespace {

void run_quantize(int index, Address stream, int type, int format, int block, bool power_of_two, int64_t rows,
                  int64_t columns, Address x, Address scale, Address out, Address out_t, Address scale_inv,
                  Address scale_inv_t, Address amax, Address partial) {
  quantize({dtype(type), static_cast<Format>(format), static_cast<Block>(block), power_of_two, rows, columns,
            pointer(x), pointer<float>(scale), pointer<uint8_t>(out), pointer<uint8_t>(out_t),
            pointer<float>(scale_inv), pointer<float>(scale_inv_t), pointer<float>(amax), pointer<uint32_t>(partial)},
           device(index, stream));
}

void run_amax(int index, Address stream, int type, int format, bool power_of_two, int64_t count, Address x, Address out,
              Address scale, Address partial) {
  amax({dtype(type), static_cast<Format>(format), power_of_two, count, pointer(x), pointer<float>(out),
        pointer<float>(scale), pointer<uint32_t>(partial)},
       device(index, stream));
}

void run_dequantize(int index, Address stream, int type, int format, int block, int64_t rows, int64_t columns,
                    Address q, Address scale_inv, Address out) {
  dequantize({dtype(type), static_cast<Format>(format), static_cast<Block>(block), rows, columns, pointer<uint8_t>(q),
              pointer<float>(scale_inv), pointer(out)},
             device(index, stream));
}

}  // namespace

void register_quantize(pybind11::module_& m) {
  m.attr("AMAX_CHUNK") = kAmaxChunk;
  m.def("fp8_quantize", &run_quantize, Released());
  m.def("fp8_amax", &run_amax, Released());
  m.def("fp8_dequantize", &run_dequantize, Released());
}

}  // namespace megalm
