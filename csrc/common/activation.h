// The activation table. A line holds a name, f(z) and f'(z) of a pre-activation z of type F; its place is its number,
// here and in fastft/activations.py. To add an activation: a line here, a line there.
//
// The meaning is PyTorch's, at NaN and 0 too; at infinity, where its product rules give NaN, the limit or NaN. The
// formulas are chosen for their accuracy: none subtracts what is nearly equal, so that tails and slopes keep the digits
// that 1 + erf and 1 - tanh^2 lose.
#pragma once
#include "numeric.h"

namespace FASTFT_NAMESPACE {

// clang-format off: a table, in columns
#define FASTFT_ACTIVATIONS(X)                                                                                      \
  X(Identity,  z,                                 constant<F>(1))                                                  \
  X(Relu,      z < 0 ? constant<F>(0) : z,        z <= 0 ? constant<F>(0) : constant<F>(1))                        \
  X(LeakyRelu, z > 0 ? z : z * constant<F>(0.01), z > 0 ? constant<F>(1) : constant<F>(0.01))                      \
  X(Elu,       z > 0 ? z : expm1(z),              z > 0 ? constant<F>(1) : exp(z))                                 \
  X(Sigmoid,   sigmoid(z),                        sigmoid_slope(z))                                                \
  X(Tanh,      tanh(z),                           4 * sigmoid_slope(2 * z))                                        \
  X(Gelu,      gelu<kRough>(z),                   gelu_slope<kRough>(z))                                           \
  X(GeluTanh,  z * sigmoid(cubic(z)),             sigmoid(cubic(z)) + bounded(z) * cubic_sigmoid_slope(z))         \
  X(QuickGelu, z * sigmoid(steep(z)),             sigmoid(steep(z)) + bounded(steep(z)) * sigmoid_slope(steep(z))) \
  X(Silu,      z * sigmoid(z),                    sigmoid(z) + bounded(z) * sigmoid_slope(z))                      \
  X(Mish,      z * tanh_softplus(z),              tanh_softplus(z) + bounded(z) * tanh_softplus_slope(z))          \
  X(Softplus,  z > 20 ? z : log1p_exp(z),         z > 20 ? constant<F>(1) : sigmoid(z))
// clang-format on

// ---- what the table needs beyond numeric.h

template <class F>
FASTFT_INLINE F constant(double value) {
  return splat<F>(Scalar<F>(value));
}

// All slopes are 0 or 1 at +-1000; at infinity the product rule would give 0 * infinity.
template <class F>
FASTFT_INLINE F bounded(F z) {
  return clamp(z, -1000, 1000);
}

// gelu(z) = z Phi(z), with the derivative Phi(z) + z phi(z); a lookup in registers stands in for both where there is one
// (cpu/gelu_lookup.h). Hendrycks & Gimpel 2016, arXiv:1606.08415
template <bool kRough, class F>
FASTFT_INLINE F gelu(F z) {
  return z * normal(z).cdf;
}
template <bool kRough, class F>
FASTFT_INLINE F gelu_slope(F z) {
  const auto [cdf, pdf] = normal(z);
  return cdf + bounded(z) * pdf;
}

// gelu_tanh(z) = z (1 + tanh(u)) / 2 = z sigmoid(2 u) with 2 u = sqrt(8 / pi) (z + 0.044715 z^3)
// Hendrycks & Gimpel 2016, arXiv:1606.08415
template <class F>
FASTFT_INLINE F cubic(F z) {
  return z * (constant<F>(1.5957691216057308) + constant<F>(0.071354816272600248) * (z * z));
}
template <class F>
FASTFT_INLINE F cubic_sigmoid_slope(F z) {  // of sigmoid(cubic(z))
  const F x = bounded(z);
  return sigmoid_slope(cubic(z)) * (constant<F>(1.5957691216057308) + constant<F>(0.21406444881780074) * (x * x));
}

template <class F>
FASTFT_INLINE F steep(F z) {
  return z * constant<F>(1.702);
}

// tanh(log(1 + e)) = n / (n + 2) with e = exp(z), n = e (e + 2); its derivative is 4 e (1 + e) / (n + 2)^2
// Misra 2019, arXiv:1908.08681
template <class F>
struct Softened {
  F e, n;
};
template <class F>
FASTFT_INLINE Softened<F> softened(F z) {
  const F e = exp(z > 20 ? constant<F>(20) : z);  // from there on 2 / n is below 2^-56
  return {e, e * (e + 2)};
}
template <class F>
FASTFT_INLINE F tanh_softplus(F z) {
  const F n = softened(z).n;
  if constexpr (kIsDouble<F>) {
    return n / (n + 2);
  } else {
    // n / (n + 2) = 0.6 + 0.4 (n - 3) / (n + 2) = 1 - 2 / (n + 2), whichever rounds but once at the size of the result
    const auto low = z < -0.5f, high = z > 0.5f;
    const F q = (low ? n : (high ? constant<F>(-2) : 0.4f * (n - 3.f))) / (n + 2.f);
    return low ? q : (high ? 1.f + q : 0.6f + (q - 2.3841858e-8f));  // 0.6f exceeds 0.6 by that
  }
}

template <class F>
FASTFT_INLINE F tanh_softplus_slope(F z) {
  const auto [e, n] = softened(z);
  const F m = n + 2;
  return z > 20 ? constant<F>(0) : 4 * (e + e * e) / (m * m);
}

template <class F>
FASTFT_INLINE F log1p_exp(F z) {
  return (z > 0 ? z : constant<F>(0)) + log1p(exp(-abs(z)));
}

// ---- the table as an enumeration, as functions and as a switch

enum Activation : int {
#define FASTFT_X(name, f, df) k##name,
  FASTFT_ACTIVATIONS(FASTFT_X)
#undef FASTFT_X
      kActivations  // how many
};

template <int kActivation>
struct Act;  // f(z) and df(z); kRough: of a result that becomes a bf16
#define FASTFT_X(name, f_of_z, df_of_z)               \
  template <>                                         \
  struct Act<k##name> {                               \
    static constexpr int value = k##name;             \
    template <bool kRough = false, class F>           \
    static FASTFT_INLINE F f([[maybe_unused]] F z) {  \
      return f_of_z;                                  \
    }                                                 \
    template <bool kRough = false, class F>           \
    static FASTFT_INLINE F df([[maybe_unused]] F z) { \
      return df_of_z;                                 \
    }                                                 \
  };
FASTFT_ACTIVATIONS(FASTFT_X)
#undef FASTFT_X

// Calls body(Act<activation>{}), whose ::value is the number as a constant; 0 <= activation < kActivations.
template <class Body>
FASTFT_INLINE void dispatch_activation(int activation, const Body& body) {
  switch (activation) {
#define FASTFT_X(name, f, df) \
  case k##name:               \
    return body(Act<k##name>{});
    FASTFT_ACTIVATIONS(FASTFT_X)
#undef FASTFT_X
  }
}

}  // namespace FASTFT_NAMESPACE
