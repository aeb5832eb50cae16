// Elementary functions that are the same on every device, and the conversions of bf16 and f16.
//
// Generic over F: float and double on both devices, Vec<float> and Vec<double> (cpu/isa.h) on the CPU. Branch-free; NaN
// stays NaN. fp64 is the C library's, lane by lane. fp32 is computed here: range reduction, then polynomials that are
// minimax fits (Remez exchange in 40 digits), their coefficients rounded to fp32 one by one, lowest power first, the
// others fitted again in between; a comment "2^-28 of y" is the error of such a fit relative to y. Fused multiply-adds
// are welcome, not needed. "ulp" above a function is its largest error, with them and without, over one fp32 argument
// in 13.
#pragma once
#include <math.h>
#include <string.h>

#include "kernels.h"
#if defined(__CUDACC__)
#define FASTFT_INLINE __host__ __device__ __forceinline__
#else
#define FASTFT_INLINE inline __attribute__((always_inline))
#endif

namespace FASTFT_NAMESPACE {

// What F is made of: its lane, and unsigned integers of the same shape.
template <class F>
struct Number;
template <>
struct Number<float> {
  using Scalar = float;
  using Bits = uint32_t;
};
template <>
struct Number<double> {
  using Scalar = double;
  using Bits = uint64_t;
};
template <class F>
using Scalar = typename Number<F>::Scalar;
template <class F>
using Bits = typename Number<F>::Bits;
template <class F>
constexpr bool kIsDouble = sizeof(Scalar<F>) == 8;

template <class To, class From>
FASTFT_INLINE To bit_cast(const From& x) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To y;
  memcpy(static_cast<void*>(&y), &x, sizeof y);
  return y;
}

template <class F>
FASTFT_INLINE F splat(Scalar<F> value) {
  return value - F{};  // x - 0: exact for -0 and NaN, a broadcast for the compiler
}
template <class F>
FASTFT_INLINE F clamp(F x, Scalar<F> low, Scalar<F> high) {
  x = x < low ? splat<F>(low) : x;
  return x > high ? splat<F>(high) : x;
}
template <class F>
FASTFT_INLINE F abs(F x) {
  return bit_cast<F>(bit_cast<Bits<F>>(x) & (~Bits<F>{} >> 1));
}

template <class F, class Op>
FASTFT_INLINE F by_lane(F x, Op op) {
  if constexpr (sizeof(F) == sizeof(Scalar<F>)) {
    return op(x);
  } else {
    for (int i = 0; i < int(sizeof(F) / sizeof(Scalar<F>)); ++i) x[i] = op(x[i]);
    return x;
  }
}

// a x^n + b x^(n-1) + ..., Horner
template <class F>
FASTFT_INLINE F polynomial(F, Scalar<F> a) {
  return splat<F>(a);
}
template <class F, class... Rest>
FASTFT_INLINE F polynomial(F x, Scalar<F> a, Scalar<F> b, Rest... rest) {
  F y = a * x + b;
  ((y = y * x + Scalar<F>(rest)), ...);
  return y;
}

// ---- exponential

// x 2^n for whole |n| <= 252. Two factors of half the power each stay in range, so that results underflow gradually.
template <class F>
FASTFT_INLINE F times_two_to(F x, F n) {
  const Bits<F> bits =
      bit_cast<Bits<F>>(n + 12582912.f);  // 1.5 * 2^23 leaves n in the low bits; the shifts drop the others
  const Bits<F> half = bits >> 1;
  return x * bit_cast<F>((half << 23) + 0x3f800000u) * bit_cast<F>(((bits - half) << 23) + 0x3f800000u);
}

template <class F>
FASTFT_INLINE F nearest(F x) {
  return (x + 12582912.f) - 12582912.f;
}  // whole number, |x| < 2^22

