// GELU(z) = z Phi(z) and GELU'(z) = Phi(z) + z phi(z) in 18 to 25 instructions: polynomials looked up by lane, of which AVX-512 has 16 in a register, AVX2 8.
// An exponential and a quotient (numeric.h) take 43 (75 with AVX2), which is 4 % (8 %) of a feed-forward layer's product.
//
// For a = |z|, Phi and GELU' are T(a) left of zero and 1 - T(a) right of it. T is a polynomial in d = a / step - n, |d| <= 1/2, one for each whole n: of degree 6
// for 16 steps of 1/2, of degree 8 for 8 of 1; least squares in double on 400 Chebyshev nodes, relative to T for Phi. n and d are exact. From a = 7.5
// (8 lanes: 7) on T is 0 (Phi(-7.5) is 3e-14, Phi(-7) 1e-12).
// One power after the other: by fours, with fewer to wait for, gains nothing, since lookups fill their port.
// Errors before rounding: 6.4e-9 of Phi, and below 1.2e-4 of itself in the left tail (8 lanes: from a = 6.5 on 4e-12); 1.5e-8 of GELU' (half an ulp of
// either is 3e-8).
#pragma once
#include "activation.h"
#include "isa.h"

#if defined(FASTFT_ISA_AVX2) || defined(FASTFT_ISA_AVX512) || defined(FASTFT_ISA_AVX512_BF16)
namespace FASTFT_NAMESPACE {

// Coefficients of d^0, d^1, ... for n = 0, 1, ...
#if defined(FASTFT_ISA_AVX2)
alignas(32) constexpr float kNormalTail[9][8] = {
    {5e-1f, 1.5865526e-1f, 2.2750132e-2f, 1.349898e-3f, 3.1671247e-5f, 2.8665033e-7f, 9.86576e-10f, 0.f},
    {-3.989423e-1f, -2.4197073e-1f, -5.3990964e-2f, -4.4318484e-3f, -1.3383022e-4f, -1.4867443e-6f, -6.0769985e-9f,
     -5.068928e-11f},
    {-2.5965967e-8f, 1.209853e-1f, 5.3991005e-2f, 6.6477642e-3f, 2.6765972e-4f, 3.7171328e-6f, 1.8236427e-8f,
     -2.6130395e-10f},
    {6.64909e-2f, 5.4566914e-7f, -2.6995664e-2f, -5.9091146e-3f, -3.3457365e-4f, -5.946522e-6f, -3.541214e-8f,
     -6.5736294e-10f},
    {-5.3071435e-6f, -2.0162975e-2f, 4.49844e-3f, 3.3240807e-3f, 2.89981e-4f, 6.80471e-6f, 4.9818624e-8f, 0.f},
    {-9.943015e-3f, 4.0245e-3f, 2.2527245e-3f, -1.1083602e-3f, -1.8183721e-4f, -5.913139e-6f, -5.471721e-8f, 0.f},
    {-1.042989e-4f, 2.0082246e-3f, -1.3442681e-3f, 1.0934838e-4f, 8.244911e-5f, 4.0979976e-6f, 5.0667822e-8f, 0.f},
    {1.3979422e-3f, -7.2146254e-4f, 9.917782e-5f, 8.724324e-5f, -2.5151123e-5f, -2.2854704e-6f, -3.8276422e-8f, 0.f},
    {-2.3512745e-4f, -1.02827784e-4f, 1.0287869e-4f, -3.9799696e-5f, 3.875805e-6f, 7.8305e-7f, 1.6152303e-8f, 0.f},
};
alignas(32) constexpr float kGeluSlopeTail[9][8] = {
    {5e-1f, -8.331547e-2f, -8.52318e-2f, -1.1945647e-2f, -5.0364964e-4f, -7.1469453e-6f, -3.5468815e-8f, 0.f},
    {-7.978846e-1f, -2.4197084e-1f, 1.0798199e-1f, 3.1022923e-2f, 1.8736256e-3f, 3.419451e-5f, 2.0655652e-7f,
     2.3879823e-9f},
    {-2.1275332e-7f, 3.629561e-1f, -1.5498715e-8f, -3.3238858e-2f, -3.2119255e-3f, -7.805294e-5f, -5.8326344e-7f,
     1.18557555e-8f},
    {2.6596594e-1f, -8.0650665e-2f, -7.1990944e-2f, 1.6250972e-2f, 3.3010182e-3f, 1.1249732e-4f, 1.0625035e-6f,
     2.8528689e-8f},
    {-4.6328947e-5f, -8.065756e-2f, 4.4992972e-2f, -1.3478814e-7f, -2.1858914e-3f, -1.1397657e-4f, -1.3950968e-6f, 0.f},
    {-5.9567556e-2f, 3.6205143e-2f, -2.656287e-3f, -4.6658865e-3f, 8.9181866e-4f, 8.523001e-5f, 1.386538e-6f, 0.f},
    {-9.5849717e-4f, 8.745214e-3f, -7.80439e-3f, 2.5498527e-3f, -1.368354e-4f, -4.7860463e-5f, -1.1145951e-6f, 0.f},
    {1.1482416e-2f, -6.6172667e-3f, 2.5521652e-3f, -3.023288e-4f, -8.878513e-5f, 1.9846195e-5f, 8.1974446e-7f, 0.f},
    {-2.2744793e-3f, -3.2281544e-4f, 3.9642313e-4f, -2.289094e-4f, 6.2089945e-5f, -5.0482236e-6f, -4.16581e-7f, 0.f},
};
#else
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
// The same for results that become bf16: of degree 4, 5.7e-7 of Phi and 2.2e-6 of GELU'.
alignas(64) constexpr float kNormalTailRough[5][16] = {
    {4.9999997e-1f, 3.0853748e-1f, 1.5865536e-1f, 6.680736e-2f, 2.2750199e-2f, 6.2096347e-3f, 1.3498493e-3f,
     2.3260193e-4f, 3.166219e-5f, 3.3956467e-6f, 2.8633218e-7f, 1.8953223e-8f, 9.835568e-10f, 3.997284e-11f,
     1.2711955e-12f, 0.f},
    {-1.9946916e-1f, -1.7602994e-1f, -1.2098769e-1f, -6.476213e-2f, -2.6996734e-2f, -8.763814e-3f, -2.2153794e-3f,
     -4.3607343e-4f, -6.683708e-5f, -7.97666e-6f, -7.412823e-7f, -5.3645763e-8f, -3.0236191e-9f, -1.327492e-10f,
     -4.540955e-12f, 0.f},
    {-3.0813266e-5f, 2.2004912e-2f, 3.0242264e-2f, 2.4279458e-2f, 1.3495945e-2f, 5.4787733e-3f, 1.6635939e-3f,
     3.8271022e-4f, 6.722339e-5f, 9.061674e-6f, 9.407506e-7f, 7.541225e-8f, 4.676884e-9f, 2.2473425e-10f, 8.376924e-12f,
     0.f},
    {8.481577e-3f, 5.456717e-3f, 3.8420632e-5f, -3.3170749e-3f, -3.3530865e-3f, -1.9231914e-3f, -7.4872014e-4f,
     -2.0972862e-4f, -4.3425563e-5f, -6.7458127e-6f, -7.933701e-7f, -7.106688e-8f, -4.8685873e-9f, -2.5584046e-10f,
     -1.0335095e-11f, 0.f},
    {-3.871581e-4f, -1.2527965e-3f, -1.236563e-3f, -3.6130936e-4f, 2.835839e-4f, 3.6421066e-4f, 2.0136523e-4f,
     7.045227e-5f, 1.7130516e-5f, 3.0113363e-6f, 3.9081e-7f, 3.7922607e-8f, 2.7744904e-9f, 1.5394042e-10f,
     6.5050717e-12f, 0.f},
};
alignas(64) constexpr float kGeluSlopeTailRough[5][16] = {
    {4.9999988e-1f, 1.3250504e-1f, -8.33154e-2f, -1.2746927e-1f, -8.523186e-2f, -3.761108e-2f, -1.1945628e-2f,
     -2.8217547e-3f, -5.0365063e-4f, -6.8530295e-5f, -7.147315e-6f, -5.734174e-7f, -3.5477594e-8f, -1.695842e-9f,
     -6.2714015e-11f, 0.f},
    {-3.9893138e-1f, -3.0804607e-1f, -1.2100714e-1f, 1.6171947e-2f, 5.399247e-2f, 3.72547e-2f, 1.5514329e-2f,
     4.4723274e-3f, 9.3627267e-4f, 1.4562573e-4f, 1.7044184e-5f, 1.5129897e-6f, 1.0239346e-7f, 5.3019606e-9f,
     2.1058318e-10f, 0.f},
    {-1.7530017e-4f, 8.250304e-2f, 9.0734236e-2f, 4.2503607e-2f, 4.2640277e-6f, -1.2325103e-2f, -8.311104e-3f,
     -3.1502505e-3f, -8.029095e-4f, -1.4601977e-4f, -1.9486653e-5f, -1.9385668e-6f, -1.4518412e-7f, -8.239896e-9f,
     -3.560483e-10f, 0.f},
    {3.4233674e-2f, 1.6783638e-2f, -9.732182e-3f, -1.7760217e-2f, -9.023089e-3f, -3.643294e-4f, 1.9855883e-3f,
     1.2448198e-3f, 4.2128307e-4f, 9.4286166e-5f, 1.490715e-5f, 1.7177734e-6f, 1.4684335e-7f, 9.417416e-9f,
     4.5658044e-10f, 0.f},
    {-2.2853801e-3f, -6.888221e-3f, -4.9899835e-3f, 7.93276e-4f, 2.7664932e-3f, 1.3393403e-3f, 1.4836479e-5f,
     -2.605969e-4f, -1.3739348e-4f, -3.932816e-5f, -7.4062123e-6f, -9.794594e-7f, -9.389115e-8f, -6.644532e-9f,
     -3.5125186e-10f, 0.f},
};
#endif

// T(|z|), and |z| as far as it matters to it.
struct Tail {
  Vec<float> value, at;
};
template <int kTerms, int kSteps>
FASTFT_INLINE Tail tail_of(const float (&table)[kTerms][kSteps], Vec<float> z) {
  constexpr float to_steps = kSteps / 8;  // 2 or 1: products are exact
  const Vec<float> at = at_most(abs(z), (kSteps - 1) / to_steps);
  // 2^23 leaves n in the low bits, of which a lookup takes what it needs.
  const Vec<float> shifted = at * to_steps + 8388608.f;
  const Vec<float> d = at * to_steps - (shifted - 8388608.f);
  const auto coefficient = [&](int power) { return lookup(table[power], (Bits<Vec<float>>)shifted); };
  Vec<float> tail = coefficient(kTerms - 1);
#pragma GCC unroll 8
  for (int power = kTerms - 2; power >= 0; --power) tail = tail * d + coefficient(power);
  return {tail, at};
}

// z Phi(z) = max(z, 0) - |z| T(|z|)
template <int kTerms, int kSteps>
FASTFT_INLINE Vec<float> gelu_by(const float (&table)[kTerms][kSteps], Vec<float> z) {
  const auto [tail, at] = tail_of(table, z);
  return at_least_0(z) - tail * at;
}
template <int kTerms, int kSteps>
FASTFT_INLINE Vec<float> slope_by(const float (&table)[kTerms][kSteps], Vec<float> z) {
  const Vec<float> tail = tail_of(table, z).value;
  return z > 0.f ? 1.f - tail : tail;
}

#if defined(FASTFT_ISA_AVX2)
static constexpr auto &kNormalTailRough = kNormalTail, &kGeluSlopeTailRough = kGeluSlopeTail;
#endif
template <>
FASTFT_INLINE Vec<float> gelu<false>(Vec<float> z) {
  return gelu_by(kNormalTail, z);
}
template <>
FASTFT_INLINE Vec<float> gelu<true>(Vec<float> z) {
  return gelu_by(kNormalTailRough, z);
}
template <>
FASTFT_INLINE Vec<float> gelu_slope<false>(Vec<float> z) {
  return slope_by(kGeluSlopeTail, z);
}
template <>
FASTFT_INLINE Vec<float> gelu_slope<true>(Vec<float> z) {
  return slope_by(kGeluSlopeTailRough, z);
}

}  // namespace FASTFT_NAMESPACE
#endif
