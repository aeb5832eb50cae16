// The CPU kernels of kernels.h as a Python module: a function <kernel>_<dtypes> for each, see arguments.h;
// set_isa(name), set_threads(n) and set_scattered(whether) choose how they run. And functions.h: elementwise(name, isa, y, x).
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "arguments.h"
#include "functions.h"

namespace fastft::test {
namespace {

int threads = 1;
bool scattered =
    false;  // what kernels are told of where their operands lie: over many small pages, or a few large ones

// Plain threads, and scratch blocks of exactly the bytes asked for, so that an overrun shows.
struct Serve {
  std::vector<void*> blocks;
  Host host{threads, &parallel_for, this, &scratch, &in_small_pages};

  ~Serve() {
    for (void* block : blocks) std::free(block);
  }

  static void parallel_for(int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
    std::vector<std::thread> started;
    for (int64_t task = 1; task < tasks; ++task) started.emplace_back(body, context, task, task + 1);
    body(context, 0, 1);
    for (std::thread& thread : started) thread.join();
  }

  static void* scratch(void* owner, size_t bytes) {
    void* block = nullptr;
    if (posix_memalign(&block, 64, bytes)) throw std::bad_alloc();
    std::memset(block, 0xff, bytes);  // NaN: what is read must have been written
    static_cast<Serve*>(owner)->blocks.push_back(block);
    return block;
  }

  static size_t in_small_pages(const void*, size_t) { return scattered ? size_t(1) << 40 : 0; }
};

template <template <class, class> class Args>
void define_dtypes(py::module_& module, const std::string& name, cpu::ByDtype<Args> cpu::Kernels::* kernel) {
#define FASTFT_X(suffix, T, W)                   \
  define<Args<T, W>>(module, name + "_" #suffix, \
                     [kernel](const Args<T, W>& args) { (cpu::kernels().*kernel)(args, Serve().host); });
  FASTFT_CPU_DTYPES(FASTFT_X)
#undef FASTFT_X
}

const Functions* const kSets[] = {
#define FASTFT_X(isa) &cpu::isa::functions,
    FASTFT_TEST_SETS(FASTFT_X)
#undef FASTFT_X
};

void elementwise(const std::string& name, const std::string& isa, py::array y, py::array x) {
  if (y.ndim() != 1 || x.ndim() != 1 || y.size() != x.size())
    throw py::type_error("elementwise takes two rows of one length");
  for (const Functions* set : kSets)
    if (set && set->isa == isa)
      for (const Function* function = set->begin; function != set->end; ++function)
        if (function->name == name) {
          const Value to{y, 2}, from{x, 3};
          return py::isinstance<py::array_t<double>>(x) ? function->f64(to, from, x.size())
                                                        : function->f32(to, from, x.size());
        }
  throw py::key_error(name + ", " + isa);
}

}  // namespace
}  // namespace fastft::test

PYBIND11_MODULE(FASTFT_MODULE, module) {
  using namespace fastft;
  module.def("isas", &cpu::isas);
  module.def("set_isa", [](const char* name) {
    if (!cpu::set_isa(name)) throw std::invalid_argument(std::string(name) + " is not one of " + cpu::isas());
  });
  module.def("set_threads", [](int n) { test::threads = n; });
  module.def("set_scattered", [](bool scattered) { test::scattered = scattered; });
  module.def("elementwise", &test::elementwise);
#define FASTFT_X(name, Args) test::define_dtypes<Args>(module, #name, &cpu::Kernels::name);
  FASTFT_KERNELS(FASTFT_X)
#undef FASTFT_X
}