// exp(x) = 2^n (1 + expm1), n whole
template <class F>
struct ReducedExp {
  F n, expm1;
};
template <class F>
FASTFT_INLINE ReducedExp<F> exp_of_rest(F n, F r) {  // exp(n ln 2 + r)
  // (exp(r) - 1 - r) / r^2 for |r| < 0.35; 2^-28 of exp(r) - 1
  const F q = polynomial(r, 1.5042386e-4f, 1.3931528e-3f, 8.341709e-3f, 4.1666504e-2f, 0.16666634f, 0.5f);
  return {n, r + r * r * q};
}
// ln 2 comes in two parts, of which the first has 15 bits, so that n times it is exact.
template <class F>
FASTFT_INLINE ReducedExp<F> reduced_exp(F x) {
  const F n = nearest(x * 1.44269504f);
  return exp_of_rest(n, (x - n * 0.693145752f) - n * 1.42860677e-6f);
}
template <class F>
FASTFT_INLINE ReducedExp<F> reduced_exp_of_sum(F high, F low) {
  const F n = nearest((high + low) * 1.44269504f);
  return exp_of_rest(n, ((high - n * 0.693145752f) - n * 1.42860677e-6f) + low);
}

template <class F>
FASTFT_INLINE F exp_below_90(F x) {
  if constexpr (kIsDouble<F>) {
    return by_lane(x, [](double v) { return ::exp(v); });
  } else {
    const auto [n, m] = reduced_exp(x < -104.f ? splat<F>(-104.f) : x);  // exp(-104) < 2^-150
    return times_two_to(1.f + m, n);
  }
}

// 0.97 ulp, denormal results included
template <class F>
FASTFT_INLINE F exp(F x) {
  if constexpr (kIsDouble<F>)
    return exp_below_90(x);
  else
    return exp_below_90(x > 89.f ? splat<F>(89.f) : x);  // exp(89) > 2^128
}

// 1.44 and 1.48 ulp
template <class F>
FASTFT_INLINE F expm1(F x) {
  if constexpr (kIsDouble<F>) {
    return by_lane(x, [](double v) { return ::expm1(v); });
  } else {
    const auto [n, m] = reduced_exp(clamp(x, -18.f, 89.f));  // 1 - exp(-18) rounds to 1
    const F half = times_two_to(splat<F>(0.5f), n);          // halves, because 2^128 is not a number
    const F y = (half * m + (half - 0.5f)) * 2.f;
    return x == 0.f ? x : y;  // keeps -0
  }
}

// ---- exponential of a softmax: no look at the range, and times anything for nothing

// Where a product and a sum are one operation with one rounding.
#if defined(__FMA__) || defined(__CUDACC__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

template <class S>
struct ExpConstants {  // float's
  static constexpr float log2_e = 1.44269504f, ln2 = 0.693147181f, ln2_high = 0.693145752f, ln2_low = 1.42860677e-6f;
  static constexpr float magic = 12582912.f;  // 1.5 * 2^23 leaves a whole number in the low bits
  static constexpr int mantissa = 23, bias = 127;
};
template <>
struct ExpConstants<double> {
  static constexpr double log2_e = 1.4426950408889634, ln2 = 0.6931471805599453, ln2_high = 6.93147180369123816490e-1,
                          ln2_low = 1.90821492927058770002e-10;
  static constexpr double magic = 6755399441055744.;
  static constexpr int mantissa = 52, bias = 1023;
};

