// Kernels with one planted bug each, which test_simt.py expects to be caught, and one with none.
#include <cassert>

#include "device.cuh"
#include "planted.h"

namespace planted {
namespace {

using fastft::cuda::kAllLanes;
using fastft::cuda::launch;

constexpr int kThreads = 64;

__global__ void none_kernel(float* out) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void missing_barrier_kernel(float* out) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = float(threadIdx.x);
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void missing_second_barrier_kernel(float* out) {  // right: 1 everywhere
  __shared__ float shared[kThreads];
  float sum = 0;
  for (int step = 0; step < 2; ++step) {
    shared[threadIdx.x] = float(step);
    __syncthreads();
    sum += shared[kThreads - 1 - threadIdx.x];
  }
  out[threadIdx.x] = sum;
}

__global__ void unwritten_shared_kernel(float* out) {
  __shared__ float shared[kThreads];
  if (threadIdx.x % 2) shared[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void divergent_barrier_kernel(float* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void exit_before_barrier_kernel(float* out) {
  if (threadIdx.x == kThreads - 1) return;
  __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void divergent_shuffle_kernel(float* out) {
  float value = 1;
  if (threadIdx.x % 32 < 16) value += __shfl_xor_sync(kAllLanes, value, 16);
  __syncthreads();
  out[threadIdx.x] = value;
}

__global__ void shuffle_from_exited_lane_kernel(float* out) {
  if (threadIdx.x % 32 == 31) return;
  out[threadIdx.x] = __shfl_down_sync(kAllLanes, 1.f, 1);
}

__global__ void failed_assertion_kernel(float* out) {
  assert(threadIdx.x < 50 && "too large");
  out[threadIdx.x] = 0;
}

}  // namespace

void too_many_threads(float* out) { launch(none_kernel, 1, 1025, 0, nullptr, out); }

#define FASTFT_X(name) \
  void name(float* out) { launch(name##_kernel, 1, kThreads, 0, nullptr, out); }
PLANTED_KERNELS(FASTFT_X)
#undef FASTFT_X

}  // namespace planted
