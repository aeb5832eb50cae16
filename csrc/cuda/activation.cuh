// The activation table in kernels, several values a call. One copy of the table per number type and width: inlined, its
// branches would be most of every kernel.
#pragma once
#include "activation.h"
#include "device.cuh"

namespace fastft::cuda {

template <class F, int n>
struct Values {
  F v[n];
};

// f(z)
template <class F, int n>
__device__ __noinline__ Values<F, n> activation_of(int activation, Values<F, n> z) {
  dispatch_activation(activation, [&](auto act) {
#pragma unroll
    for (int i = 0; i < n; ++i) z.v[i] = act.f(z.v[i]);
  });
  return z;
}

// f'(z)
template <class F, int n>
__device__ __noinline__ Values<F, n> derivative_of(int activation, Values<F, n> z) {
  dispatch_activation(activation, [&](auto act) {
#pragma unroll
    for (int i = 0; i < n; ++i) z.v[i] = act.df(z.v[i]);
  });
  return z;
}

}  // namespace fastft::cuda
