#include <mma_sm80.cuh>

#include "device.cuh"
#include "fragments.h"

namespace fragments {
namespace {

using namespace fastft::cuda;
using fastft::bf16;
using fastft::f16;

__global__ void ldmatrix_kernel(uint32_t* registers, const uint16_t* rows, bool transposed) {
  alignas(16) __shared__ uint16_t shared[kWarp][8];
  cp_async_16(shared[threadIdx.x], rows + threadIdx.x * 8, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  uint32_t r[4];
  if (transposed)
    ldmatrix_x4_trans(r, shared[threadIdx.x]);
  else
    ldmatrix_x4(r, shared[threadIdx.x]);
  for (int i = 0; i < 4; ++i) registers[threadIdx.x * 4 + i] = r[i];
}

template <class T>
__global__ void mma_kernel(float* d, const uint32_t* a, const uint32_t* b) {
  const int lane = threadIdx.x;
  float sums[4];
  const uint32_t of_a[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]};
  const uint32_t of_b[2] = {b[lane * 2], b[lane * 2 + 1]};
  for (int i = 0; i < 4; ++i) sums[i] = d[lane * 4 + i];
  if constexpr (sizeof(T) == 2)
    mma_m16n8k16<T>(sums, of_a, of_b);
  else
    mma_m16n8k8_tf32(sums, of_a, of_b);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}

constexpr int kColumns = 16, kDepth = 128, kStages = 3;  // of a step, of the product, steps in shared memory

// A pipeline as of a real kernel: a step is copied while those before it are multiplied.
__global__ void product_kernel(float* d, const uint16_t* a, const uint16_t* b) {
  struct Stage {
    uint16_t a[16][kColumns], b[16][kColumns];  // of b the lower eight rows are zeros
  };
  Stage* const stages = reinterpret_cast<Stage*>(dynamic_shared());
  const int lane = threadIdx.x, row = lane / 2, column = lane % 2 * 8;
  const auto copy = [&](int step) {
    Stage& to = stages[step % kStages];
    const bool live = step < kDepth / kColumns;
    cp_async_16(&to.a[row][column], a + row * kDepth + step * kColumns + column, live);
    cp_async_16(&to.b[row][column], b + row * kDepth + step * kColumns + column, live && row < 8);
    cp_async_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) copy(step);
  float sums[4] = {};
  for (int step = 0; step < kDepth / kColumns; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // all have their part of this step, and have done with the one before
    copy(step + kStages - 1);
    Stage& stage = stages[step % kStages];
    uint32_t of_a[4], of_b[4];
    ldmatrix_x4(of_a, &stage.a[lane % 16][lane / 16 * 8]);
    ldmatrix_x4(of_b, &stage.b[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
    mma_m16n8k16<bf16>(sums, of_a, {of_b[0], of_b[1]});
  }
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

}  // namespace

void ldmatrix(uint32_t* registers, const uint16_t* rows, bool transposed) {
  launch(ldmatrix_kernel, 1, kWarp, 0, nullptr, registers, rows, transposed);
}
void mma_bf16(float* d, const uint32_t* a, const uint32_t* b) {
  launch(mma_kernel<bf16>, 1, kWarp, 0, nullptr, d, a, b);
}
void mma_f16(float* d, const uint32_t* a, const uint32_t* b) { launch(mma_kernel<f16>, 1, kWarp, 0, nullptr, d, a, b); }
void mma_tf32(float* d, const uint32_t* a, const uint32_t* b) {
  launch(mma_kernel<float>, 1, kWarp, 0, nullptr, d, a, b);
}
void product(float* d, const uint16_t* a, const uint16_t* b) {
  launch(product_kernel, 1, kWarp, kStages * 2 * 16 * kColumns * sizeof(uint16_t), nullptr, d, a, b);
}

}  // namespace fragments
