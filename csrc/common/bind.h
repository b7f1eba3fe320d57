// What every bind.cpp uses. Tensors come in as addresses (0 = none) and the stream as an integer, so that the binding
// needs no torch header; dtype, device, shape and contiguity are checked in megalm/ops, which knows the tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "common/op.h"

namespace megalm {

using Address = std::uintptr_t;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Device device(int index, Address stream) { return {index, pointer(stream)}; }
inline DType dtype(int code) { return static_cast<DType>(code); }

// Kernels touch no Python object: other threads may run meanwhile.
using Released = pybind11::call_guard<pybind11::gil_scoped_release>;

}  // namespace megalm
