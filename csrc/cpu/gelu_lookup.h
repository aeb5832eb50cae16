// Phi(z) and GELU'(z) = Phi(z) + z phi(z) in 20 instructions where a register holds 16 floats: with AVX-512, polynomials looked up by lane.
// An exponential and a quotient (numeric.h) take 43, which is 4 % of a bf16 feed-forward layer's product.
//
// For a = |z|, both are T(a) left of zero and 1 - T(a) right of it. T is a polynomial of degree 6 in d = 2 a - n, |d| <= 1/2, one for each whole n < 16:
// least squares in double on 400 Chebyshev nodes, relative to T for Phi. n and d are exact. From a = 7.5 on T is 0 (Phi(-7.5) is 3e-14).
// Errors before rounding: 6.4e-9 of Phi, and below 1.2e-4 of itself in the left tail; 1.3e-8 of GELU' (half an ulp of either is 3e-8).
#pragma once
#include "activation.h"
#include "isa.h"

#if defined(FASTFT_ISA_AVX512) || defined(FASTFT_ISA_AVX512_BF16)
namespace FASTFT_NAMESPACE {

// Coefficients of d^0 to d^6 for n = 0 to 15
alignas(64) constexpr float kNormalTail[7][16] = {
    {5e-1f, 3.0853754e-1f, 1.5865526e-1f, 6.68072e-2f, 2.2750132e-2f, 6.209665e-3f, 1.3498979e-3f, 2.326291e-4f,
     3.167126e-5f, 3.3976812e-6f, 2.8665346e-7f, 1.8989853e-8f, 9.866187e-10f, 4.0162377e-11f, 1.2799444e-12f, 0.f},
    {-1.9947115e-1f, -1.7603266e-1f, -1.20985374e-1f, -6.475881e-2f, -2.6995482e-2f, -8.764148e-3f, -2.2159233e-3f,
     -4.3634154e-4f, -6.691533e-5f, -7.991944e-6f, -7.4337385e-7f, -5.385056e-8f, -3.038088e-9f, -1.3348594e-10f,
     -4.5676375e-12f, -2.3536843e-12f},
    {5.6011974e-8f, 2.2004085e-2f, 3.024632e-2f, 2.4284534e-2f, 1.3497748e-2f, 5.477606e-3f, 1.661947e-3f,
     3.8179723e-4f, 6.691348e-5f, 8.990203e-6f, 9.2904526e-7f, 7.401765e-8f, 4.5542e-9f, 2.166851e-10f, 7.980254e-12f,
     -4.2207505e-11f},
    {8.310635e-3f, 5.5008833e-3f, 3.1720097e-7f, -3.3726257e-3f, -3.374481e-3f, -1.9172601e-3f, -7.386737e-4f,
     -2.045275e-4f, -4.181312e-5f, -6.4069436e-6f, -7.426777e-7f, -6.553164e-8f, -4.420768e-9f, -2.2873577e-10f,
     -9.099588e-12f, -3.3380412e-10f},
    {3.756804e-6f, -1.2606112e-3f, -1.2600159e-3f, -3.7930493e-4f, 2.8111736e-4f, 3.7075445e-4f, 2.0770701e-4f,
     7.359309e-5f, 1.814058e-5f, 3.238069e-6f, 4.2754053e-7f, 4.2298645e-8f, 3.1625467e-9f, 1.7976676e-10f,
     7.802837e-12f, -1.2406357e-9f},
    {-3.2264815e-4f, -1.4214817e-4f, 1.2344727e-4f, 1.8152736e-4f, 7.0683986e-5f, -1.9962828e-5f, -3.4346514e-5f,
     -1.814853e-5f, -5.7611805e-6f, -1.2436992e-6f, -1.91718e-7f, -2.1641988e-8f, -1.816112e-9f, -1.1440828e-10f,
     -5.447501e-12f, -2.1726365e-9f},
    {1.5997475e-5f, 4.7490183e-5f, 3.070681e-5f, -1.0457357e-5f, -2.0729927e-5f, -7.71857e-6f, 1.7795638e-6f,
     2.7627646e-6f, 1.2451544e-6f, 3.314912e-7f, 5.9319696e-8f, 7.510674e-9f, 6.9107847e-10f, 4.6962524e-11f,
     2.382214e-12f, -1.4407197e-9f},
};
alignas(64) constexpr float kGeluSlopeTail[7][16] = {
    {5e-1f, 1.3250488e-1f, -8.331547e-2f, -1.274692e-1f, -8.52318e-2f, -3.7611086e-2f, -1.1945647e-2f, -2.8217603e-3f,
     -5.0364964e-4f, -6.852916e-5f, -7.1469453e-6f, -5.73347e-7f, -3.5468663e-8f, -1.6950462e-9f, -6.266278e-11f, 0.f},
    {-3.989423e-1f, -3.0805716e-1f, -1.20985456e-1f, 1.6189668e-2f, 5.3991005e-2f, 3.7247658e-2f, 1.5511464e-2f,
     4.4724927e-3f, 9.368105e-4f, 1.4585207e-4f, 1.7097538e-5f, 1.5212943e-6f, 1.0329995e-7f, 5.373498e-9f,
     2.1473898e-10f, 1.07057085e-10f},
    {4.179719e-7f, 8.251526e-2f, 9.073902e-2f, 4.249799e-2f, 5.7318887e-9f, -1.2324596e-2f, -8.309719e-3f,
     -3.1498377e-3f, -8.029804e-4f, -1.4610132e-4f, -1.9513274e-5f, -1.9436363e-6f, -1.4582713e-7f, -8.297192e-9f,
     -3.5973766e-10f, 1.595327e-9f},
    {3.3240154e-2f, 1.6960962e-2f, -1.0079118e-2f, -1.8043758e-2f, -8.999665e-3f, -2.5172258e-4f, 2.0314162e-3f,
     1.2421737e-3f, 4.126777e-4f, 9.066491e-5f, 1.4053474e-5f, 1.5849002e-6f, 1.3233942e-7f, 8.272822e-9f,
     3.9008757e-10f, 1.1035099e-8f},
    {2.8943125e-5f, -7.018567e-3f, -5.040967e-3f, 8.531769e-4f, 2.811915e-3f, 1.3339326e-3f, 6.808137e-8f,
     -2.6500155e-4f, -1.3663726e-4f, -3.8458187e-5f, -7.122258e-6f, -9.2538545e-7f, -8.703244e-8f, -6.0333627e-9f,
     -3.118987e-10f, 3.6723932e-8f},
    {-1.9556684e-3f, -5.6743546e-4f, 1.1101967e-3f, 9.073327e-4f, -7.495762e-5f, -3.603418e-4f, -1.466489e-4f,
     8.4673575e-6f, 2.7537208e-5f, 1.1588018e-5f, 2.731764e-6f, 4.2519414e-7f, 4.6412545e-8f, 3.6627017e-9f,
     2.127772e-10f, 5.878417e-8f},
    {1.263149e-4f, 3.4758967e-4f, 1.3595576e-4f, -1.5973573e-4f, -1.2112485e-4f, 1.4420695e-5f, 3.9382394e-5f,
     1.1745727e-5f, -2.016587e-6f, -2.3199277e-6f, -7.572109e-7f, -1.4419729e-7f, -1.828991e-8f, -1.6297849e-9f,
     -1.0494178e-10f, 3.6162277e-8f},
};

FASTFT_INLINE Vec<float> from_tail(const float (&table)[7][16], Vec<float> z) {
  const Vec<float> twice = abs(z) + abs(z), t = twice > 15.f ? splat<Vec<float>>(15.f) : twice;
  const Vec<float> shifted = t + 8388608.f;  // 2^23 leaves n in the low bits, of which a lookup takes four
  const Vec<float> d = t - (shifted - 8388608.f);
  const auto coefficient = [&](int power) { return lookup(table[power], (Bits<Vec<float>>)shifted); };
  Vec<float> tail = coefficient(6);
#pragma GCC unroll 6
  for (int power = 5; power >= 0; --power) tail = tail * d + coefficient(power);
  return z > 0.f ? 1.f - tail : tail;
}

template <>
FASTFT_INLINE Vec<float> gelu_weight(Vec<float> z) {
  return from_tail(kNormalTail, z);
}
template <>
FASTFT_INLINE Vec<float> gelu_slope(Vec<float> z) {
  return from_tail(kGeluSlopeTail, z);
}

}  // namespace FASTFT_NAMESPACE
#endif
