// How an op becomes a Python function: bind_op<norm_forward>(m, "norm_forward").
//
// The arguments are the device's index, its stream and the fields of the op's struct, in their order; a field that is
// an array takes as many as it has elements. The struct (op.h) is therefore the only list of an op's arguments in C++:
// Args{argument, argument, ...} hands each one to the field that it initialises, whose type says how it is read.
// Tensors come in as addresses (0 = none) and enumerations as integers, so that no torch header is needed; dtype,
// device, shape and contiguity are checked in megalm/ops, which knows the tensors.
//
// A function on the host alone takes no device. Where its struct ends in a pointer to a result, bind_op<minhash,
// bool>(...) gives the room for it and returns what was written there.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "common/op.h"

namespace megalm {

// A Python value on its way into a field.
class Argument {
 public:
  // It does not fit the field.
  struct Refused {
    int place;  // among the function's arguments, from 1
    PyObject* value;
    const char* wanted;
  };

  Argument(PyObject* value, int place) : value_(value), place_(place) {}

  template <typename T, typename = std::enable_if_t<std::is_scalar_v<T>>>
  operator T() const {
    if constexpr (std::is_pointer_v<T>) {
      return reinterpret_cast<T>(integer<std::uintptr_t>("an address"));
    } else if constexpr (std::is_enum_v<T>) {
      return static_cast<T>(integer<std::underlying_type_t<T>>("the number of a choice"));
    } else if constexpr (std::is_same_v<T, bool>) {
      if (!PyBool_Check(value_)) refuse("True or False");
      return value_ == Py_True;
    } else if constexpr (std::is_floating_point_v<T>) {
      return static_cast<T>(number());
    } else {
      return integer<T>(std::is_unsigned_v<T> ? "an unsigned integer of its size" : "an integer of its size");
    }
  }

 private:
  [[noreturn]] void refuse(const char* wanted) const {
    PyErr_Clear();
    throw Refused{place_, value_, wanted};
  }

  double number() const {
    if (PyFloat_CheckExact(value_)) return PyFloat_AS_DOUBLE(value_);
    const double found = PyBool_Check(value_) ? -1.0 : PyFloat_AsDouble(value_);
    if (found == -1.0 && (PyBool_Check(value_) || PyErr_Occurred())) refuse("a number");
    return found;
  }

  template <typename T>
  T integer(const char* wanted) const {
    if (PyBool_Check(value_)) refuse(wanted);
    if (!PyLong_Check(value_)) {  // numpy's integers, but no floats
      const auto whole = pybind11::reinterpret_steal<pybind11::object>(PyNumber_Index(value_));
      if (!whole) refuse(wanted);
      return Argument(whole.ptr(), place_).integer<T>(wanted);
    }
    if constexpr (std::is_unsigned_v<T>) {
      const unsigned long long found = PyLong_AsUnsignedLongLong(value_);
      if ((found == ~0ULL && PyErr_Occurred()) || found > std::numeric_limits<T>::max()) refuse(wanted);
      return static_cast<T>(found);
    } else {
      const long long found = PyLong_AsLongLong(value_);
      if ((found == -1 && PyErr_Occurred()) || found < std::numeric_limits<T>::min() ||
          found > std::numeric_limits<T>::max()) {
        refuse(wanted);
      }
      return static_cast<T>(found);
    }
  }

  PyObject* value_;
  int place_;
};

// How many arguments initialise a struct: the most that its braces take.
template <typename Void, typename Args, typename... Given>
struct Takes : std::false_type {};
template <typename Args, typename... Given>
struct Takes<std::void_t<decltype(Args{std::declval<Given>()...})>, Args, Given...> : std::true_type {};

template <typename Args, typename... Given>
constexpr int count_fields() {
  if constexpr (Takes<void, Args, Given..., Argument>::value) {
    return count_fields<Args, Given..., Argument>();
  } else {
    return sizeof...(Given);
  }
}

template <typename Args>
Args op_arguments(void (*)(const Args&, Device));
template <typename Args>
Args op_arguments(void (*)(const Args&));

template <auto op, typename Result>
class Binding {
  using Args = decltype(op_arguments(op));
  static constexpr bool kOnDevice = std::is_invocable_v<decltype(op), const Args&, Device>;
  static constexpr int kDevice = kOnDevice ? count_fields<Device>() : 0;
  static constexpr int kFields = count_fields<Args>() - (std::is_void_v<Result> ? 0 : 1);

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmissing-braces"  // clang wants braces around an array's elements
  // rest: what initialises the fields behind those of `values`.
  template <typename Struct, std::size_t... i, typename... Rest>
  static Struct read(PyObject* const* values, int before, std::index_sequence<i...>, Rest... rest) {
    return Struct{Argument(values[before + int(i)], before + int(i) + 1)..., rest...};
  }
#pragma GCC diagnostic pop

  static PyObject* run(PyObject* const* values) {
    constexpr std::make_index_sequence<kFields> fields;
    if constexpr (kOnDevice) {
      const Device device = read<Device>(values, 0, std::make_index_sequence<kDevice>());
      const Args args = read<Args>(values, kDevice, fields);
      const pybind11::gil_scoped_release released;  // no op touches a Python object
      op(args, device);
    } else if constexpr (std::is_void_v<Result>) {
      const Args args = read<Args>(values, 0, fields);
      const pybind11::gil_scoped_release released;
      op(args);
    } else {
      Result result{};
      const Args args = read<Args>(values, 0, fields, &result);
      {
        const pybind11::gil_scoped_release released;
        op(args);
      }
      return pybind11::cast(result).release().ptr();
    }
    Py_RETURN_NONE;
  }

 public:
  static PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t count) {
    const char* name = definition.ml_name;
    try {
      if (count == kDevice + kFields) return run(values);
      PyErr_Format(PyExc_TypeError, "%s takes %d arguments, not %zd: its struct in csrc/*/op.h lists them%s", name,
                   kDevice + kFields, count, kOnDevice ? ", behind the device's index and its stream" : "");
    } catch (const Argument::Refused& refused) {
      PyErr_Format(PyExc_TypeError, "%s: argument %d of %d is %R; it takes %s", name, refused.place, kDevice + kFields,
                   refused.value, refused.wanted);
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

  static inline PyMethodDef definition{nullptr, nullptr, METH_FASTCALL, nullptr};
};

// Not by pybind11's m.def, whose call takes twice as long.
template <auto op, typename Result = void>
void bind_op(pybind11::module_& m, const char* name) {
  using Bound = Binding<op, Result>;
  Bound::definition.ml_name = name;
  Bound::definition.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Bound::call));
  m.add_object(name, pybind11::reinterpret_steal<pybind11::object>(
                         PyCFunction_NewEx(&Bound::definition, nullptr, m.attr("__name__").ptr())));
}

}  // namespace megalm
