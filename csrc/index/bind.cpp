#include "common/bind.h"

#include "index/op.h"

namespace megalm {
namespace {

void run_fill(uint64_t key, uint64_t first, uint64_t stride, int64_t rows, int64_t columns, double scale, Address out) {
  fill({key, first, stride, rows, columns, scale, pointer<float>(out)});
}

void run_permute(uint64_t size, int64_t count, bool one_key, Address index, Address keys, Address out) {
  permute({size, count, one_key, pointer<int64_t>(index), pointer<uint64_t>(keys), pointer<int64_t>(out)});
}

void run_deal(int64_t sources, int64_t unit, int64_t slack, int64_t first, int64_t count, Address shares, Address given,
              Address source, Address rank) {
  deal({sources, unit, slack, first, count, pointer<int64_t>(shares), pointer<int64_t>(given), pointer<int64_t>(source),
        pointer<int64_t>(rank)});
}

void run_dealt(int64_t sources, int64_t unit, int64_t slack, int64_t slots, Address shares, Address given) {
  dealt({sources, unit, slack, slots, pointer<int64_t>(shares), pointer<int64_t>(given)});
}

void run_greedy(int64_t sources, int64_t count, Address shares, Address counts, Address source, Address rank) {
  greedy({sources, count, pointer<double>(shares), pointer<int64_t>(counts), pointer<int16_t>(source),
          pointer<int64_t>(rank)});
}

void run_starts(int64_t samples, int64_t length, int64_t first, Address order, Address sizes, Address entries,
                Address offsets) {
  starts({samples, length, first, pointer<int32_t>(order), pointer<int64_t>(sizes), pointer<int64_t>(entries),
          pointer<int64_t>(offsets)});
}

}  // namespace

void register_index(pybind11::module_& m) {
  m.def("fill", &run_fill, Released());
  m.def("permute", &run_permute, Released());
  m.def("deal", &run_deal, Released());
  m.def("dealt", &run_dealt, Released());
  m.def("greedy", &run_greedy, Released());
  m.def("starts", &run_starts, Released());
}

}  // namespace megalm
