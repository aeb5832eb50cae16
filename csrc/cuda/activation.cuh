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

template <class F, int n>
__device__ __noinline__ Values<F, n> in_table(int activation, Values<F, n> z) {
  dispatch_activation(activation, [&](auto act) {
#pragma unroll
    for (int i = 0; i < n; ++i) z.v[i] = act.f(z.v[i]);
  });
  return z;
}
template <class F, int n>
__device__ __noinline__ Values<F, n> in_table_of_derivatives(int activation, Values<F, n> z) {
  dispatch_activation(activation, [&](auto act) {
#pragma unroll
    for (int i = 0; i < n; ++i) z.v[i] = act.df(z.v[i]);
  });
  return z;
}

// Values, kAtOnce a call: fp64's functions, each of hundreds of instructions, would be most of the compiler's time.
template <class F, int n, class Table>
__device__ Values<F, n> by_parts(Values<F, n> z, const Table& table) {
  constexpr int kAtOnce = sizeof(F) == 8 ? 1 : n;
#pragma unroll
  for (int i = 0; i < n; i += kAtOnce) {
    Values<F, kAtOnce> part;
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) part.v[e] = z.v[i + e];
    part = table(part);
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) z.v[i + e] = part.v[e];
  }
  return z;
}

// f(z)
template <class F, int n>
__device__ Values<F, n> activation_of(int activation, Values<F, n> z) {
  return by_parts(z, [&](auto part) { return in_table(activation, part); });
}

// f'(z)
template <class F, int n>
__device__ Values<F, n> derivative_of(int activation, Values<F, n> z) {
  return by_parts(z, [&](auto part) { return in_table_of_derivatives(activation, part); });
}

}  // namespace fastft::cuda
