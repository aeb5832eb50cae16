// The CUDA kernels of kernels.h as a Python module: a function <kernel>_<dtypes> for each, see native/arguments.h, which
// runs on executor.cpp; set_order(seed), set_last_blocks(count); and the kernels of planted.cu. A new kernel needs no line here.
#include <dlfcn.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <map>

#include "cuda_runtime.h"
#include "fragments.h"
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

// A function of pointers, with arrays in their place; how large they are is the caller's business.
template <class T>
struct OfPython {
  using type = T;
  static T pointer(T value) { return value; }
};
template <class T>
struct OfPython<T*> {
  using type = py::array_t<std::remove_const_t<T>, py::array::c_style>;
  static T* pointer(type& array) {
    if constexpr (std::is_const_v<T>)
      return array.data();
    else
      return array.mutable_data();
  }
};
template <class... P>
void define_raw(py::module_& module, const char* name, void (*function)(P...)) {
  const auto call = [function](typename OfPython<P>::type... args) { function(OfPython<P>::pointer(args)...); };
  module.def(name, call);
}

// Kernels' addresses in the module's file, as nm prints them, and how often each ran to its end, by order of threads.
std::map<uintptr_t, std::vector<int64_t>> launches() {
  Dl_info module;
  dladdr(reinterpret_cast<void*>(&launches), &module);
  std::map<uintptr_t, std::vector<int64_t>> counts;
  for (const auto& [kernel, by_order] : simt::launches())
    counts[reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(module.dli_fbase)] = by_order;
  return counts;
}

}  // namespace
}  // namespace fastft::test

PYBIND11_MODULE(fastft_simt, module) {
  module.def("set_order", &simt::set_order);
  module.def("set_last_blocks", &simt::set_last_blocks);
  module.def("launches", &fastft::test::launches);
#define FASTFT_X(name) fastft::test::define_raw(module, "fragments_" #name, &fragments::name);
  FASTFT_X(ldmatrix)
  FASTFT_X(mma_bf16)
  FASTFT_X(mma_f16)
  FASTFT_X(mma_tf32)
  FASTFT_X(product)
#undef FASTFT_X
#define FASTFT_X(name) fastft::test::define_raw(module, "planted_" #name, &planted::name);
  PLANTED_KERNELS(FASTFT_X)
  FASTFT_X(too_many_threads)
#undef FASTFT_X
#define FASTFT_X(name, Args)                                                \
  fastft::test::define_dtypes<fastft::Args>(module, #name, [](auto types) { \
    using Dtypes = decltype(types);                                         \
    return &fastft::cuda::name<typename Dtypes::T, typename Dtypes::W>;     \
  });
  FASTFT_CUDA_KERNELS(FASTFT_X)
#undef FASTFT_X
}
