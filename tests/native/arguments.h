// A kernel as a Python function: its arguments are the fields of its argument struct in their order, NumPy arrays or
// None for pointers (bf16 as uint16), numbers for the rest.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>
#include <utility>

#include "kernels.h"

namespace fastft::test {

namespace py = pybind11;

template <class T>
py::dtype dtype_of() {
  return py::dtype::of<T>();
}
template <>
inline py::dtype dtype_of<bf16>() {
  return py::dtype("uint16");
}
template <>
inline py::dtype dtype_of<f16>() {
  return py::dtype("float16");
}

// A Python value that becomes whatever field it initialises.
struct Value {
  py::handle object;
  size_t position;

  template <class T>
  operator T*() const {
    if (object.is_none()) return nullptr;
    if (!py::isinstance<py::array>(object)) fail("is neither an array nor None");
    const auto array = py::reinterpret_borrow<py::array>(object);
    if (!array.dtype().is(dtype_of<std::remove_const_t<T>>()))
      fail("is an array of " + std::string(py::str(array.dtype())));
    if (!(array.flags() & py::array::c_style)) fail("is not contiguous");
    if (!std::is_const_v<T> && !array.writeable()) fail("is not writeable");
    return static_cast<T*>(const_cast<void*>(array.data()));
  }

  template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
  operator T() const {
    return py::cast<T>(object);
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw py::type_error("argument " + std::to_string(position) + " " + what);
  }
};

// The number of fields of an aggregate: the most Values that initialise one.
template <class Args, size_t... I>
auto initialises(std::index_sequence<I...>) -> decltype(Args{(void(I), std::declval<Value>())...}, std::true_type());
template <class Args>
std::false_type initialises(...);

template <class Args, size_t n = 64>
constexpr size_t field_count() {
  if constexpr (n == 0 || decltype(initialises<Args>(std::make_index_sequence<n>()))::value)
    return n;
  else
    return field_count<Args, n - 1>();
}

template <class Args, size_t... I>
Args from_python(const py::args& values, std::index_sequence<I...>) {
  return Args{Value{values[I], I}...};
}

// run(args) computes; the GIL stays held.
template <class Args, class Run>
void define(py::module_& module, const std::string& name, Run run) {
  module.def(name.c_str(), [name, run](const py::args& values) {
    constexpr size_t count = field_count<Args>();
    if (values.size() != count)
      throw py::type_error(name + " takes " + std::to_string(count) + " arguments, got " +
                           std::to_string(values.size()));
    run(from_python<Args>(values, std::make_index_sequence<count>()));
  });
}

}  // namespace fastft::test
