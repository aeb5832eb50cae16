// What a warp does with matrices (mma_sm80.cuh), one kernel each; numbers of 16 bits come and go as their bits.
#pragma once
#include <cstdint>

namespace fragments {
void ldmatrix(uint32_t* registers, const uint16_t* rows, bool transposed);  // (32, 4) of (32, 8)
void mma_bf16(float* d, const uint32_t* a, const uint32_t* b);              // (32, 4) += (32, 4) (32, 2)
void mma_f16(float* d, const uint32_t* a, const uint32_t* b);
void mma_tf32(float* d, const uint32_t* a, const uint32_t* b);
void product(float* d, const uint16_t* a, const uint16_t* b);  // (16, 8) = (16, 128) (8, 128)^T in bf16, all in one
}  // namespace fragments
