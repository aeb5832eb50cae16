// The CUDA kernels of kernels.h as a Python module: a function <kernel>_<dtypes> for each, see native/arguments.h, which
// runs on executor.cpp; set_order(seed); and the kernels of planted.cu. A new kernel needs no line here.
#include <pybind11/numpy.h>

#include "cuda_runtime.h"
#include "native/arguments.h"
#include "planted.h"

namespace fastft::test {
namespace {

template <class A, class B>
struct Types {
  using T = A;
  using W = B;
};

template <template <class, class> class Args, class Kernel>
void define_dtypes(py::module_& module, const std::string& name, const Kernel& kernel) {
#define FASTFT_X(suffix, T, W) \
  define<Args<T, W>>(module, name + "_" #suffix, [=](const Args<T, W>& args) { kernel(Types<T, W>())(args, nullptr); });
  FASTFT_CUDA_DTYPES(FASTFT_X)
#undef FASTFT_X
}

}  // namespace
}  // namespace fastft::test

PYBIND11_MODULE(fastft_simt, module) {
  module.def("set_order", &simt::set_order);
#define FASTFT_X(name) \
  module.def("planted_" #name, [](pybind11::array_t<float> out) { planted::name(out.mutable_data()); });
  PLANTED_KERNELS(FASTFT_X)
  FASTFT_X(too_many_threads)
#undef FASTFT_X
#define FASTFT_X(name, Args)                                                \
  fastft::test::define_dtypes<fastft::Args>(module, #name, [](auto types) { \
    using Dtypes = decltype(types);                                         \
    return &fastft::cuda::name<typename Dtypes::T, typename Dtypes::W>;     \
  });
  FASTFT_KERNELS(FASTFT_X)
#undef FASTFT_X
}
