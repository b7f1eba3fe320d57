#include "common/bind.h"

#include "moe_permute/op.h"

namespace megalm {
namespace {

void run_row_map(int index, Address stream, int64_t slots, int64_t experts, int64_t chunks, Address chosen,
                 Address rows, Address sources, Address counts, Address partial) {
  row_map({slots, experts, chunks, pointer<int64_t>(chosen), pointer<int64_t>(rows), pointer<int64_t>(sources),
           pointer<int64_t>(counts), pointer<int64_t>(partial)},
          device(index, stream));
}

void run_spread(int index, Address stream, int type, int64_t tokens, int64_t top_k, int64_t size, Address x, Address y,
                Address rows, Address weights, Address out, Address dweights) {
  spread({dtype(type), tokens, top_k, size, pointer(x), pointer(y), pointer<int64_t>(rows), pointer<float>(weights),
          pointer(out), pointer<float>(dweights)},
         device(index, stream));
}

void run_collect(int index, Address stream, int type, int64_t tokens, int64_t top_k, int64_t size, Address x,
                 Address rows, Address weights, Address out) {
  collect({dtype(type), tokens, top_k, size, pointer(x), pointer<int64_t>(rows), pointer<float>(weights), pointer(out)},
          device(index, stream));
}

}  // namespace

void register_moe_permute(pybind11::module_& m) {
  m.attr("ROW_MAP_EXPERTS") = kRowMapExperts;
  m.attr("ROW_MAP_CHUNKS") = kRowMapChunks;
  m.def("moe_row_map", &run_row_map, Released());
  m.def("moe_spread", &run_spread, Released());
  m.def("moe_collect", &run_collect, Released());
}

}  // namespace megalm
