#include "common/op.h"
#include "common/portable_cuda.h"

namespace megalm {

#if defined(__CUDACC__)

DeviceGuard::DeviceGuard(int index) : previous_(-1) {
  cudaError_t error = cudaGetDevice(&previous_);
  if (error == cudaSuccess && previous_ != index) {
    error = cudaSetDevice(index);
  } else {
    previous_ = -1;
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA device: ") + cudaGetErrorString(error));
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

#else

DeviceGuard::DeviceGuard(int) : previous_(-1) {}
DeviceGuard::~DeviceGuard() { (void)previous_; }

#endif

}  // namespace megalm
