// Kernels with one planted bug each, which test_simt_executor.py expects to be caught, and some with none.
#include <cassert>
#include <mma_sm80.cuh>
#include <string>

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

__global__ void halves_of_words_kernel(float* out) {  // 16-bit numbers of two threads in one word
  __shared__ uint16_t shared[kThreads];
  shared[threadIdx.x] = uint16_t(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

// Each lane reads its neighbour's number after `meet`.
template <class Meet>
__device__ void read_neighbour(float* out, const Meet& meet) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = float(threadIdx.x);
  meet();
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}
__global__ void lanes_that_sync_kernel(float* out) {
  read_neighbour(out, [] { __syncwarp(); });
}
__global__ void lanes_that_only_shuffle_kernel(float* out) {  // which waits, but orders no memory
  read_neighbour(out, [] { __shfl_xor_sync(kAllLanes, 0, 1); });
}
__global__ void lanes_that_sync_in_halves_kernel(float* out) {  // even lanes among each other, and odd ones
  read_neighbour(out, [] { __syncwarp(threadIdx.x % 2 ? 0xaaaaaaaau : 0x55555555u); });
}

__device__ void count(float* out, bool atomically) {
  __shared__ float counter;
  if (threadIdx.x == 0) counter = 0;
  __syncthreads();
  if (atomically || threadIdx.x != 40)
    atomicAdd(&counter, 1.f);
  else
    counter += 1;
  __syncthreads();
  out[threadIdx.x] = counter;
}
__global__ void atomics_kernel(float* out) { count(out, true); }
__global__ void atomic_and_plain_kernel(float* out) { count(out, false); }

__device__ void reverse(float* out, int beyond) {
  float* const shared = reinterpret_cast<float*>(fastft::cuda::dynamic_shared());
  shared[threadIdx.x + beyond] = float(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x + beyond];
}
__global__ void dynamic_shared_memory_kernel(float* out) { reverse(out, 0); }
__global__ void beyond_dynamic_shared_kernel(float* out) { reverse(out, 1); }

__global__ void beyond_static_shared_kernel(float* out) {
  __shared__ float shared[kThreads];
  float* const next = shared + 1;  // the last thread's is outside
  next[threadIdx.x] = 1;
  out[threadIdx.x] = next[threadIdx.x];
}

__global__ void beyond_global_kernel(float* out) { out[threadIdx.x] = out[threadIdx.x + 1]; }

__global__ void unaligned_vector_kernel(float* out) {
  struct alignas(16) Four {
    float v[4];
  };
  if (threadIdx.x == 0) *reinterpret_cast<Four*>(out + 9) = *reinterpret_cast<const Four*>(out + 1);
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

// Two groups of copies of `out` to shared memory and back: a first half, then a second.
template <int kPending>
__device__ void copy_in_groups(float* out, bool wait) {
  alignas(16) __shared__ float shared[2][kThreads];
  for (int group = 0; group < 2; ++group) {
    if (threadIdx.x < kThreads / 4)
      fastft::cuda::cp_async_16(&shared[group][threadIdx.x * 4], out + threadIdx.x * 4, true);
    fastft::cuda::cp_async_commit();
  }
  if (wait) fastft::cuda::cp_async_wait<kPending>();
  __syncthreads();
  out[threadIdx.x] = shared[1][threadIdx.x];
}
__global__ void read_before_wait_kernel(float* out) { copy_in_groups<0>(out, false); }
__global__ void waits_for_older_groups_kernel(float* out) { copy_in_groups<1>(out, true); }

__global__ void copy_over_what_is_read_kernel(float* out) {
  alignas(16) __shared__ float shared[kThreads];
  shared[threadIdx.x] = 1;
  __syncthreads();
  const float value = shared[kThreads - 1 - threadIdx.x];
  if (threadIdx.x < kThreads / 4) fastft::cuda::cp_async_16(shared + threadIdx.x * 4, out + threadIdx.x * 4, true);
  fastft::cuda::cp_async_commit();
  fastft::cuda::cp_async_wait<0>();
  out[threadIdx.x] = value;
}

__global__ void misaligned_copy_kernel(float* out) {
  alignas(16) __shared__ float shared[kThreads + 4];
  fastft::cuda::cp_async_16(shared, out + threadIdx.x, true);
}

__global__ void misaligned_row_kernel(float* out) {
  alignas(16) __shared__ uint16_t shared[kThreads + 1][9];
  for (int i = 0; i < 9; ++i) shared[threadIdx.x][i] = 0;
  __syncthreads();
  uint32_t r[4];
  fastft::cuda::ldmatrix_x4(r, shared[threadIdx.x]);
  out[threadIdx.x] = float(r[0]);
}

__global__ void row_not_in_shared_kernel(float* out) {
  uint32_t r[4];
  fastft::cuda::ldmatrix_x4(r, reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(out) & ~uintptr_t(15)));
}

__device__ void multiply(float* out) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  fastft::cuda::mma_m16n8k16<fastft::bf16>(d, a, b);
  out[threadIdx.x] = d[0];
}
__global__ void lane_missing_from_mma_kernel(float* out) {
  if (threadIdx.x % 32 != 5) multiply(out);
  __syncthreads();
}
__global__ void lane_exited_before_mma_kernel(float* out) {
  if (threadIdx.x % 32 != 5) multiply(out);
}

}  // namespace

void too_many_threads(float* out) { launch(none_kernel, 1, 1025, 0, nullptr, out); }

// Bytes of dynamic shared memory: for those kernels whose name says so.
size_t dynamic_bytes(const std::string& name) {
  return name.find("dynamic") < name.size() ? kThreads * sizeof(float) : 0;
}

#define FASTFT_X(name) \
  void name(float* out) { launch(name##_kernel, 1, kThreads, dynamic_bytes(#name), nullptr, out); }
PLANTED_KERNELS(FASTFT_X)
#undef FASTFT_X

}  // namespace planted
