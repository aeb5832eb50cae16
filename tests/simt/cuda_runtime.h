// Stands in for CUDA's header of the same name: what the kernels of csrc/cuda use of CUDA, so that g++ compiles their
// unchanged sources and executor.cpp runs them on the CPU, one fiber per thread. It is stricter than a GPU: what CUDA
// leaves undefined is an error here. What is missing is a compile error.
#pragma once
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __shared__ static thread_local  // all of it is the module's thread-local storage: the executor can poison it

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern __thread uint3 threadIdx, blockIdx;  // __thread: thread_local would ask for an initialiser at each access
extern __thread uint3 blockDim, gridDim;

namespace simt {

struct Site {  // where in the source a thread waits
  const char* file;
  int line;
};

struct Lanes {
  uint64_t values[32];
  unsigned present;  // the lanes that took part: those of the mask that have not exited
  int own;           // the calling thread's
};

void barrier(Site);
Lanes exchange(unsigned mask, uint64_t value, Site);  // a value from each lane of the mask, to each of them
[[noreturn]] void fail(const char* what, Site);       // an error of the calling thread

// Runs every thread of the grid. Throws std::runtime_error naming block, thread and line where a kernel is wrong.
void run(dim3 grid, dim3 block, void (*body)(void*), void* context);

// The threads of a block take turns in ascending order (seed 0), or in an order drawn anew for each turn.
void set_order(uint64_t seed);

template <class T>
T shuffle(unsigned mask, T value, Site site, int (*source)(int lane, int argument), int argument) {
  static_assert(sizeof value == 4 || sizeof value == 8, "CUDA shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const Lanes lanes = exchange(mask, bits, site);
  const int from = source(lanes.own, argument);
  if (from < 0 || from >= 32) return value;
  if (!(lanes.present >> from & 1)) fail("shuffles from a lane that is not in the mask or has exited", site);
  std::memcpy(&value, &lanes.values[from], sizeof value);
  return value;
}

}  // namespace simt

#define FASTFT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(FASTFT_SITE) { simt::barrier({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, FASTFT_SITE) { simt::exchange(mask, 0, {file, line}); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, FASTFT_SITE) {
  return simt::shuffle(mask, value, {file, line}, [](int, int lane) { return lane & 31; }, lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, FASTFT_SITE) {
  return simt::shuffle(mask, value, {file, line}, [](int own, int bits) { return own ^ bits; }, bits);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, FASTFT_SITE) {
  return simt::shuffle(mask, value, {file, line}, [](int own, int delta) { return own - delta; }, delta);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, FASTFT_SITE) {
  return simt::shuffle(mask, value, {file, line}, [](int own, int delta) { return own + delta; }, delta);
}
#undef FASTFT_SITE

// As on a GPU, an assertion fails the launch; the process goes on. Kernels include <cassert> before this file.
#undef assert
#define assert(condition) ((condition) ? void() : simt::fail("fails assertion " #condition, {__FILE__, __LINE__}))

// ---- the part of the runtime that launch() in device.cuh calls
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

inline cudaError_t cudaFuncGetName(const char** name, const void*) {
  *name = "kernel";
  return cudaSuccess;
}

namespace simt {

template <class... P>
struct Call {
  void (*kernel)(P...);
  void** args;
  template <size_t... I>
  void operator()(std::index_sequence<I...>) const {
    kernel(*static_cast<P*>(args[I])...);
  }
  static void run(void* call) { (*static_cast<const Call*>(call))(std::index_sequence_for<P...>{}); }
};

}  // namespace simt

template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  const bool fits = grid.x && grid.y && grid.z && grid.x < 1u << 31 && grid.y < 1u << 16 && grid.z < 1u << 16 &&
                    block.x && block.y && block.z && block.z <= 64 && size_t(block.x) * block.y * block.z <= 1024;
  if (!fits || shared) return cudaErrorInvalidConfiguration;
  simt::Call<P...> call{kernel, args};
  simt::run(grid, block, &simt::Call<P...>::run, &call);
  return cudaSuccess;
}
