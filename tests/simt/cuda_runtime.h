// Stands in for CUDA's header of the same name: what the kernels of csrc/cuda use of CUDA, so that g++ compiles their
// unchanged sources and executor.cpp runs them on the CPU, one fiber per thread. It is stricter than a GPU: what CUDA
// leaves undefined is an error here. What is missing is a compile error.
#pragma once
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <unordered_map>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static  // which ASan surrounds with redzones, and executor.cpp finds by that
#else
#define __shared__ static thread_local  // all of it is the module's thread-local storage, where executor.cpp finds it
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Vectors are read and written whole, at multiples of their size.
#define SIMT_VECTORS(T, name)                                \
  struct alignas(8) name##2 { T x, y; };                     \
  struct alignas(16) name##4 { T x, y, z, w; };              \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTORS(float, float)
SIMT_VECTORS(int, int)
SIMT_VECTORS(unsigned, uint)
#undef SIMT_VECTORS
struct alignas(16) double2 {
  double x, y;
};

extern uint3 threadIdx, blockIdx, blockDim, gridDim;

#define SIMT_UNWATCHED __attribute__((no_sanitize("thread")))  // what is not a kernel's code

namespace simt {

struct Site {  // where in the source a thread waits
  const char* file;
  int line;
};

void barrier(Site);

// What the lanes of a warp brought to an operation; null: a lane that is not in the mask or has exited.
struct Lanes {
  void* data[32];
};
// Waits for the lanes of the mask that have not exited; then `operation` is called once, with the data of each.
void warp_operation(unsigned mask, void* data, void (*operation)(const Lanes&), Site);
// The same of a whole warp, none of whose lanes may have exited.
void whole_warp_operation(void* data, void (*operation)(const Lanes&), Site);
void sync_lanes(unsigned mask, Site);

[[noreturn]] void fail(const char* what, Site);  // an error of the calling thread
bool is_shared(const void* address);
void atomic_access(const void* address, size_t bytes, const void* place);  // by the calling thread, from there
unsigned char* dynamic_shared();                                           // of the running block

// cp.async: a copy arrives in shared memory when its group is waited for, by the thread that started it.
void copy_later(void* shared, const void* bytes16);
void commit_copies();
void wait_for_copies(size_t groups_left);

// Runs every thread of the grid. Throws std::runtime_error naming block, thread and line where a kernel is wrong.
void run(const void* kernel, dim3 grid, dim3 block, size_t shared, void (*body)(void*), void* context);
// How often each kernel ran to its end so far, with each seed.
const std::unordered_map<const void*, std::vector<int64_t>>& launches();

// Blocks, and the threads of a block, take turns in ascending order (seed 0), or in one that is drawn; threads' is drawn
// anew for each turn.
void set_order(uint64_t seed);
// So many blocks of a grid are run, the last ones; 0: all. For grids that would take hours.
void set_last_blocks(size_t count);

template <class T>
struct Shuffle {
  T value, result;
  int source;    // lane
  bool missing;  // that lane is not there
};

template <class T>
SIMT_UNWATCHED T shuffle(unsigned mask, T value, int (*source)(int lane, int argument), int argument, Site site) {
  static_assert(sizeof value == 4 || sizeof value == 8, "CUDA shuffles 4 or 8 bytes");
  Shuffle<T> mine{value, value, argument, false};
  struct Source {
    Shuffle<T>* shuffle;
    int (*source)(int lane, int argument);
  } given{&mine, source};
  warp_operation(
      mask, &given,
      [](const Lanes& lanes) SIMT_UNWATCHED {
        for (int lane = 0; lane < 32; ++lane) {
          if (!lanes.data[lane]) continue;
          const Source& own = *static_cast<Source*>(lanes.data[lane]);
          const int from = own.source(lane, own.shuffle->source);
          if (from < 0 || from >= 32) continue;  // keeps its own value
          own.shuffle->missing = !lanes.data[from];
          if (lanes.data[from]) own.shuffle->result = static_cast<Source*>(lanes.data[from])->shuffle->value;
        }
      },
      site);
  if (mine.missing) fail("shuffles from a lane that is not in the mask or has exited", site);
  return mine.result;
}

struct Vote {
  bool value;
  unsigned ballot;
};

SIMT_UNWATCHED inline unsigned ballot(unsigned mask, bool value, Site site) {
  Vote mine{value, 0};
  warp_operation(
      mask, &mine,
      [](const Lanes& lanes) SIMT_UNWATCHED {
        unsigned ballot = 0;
        for (int lane = 0; lane < 32; ++lane)
          if (lanes.data[lane] && static_cast<Vote*>(lanes.data[lane])->value) ballot |= 1u << lane;
        for (void* vote : lanes.data)
          if (vote) static_cast<Vote*>(vote)->ballot = ballot;
      },
      site);
  return mine.ballot;
}

}  // namespace simt