// exp(x) f = p(r) (2^n f) with n = round(x / ln 2), r = x - n ln 2, p a fit of exp on |r| <= ln 2 / 2: n is added to the
// exponent of f. Right while 2^n f is a normal number; NaN of NaN, anything of an infinite x.
// kRough: 2^-13 of the result, for one that becomes a bf16; else 2.6 ulp and |x| / 20, in fp64 1.4. (isa.h has AVX-512's
// for float.)
template <bool kRough, class F>
FASTFT_INLINE F exp_times(F x, F f) {
  using C = ExpConstants<Scalar<F>>;
  const F t = x * C::log2_e + C::magic, n = t - C::magic;
  // A fused product is exact before the difference, and a float's ln 2 is by chance good to 2^-28.
  const F r = kFused && !kIsDouble<F> ? x - n * C::ln2 : (x - n * C::ln2_high) - n * C::ln2_low;
  F p;
  if constexpr (kIsDouble<F>)  // 2^-55 of exp(r)
    p = polynomial(r, 2.0924980368963972e-9, 2.5111368173849367e-8, 2.7557058872703171e-7, 2.7557229279732565e-6,
                   2.4801587557971713e-5, 1.984126990328752e-4, 1.3888888888778212e-3, 8.3333333333139199e-3,
                   4.1666666666666824e-2, 0.16666666666666688, 0.5, 1., 1.);
  else if constexpr (kRough)
    p = polynomial(r, 0.165673286f, 0.504966736f, 1.00016439f, 0.999927938f);
  else  // 2^-23
    p = polynomial(r, 8.52443837e-3f, 4.19551842e-2f, 0.16664657f, 0.499984801f, 1.00000036f, 1.00000012f);
  return p * bit_cast<F>(bit_cast<Bits<F>>(f) + (bit_cast<Bits<F>>(t) << C::mantissa));
}

// The least x for which exp_times(x, f) is right, where f = m 2^exponent, 1 <= m < 2; the largest is -lowest_exp.
template <class F>
FASTFT_INLINE F lowest_exp(F exponent) {
  using C = ExpConstants<Scalar<F>>;
  return (2 - C::bias - exponent) * C::ln2;
}

// exp(x) f, or 0 where that is next to nothing (x < low)
template <bool kRough, class F>
FASTFT_INLINE F exp_or_0(F x, F f, F low) {
  const F y = exp_times<kRough>(x, f);
  return x < low ? F{} : y;
}

// e of a normal number m 2^e, 1 <= |m| < 2
template <class F>
FASTFT_INLINE F exponent_of(F x) {
  using C = ExpConstants<Scalar<F>>;
  const Bits<F> biased = bit_cast<Bits<F>>(abs(x)) >> C::mantissa;
  return bit_cast<F>(biased + bit_cast<Bits<F>>(splat<F>(C::magic))) - (C::magic + C::bias);
}

// exp(x) for x <= 0; in fp64, where the C library is slow, 0 if that is below the normal numbers
template <class F>
FASTFT_INLINE F exp_below_0(F x) {
  if constexpr (kIsDouble<F>) {
    const double low = lowest_exp(0.);
    const F y = exp_times<false>(x < low ? splat<F>(low) : x, splat<F>(1));
    return x < low ? F{} : y;
  } else {
    return exp_below_90(x);
  }
}

// ---- logarithm

// log(2^k (1 + f)), f between sqrt(1/2) - 1 and sqrt(2) - 1
template <class F>
struct ReducedLog {
  F k, f;
};
template <class F>
FASTFT_INLINE ReducedLog<F> reduced_log(F x) {               // normal numbers only
  const Bits<F> bits = bit_cast<Bits<F>>(x) - 0x3f3504f3u;   // sqrt(1/2)
  const Bits<F> exponent = ((bits >> 23) + 0x80u) & 0x1ffu;  // k + 128
  return {bit_cast<F>(exponent + 0x4b400000u) - 12583040.f, bit_cast<F>((bits & 0x7fffffu) + 0x3f3504f3u) - 1.f};
}
template <class F>
FASTFT_INLINE F log(ReducedLog<F> x, F rest) {  // log(2^k (1 + f)) + rest, |rest| below an ulp
  const F f = x.f, ff = f * f;
  // (log(1 + f) - f + f^2 / 2) / f^3; 2^-24.7 of log(1 + f)
  const F p = polynomial(f, -7.5152874e-2f, 0.12760882f, -0.13177453f, 0.14200537f, -0.16623119f, 0.20001268f,
                         -0.25000829f, 0.3333333f);
  return x.k * 0.693145752f + (f + ((f * ff * p + (x.k * 1.42860677e-6f + rest)) - 0.5f * ff));
}
template <class F>
FASTFT_INLINE F with_limits_of_log(F x, F y) {  // y if log(x) is a finite number
  const F limit = x == 0.f ? splat<F>(-HUGE_VALF) : (x > 0.f ? x : splat<F>(NAN));
  return (x > 0.f) & (x < HUGE_VALF) ? y : limit;
}

