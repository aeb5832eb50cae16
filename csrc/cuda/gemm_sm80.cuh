// The products of linear_act on tensor cores, for bf16 and f16.
#pragma once
#include <type_traits>

#include "kernels.h"

namespace fastft::cuda {

template <class T>
constexpr bool kTensorCores = std::is_same_v<T, bf16> || std::is_same_v<T, f16>;

// As linear_act_forward and _backward, in gemm_sm80.cu.
template <class T, class W>
void gemm_forward(const LinearActForward<T, W>&, Stream);
template <class T, class W>
void gemm_backward(const LinearActBackward<T, W>&, Stream);

}  // namespace fastft::cuda