#define FASTFT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(FASTFT_SITE) { simt::barrier({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, FASTFT_SITE) { simt::sync_lanes(mask, {file, line}); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, FASTFT_SITE) {
  return simt::shuffle(mask, value, [](int, int lane) { return lane & 31; }, lane, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, FASTFT_SITE) {
  return simt::shuffle(mask, value, [](int own, int bits) { return own ^ bits; }, bits, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, FASTFT_SITE) {
  return simt::shuffle(mask, value, [](int own, int delta) { return own - delta; }, delta, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, FASTFT_SITE) {
  return simt::shuffle(mask, value, [](int own, int delta) { return own + delta; }, delta, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, bool value, FASTFT_SITE) {
  return simt::ballot(mask, value, {file, line});
}
inline bool __any_sync(unsigned mask, bool value, FASTFT_SITE) { return simt::ballot(mask, value, {file, line}); }
inline bool __all_sync(unsigned mask, bool value, FASTFT_SITE) { return !simt::ballot(mask, !value, {file, line}); }
#undef FASTFT_SITE

// Atomic operations: threads take turns, so that nothing comes between.
#define SIMT_ATOMIC(name, expression)                                           \
  template <class T>                                                            \
  SIMT_UNWATCHED T name(T* address, T value) {                                  \
    simt::atomic_access(address, sizeof *address, __builtin_return_address(0)); \
    const T old = *address;                                                     \
    *address = expression;                                                      \
    return old;                                                                 \
  }
SIMT_ATOMIC(atomicAdd, T(old + value))
SIMT_ATOMIC(atomicMax, old > value ? old : value)
SIMT_ATOMIC(atomicExch, value)
#undef SIMT_ATOMIC
inline void __threadfence() {}
inline void __threadfence_block() {}

// As on a GPU, an assertion fails the launch; the process goes on. Kernels include <cassert> before this file.
#undef assert
#define assert(condition) ((condition) ? void() : simt::fail("fails assertion " #condition, {__FILE__, __LINE__}))

// ---- the part of the runtime that launch() in device.cuh calls
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}

inline cudaError_t cudaFuncGetName(const char** name, const void*) {
  *name = "kernel";
  return cudaSuccess;
}

namespace simt {

constexpr size_t kMostShared = 99 << 10;    // bytes a block may have on compute capability 8.6, the least of any
size_t& dynamic_limit(const void* kernel);  // 48 KB unless raised by cudaFuncSetAttribute

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

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || size_t(bytes) > simt::kMostShared) return cudaErrorInvalidValue;
  simt::dynamic_limit(kernel) = size_t(bytes);
  return cudaSuccess;
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  const bool fits = grid.x && grid.y && grid.z && grid.x < 1u << 31 && grid.y < 1u << 16 && grid.z < 1u << 16 &&
                    block.x && block.y && block.z && block.z <= 64 && size_t(block.x) * block.y * block.z <= 1024;
  if (!fits) return cudaErrorInvalidConfiguration;
  if (shared > simt::dynamic_limit(reinterpret_cast<const void*>(kernel))) return cudaErrorInvalidValue;
  simt::Call<P...> call{kernel, args};
  simt::run(reinterpret_cast<const void*>(kernel), grid, block, shared, &simt::Call<P...>::run, &call);
  return cudaSuccess;
}