// 1.16 ulp
template <class F>
FASTFT_INLINE F log(F x) {
  if constexpr (kIsDouble<F>) {
    return by_lane(x, [](double v) { return ::log(v); });
  } else {
    const auto denormal = x < 1.17549435e-38f;
    auto reduced = reduced_log(denormal ? x * 8388608.f : x);
    reduced.k = denormal ? reduced.k - 23.f : reduced.k;
    return with_limits_of_log(x, log(reduced, F{}));
  }
}

// 1.19 ulp; 0, not -0, at -0
template <class F>
FASTFT_INLINE F log1p(F x) {
  if constexpr (kIsDouble<F>) {
    return by_lane(x, [](double v) { return ::log1p(v); });
  } else {
    const F u = 1.f + x, lost = x > 1.f ? 1.f - (u - x) : x - (u - 1.f);  // u + lost = 1 + x
    auto reduced = reduced_log(u);
    const F more = times_two_to(lost, -reduced.k), f = reduced.f + more, rest = more - (f - reduced.f);
    return with_limits_of_log(u, log(ReducedLog<F>{reduced.k, f}, rest));
  }
}

// ---- logistic function, tanh

// 1 / (1 + exp(a)) for a >= 0: the smaller of sigmoid(a) and sigmoid(-a), accurate relative to itself
template <class F>
FASTFT_INLINE F sigmoid_tail(F a) {
  const F e = exp_below_90(-a);
  return e / (1.f + e);
}

// tanh(x) - x for |x| < 0.975, where 1 - 2 tail would cancel: x^3 times a fit of (tanh(x) / x - 1) / x^2; 2^-28 of
// tanh(x)
template <class F>
FASTFT_INLINE F tanh_minus_x(F x) {
  const F xx = x * x;
  return x * xx *
         polynomial(xx, -3.796368e-4f, 2.3680432e-3f, -8.027726e-3f, 2.1535506e-2f, -5.3894483e-2f, 0.13332546f,
                    -0.33333305f);
}

// 1.07 ulp
template <class F>
FASTFT_INLINE F tanh(F x) {
  if constexpr (kIsDouble<F>) {
    return by_lane(x, [](double v) { return ::tanh(v); });
  } else {
    const F a = abs(x), y = 1.f - 2.f * sigmoid_tail(2.f * a);
    return a < 0.975f ? x + tanh_minus_x(x) : (x < 0.f ? -y : y);
  }
}

// 2.4 ulp, above -1.1 1.3 ulp
template <class F>
FASTFT_INLINE F sigmoid(F x) {
  const F a = abs(x), tail = sigmoid_tail(a), y = x < 0 ? tail : 1 - tail;
  if constexpr (kIsDouble<F>) {
    return y;
  } else {
    const F half = x * 0.5f;
    return a < 1.1f ? 0.5f + 0.5f * (half + tanh_minus_x(half)) : y;  // one rounding near 0, where y has three
  }
}

// sigmoid'(x) = sigmoid(x) sigmoid(-x). 3.2 ulp
template <class F>
FASTFT_INLINE F sigmoid_slope(F x) {
  const F tail = sigmoid_tail(abs(x));
  return tail - tail * tail;
}

// ---- standard normal distribution

