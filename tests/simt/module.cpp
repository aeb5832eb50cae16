// The CUDA kernels of kernels.h as a Python module: a function <kernel>_<dtypes> for each, which takes the fields of
// its argument struct in their order, NumPy arrays or None for pointers (bf16 as uint16), numbers for the rest, and
// runs on executor.cpp. A new kernel needs no line here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <functional>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda_runtime.h"
#include "kernels.h"
#include "planted.h"

namespace py = pybind11;
using fastft::bf16;
using fastft::f16;

namespace {

template <class T>
py::dtype dtype_of() {
  return py::dtype::of<T>();
}
template <>
py::dtype dtype_of<bf16>() {
  return py::dtype("uint16");
}
template <>
py::dtype dtype_of<f16>() {
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
    if (!array.dtype().equal(dtype_of<std::remove_const_t<T>>()))
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

template <class Args, size_t n = 40>
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

template <class Args>
std::function<void(const py::args&)> callable(void (*kernel)(const Args&, fastft::Stream)) {
  return [kernel](const py::args& values) {
    constexpr size_t count = field_count<Args>();
    if (values.size() != count)
      throw py::type_error("takes " + std::to_string(count) + " arguments, got " + std::to_string(values.size()));
    kernel(from_python<Args>(values, std::make_index_sequence<count>()), nullptr);
  };
}

void add(py::module_& module, const std::string& name, std::function<void(const py::args&)> call) {
  module.def(name.c_str(), [call](const py::args& values) { call(values); });
}

template <class A, class B>
struct Types {
  using T = A;
  using W = B;
};

template <template <class, class> class Args, class Kernel>
void add_dtypes(py::module_& module, const std::string& name, const Kernel& kernel) {
#define FASTFT_X(suffix, T, W) add(module, name + "_" #suffix, callable<Args<T, W>>(kernel(Types<T, W>())));
  FASTFT_CUDA_DTYPES(FASTFT_X)
#undef FASTFT_X
}

}  // namespace

PYBIND11_MODULE(fastft_simt, module) {
  module.def("set_order", &simt::set_order);
#define FASTFT_X(name) module.def("planted_" #name, [](py::array_t<float> out) { planted::name(out.mutable_data()); });
  PLANTED_KERNELS(FASTFT_X)
  FASTFT_X(too_many_threads)
#undef FASTFT_X
#define FASTFT_X(name, Args)                                            \
  add_dtypes<fastft::Args>(module, #name, [](auto types) {              \
    using Dtypes = decltype(types);                                     \
    return &fastft::cuda::name<typename Dtypes::T, typename Dtypes::W>; \
  });
  FASTFT_KERNELS(FASTFT_X)
#undef FASTFT_X
}
