// What every CUDA kernel uses: launch(), grid sizes, vectors, reductions over a warp and a block.
// Kernels are compiled by nvcc, and by g++ against the host implementation of CUDA in tests/simt.
#pragma once
#include <cuda_runtime.h>
#include <cxxabi.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "kernels.h"
#include "numeric.h"  // to_float, from_float, Compute<T>

namespace fastft::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What launchers throw. Not std::runtime_error: <string>, which it brings, would be a fifth of the time of a short file,
// whose headers three front ends read.
class Failure : public std::exception {
 public:
  template <class... Values>
  explicit Failure(const char* format, Values... values) {
    snprintf(text_, sizeof text_, format, values...);
  }
  const char* what() const noexcept override { return text_; }

 private:
  char text_[1024];
};

// ---- starting a kernel

// Kernels are numbered along x only, which reaches 2^31 - 1 blocks; y and z end at 65535.
inline dim3 grid_of(int64_t blocks) {
  if (blocks >= int64_t(1) << 31)
    throw Failure("fastft: %lld blocks are more than a CUDA grid holds", static_cast<long long>(blocks));
  return dim3(unsigned(blocks));
}

// What a kernel gets without asking first.
constexpr size_t kSharedUnasked = 48 << 10;

// What a user can do about an error of CUDA's; _library.py finds most of it out before.
inline const char* advice(cudaError_t error) {
  switch (int(error)) {  // by number: tests/simt has few of the names
    case 35:             // cudaErrorInsufficientDriver
      return "; update the NVIDIA driver, or build fastft with an older CUDA";
    case 209:  // cudaErrorNoKernelImageForDevice
    case 222:  // cudaErrorUnsupportedPtxVersion
      return "; build fastft with FASTFT_CUDA_ARCHS for this GPU, from sm_80 on";
    default:
      return "";
  }
}

[[noreturn]] inline void refuse(const void* kernel, cudaError_t error) {
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, kernel) != cudaSuccess || !mangled) mangled = "kernel";
  char* const readable = abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr);
  const Failure failure("fastft: %.700s: CUDA error: %s%s", readable ? readable : mangled, cudaGetErrorString(error),
                        advice(error));
  std::free(readable);
  throw failure;
}

template <class T>
struct AsGiven {
  using type = T;
};

// Starts kernel(args...) with `shared` bytes of dynamic shared memory; an empty grid is no work. Not <<<>>>, which g++
// cannot parse.
template <class... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream stream,
            typename AsGiven<P>::type... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  void* pointers[] = {&args...};
  cudaError_t error = cudaSuccess;
  if (shared > kSharedUnasked)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error == cudaSuccess)
    error = cudaLaunchKernel(kernel, grid, block, pointers, shared, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) refuse(reinterpret_cast<const void*>(kernel), error);
}

// ---- vectors: n neighbours in memory that are moved at once

template <class T, int n>
struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Vector {
  T v[n];
};

// How many neighbours of each of these types are at most 16 bytes.
template <class T, class... More>
constexpr int kWidth = kWidth<T> < kWidth<More...> ? kWidth<T> : kWidth<More...>;
template <class T>
constexpr int kWidth<T> = 16 / int(sizeof(T));

// Whether vectors may begin at each of these, of which some may be null.
template <class... T>
__host__ __device__ bool aligned(const T*... data) {
  return ((reinterpret_cast<uintptr_t>(data) % 16 == 0) && ...);
}

// ---- reductions by a commutative op: every thread gets the same bits; the order depends on the block's size only

struct Sum {
  template <class F>
  __device__ F operator()(F a, F b) const {
    return a + b;
  }
};

struct Max {  // NaN if either is: fmax would drop it
  template <class F>
  __device__ F operator()(F a, F b) const {
    return a > b || a != a ? a : b;
  }
};

template <class F, class Op>
__device__ F warp_reduce(F value, Op op) {
  for (int bits = kWarp / 2; bits; bits /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, bits));
  return value;
}

// For one-dimensional blocks of exactly kThreads.
template <int kThreads, class F, class Op>
__device__ F block_reduce(F value, Op op) {
  static_assert(kThreads % kWarp == 0 && kThreads <= 1024, "whole warps");
  __shared__ F partial[kThreads / kWarp];
  value = warp_reduce(value, op);
  __syncthreads();  // an earlier call's values have been read
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = partial[0];
  for (int warp = 1; warp < kThreads / kWarp; ++warp) value = op(value, partial[warp]);
  return value;
}

}  // namespace fastft::cuda