// Phi(-a) = exp(-a^2 / 2) P(a) / Q(a) with P / Q a fit of exp(a^2 / 2) Phi(-a) on 0.875 <= a <= 14.5 (Lawson's iterated
// least squares; rounded to fp32 by a search among the neighbours, 2^-27.6), in which all terms are positive; around 0,
// Phi(z) - 1/2 is odd. So the left tail is as accurate as the right: erf, to which 1 is added, loses it.
// cdf: 2.2 ulp above -0.875, below that 5.6 with fused multiply-adds and 6.7 without; pdf: 2.2 ulp
template <class F>
struct Normal {
  F cdf, pdf;
};
template <class F>
FASTFT_INLINE Normal<F> normal(F z) {
  if constexpr (kIsDouble<F>) {
    return {by_lane(z, [](double v) { return 0.5 * ::erfc(-0.70710678118654752 * v); }),
            0.39894228040143268 * exp(-0.5 * z * z)};
  } else {
    const F size = abs(z), a = size > 14.5f ? splat<F>(14.5f) : size;  // beyond, the pdf is below 2^-150
    const F top = bit_cast<F>(bit_cast<Bits<F>>(a) & 0xfffff000u);     // of 12 bits, so that its square is exact
    const auto [n, m] = reduced_exp_of_sum(-0.5f * (top * top), -0.5f * ((a + top) * (a - top)));
    const F e = times_two_to(1.f + m, n);
    const F p = polynomial(a, 5.8375983e-3f, 5.031094e-2f, 0.20981696f, 0.47083142f, 0.50001013f);
    const F q = polynomial(a, 1.463265e-2f, 0.12611325f, 0.5405006f, 1.3073277f, 1.7396739f, 1.f);
    const F tail = e * p / q;
    // (Phi(z) - 1/2) / z for a < 0.875; 2^-27 of Phi(-a)
    const F s = polynomial(z * z, 9.711299e-5f, -1.1736053e-3f, 9.969028e-3f, -6.6489786e-2f, 0.39894226f);
    return {a < 0.875f ? 0.5f + z * s : (z < 0.f ? tail : 1.f - tail), 0.39894228f * e};
  }
}

// ---- storage types: conversions round to nearest, ties to even, and keep NaN quiet. The host's are in integers, so
// that they are the same in every instruction set (VCVTNEPS2BF16 flushes denormals).

// The type that a stored T is computed in.
template <class T>
struct ComputeOf {
  using type = T;
};
template <>
struct ComputeOf<bf16> {
  using type = float;
};
template <>
struct ComputeOf<f16> {
  using type = float;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

FASTFT_INLINE double to_float(double x) { return x; }
FASTFT_INLINE float to_float(float x) { return x; }
FASTFT_INLINE float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
FASTFT_INLINE float to_float(f16 x) {
#if defined(__CUDA_ARCH__)
  float y;  // not by cuda_fp16.h: three front ends would read its 9000 lines for each file
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = uint32_t(x.bits & 0x7fffu) << 13;
  const float scaled =
      bit_cast<float>(rest) * 0x1p112f;  // the exponents' biases differ by 112; right for denormals, too
  return bit_cast<float>(sign | (rest < 0x0f800000u ? bit_cast<uint32_t>(scaled) : rest | 0x7f800000u));
#endif
}

template <class T>
FASTFT_INLINE T from_float(Compute<T> x) {
  return x;
}
template <>
FASTFT_INLINE bf16 from_float<bf16>(float x) {
#if defined(__CUDA_ARCH__)
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  return bf16{uint16_t(x != x ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}
template <>
FASTFT_INLINE f16 from_float<f16>(float x) {
#if defined(__CUDA_ARCH__)
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 31 << 15;
  const float a = bit_cast<float>(bits & 0x7fffffffu);
  uint32_t half;
  if (x != x)
    half = 0x7e00u;
  else if (a >= 65520.f)
    half = 0x7c00u;
  else if (a < 0x1p-14f)
    half = bit_cast<uint32_t>(a + 0.5f) - 0x3f000000u;  // the sum rounds at 2^-24, the step of denormals
  else
    half = ((bits & 0x7fffffffu) - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  return f16{uint16_t(sign | half)};
#endif
}

}  // namespace FASTFT_NAMESPACE
