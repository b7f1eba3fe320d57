#include "common/bind.h"

#include "adamw/op.h"

namespace megalm {
namespace {

void run(int index, Address stream, int64_t size, float lr, float beta1, float beta2, float eps, float weight_decay,
         float correction1, float correction2, float grad_scale, Address grad_scale_pointer, Address skip,
         Address master, Address grad, Address exp_avg, Address exp_avg_sq, int out_type, Address out, int64_t segments,
         Address segment_ends, Address segment_rates) {
  adamw({size,
         lr,
         beta1,
         beta2,
         eps,
         weight_decay,
         correction1,
         correction2,
         grad_scale,
         pointer<float>(grad_scale_pointer),
         pointer<float>(skip),
         pointer<float>(master),
         pointer<float>(grad),
         pointer<float>(exp_avg),
         pointer<float>(exp_avg_sq),
         dtype(out_type),
         pointer(out),
         segments,
         pointer<int64_t>(segment_ends),
         pointer<float>(segment_rates)},
        device(index, stream));
}

void squares(int index, Address stream, int64_t segments, float beta2, float eps, float correction2, float grad_scale,
             Address grad_scale_pointer, Address grad, Address exp_avg_sq, Address segment_ends, Address block_starts,
             int64_t blocks, Address partial, Address result) {
  adamw_squares({segments, beta2, eps, correction2, grad_scale, pointer<float>(grad_scale_pointer),
                 pointer<float>(grad), pointer<float>(exp_avg_sq), pointer<int64_t>(segment_ends),
                 pointer<int64_t>(block_starts), blocks, pointer<double>(partial), pointer<double>(result)},
                device(index, stream));
}

}  // namespace

void register_adamw(pybind11::module_& m) {
  m.attr("ADAMW_BLOCK") = kAdamWBlock;
  m.def("adamw", &run, Released());
  m.def("adamw_squares", &squares, Released());
}

}  // namespace megalm
