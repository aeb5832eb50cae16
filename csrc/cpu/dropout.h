// Dropout's factors, a row at a time: 0 where an element is dropped, else the scale. The rule is in common/philox.h.
// A register pair holds the calls of a group, even ones in one register and odd ones in the other, so that a 32 x 32 -> 64 bit product needs
// no shuffles. Reached on Zen 4 with AVX-512: 0.76 cycles for a factor.
#pragma once
#include "isa.h"
#include "philox.h"

namespace FASTFT_NAMESPACE {

struct Dropout {
  int64_t seed, use, threshold;

  // From what a kernel's arguments have: a null seed is no dropout.
  Dropout(const int64_t* seed, int64_t threshold, int64_t use)
      : seed(seed ? *seed : 0), use(use), threshold(seed ? threshold : 0) {}
  explicit operator bool() const { return threshold != 0; }
};

// Writes the factors of a group.
template <class F>
inline void dropout_group(F* factors, const Dropout& dropout, int64_t group) {
  constexpr int L = kLanes<float>;
  const F scale = F(dropout_scale(dropout.threshold));
  const uint32_t threshold = uint32_t(dropout.threshold);
  Vec<uint64_t> lane;
  for (int i = 0; i < kLanes<uint64_t>; ++i) lane[i] = uint64_t(i);
  for (int first = 0; first < kDropoutLanes; first += L) {
    const uint64_t call = uint64_t(group) * kDropoutLanes + uint64_t(first);
    const Vec<uint64_t> even_call = 2 * lane + call, odd_call = even_call + 1, zero = {};
    Vec<uint64_t> even[4] = {even_call, even_call >> 32, zero + uint64_t(dropout.use), zero};
    Vec<uint64_t> odd[4] = {odd_call, odd_call >> 32, zero + uint64_t(dropout.use), zero};
    philox(even, uint64_t(dropout.seed));
    philox(odd, uint64_t(dropout.seed));
#pragma GCC unroll 4
    for (int word = 0; word < 4; ++word) {
      const Vec<uint32_t> pair = (Vec<uint32_t>)((even[word] & uint64_t(0xffffffffu)) | (odd[word] << 32));
      const Vec<uint32_t> numbers[2] = {pair & 0xffffu, pair >> 16};
      for (int half = 0; half < 2; ++half) {
        F* const to = factors + (2 * word + half) * kDropoutLanes + first;
        if constexpr (sizeof(F) == sizeof(float)) {
          store(to, numbers[half] >= threshold ? broadcast(scale) : Vec<float>{});
        } else {
          for (int i = 0; i < L; ++i) to[i] = numbers[half][i] >= threshold ? scale : F(0);
        }
      }
    }
  }
}

// Writes the factors of a row, as many as a whole number of groups has.
template <class F>
inline void dropout_factors(F* factors, const Dropout& dropout, int64_t row, int64_t cols) {
  const int64_t pitch = dropout_pitch(cols), first = row * pitch;
  if (pitch < kDropoutGroup) {
    F group[kDropoutGroup];
    dropout_group(group, dropout, first / kDropoutGroup);
    std::memcpy(factors, group + first % kDropoutGroup, size_t(pitch) * sizeof(F));
    return;
  }
  for (int64_t e = 0; e < pitch; e += kDropoutGroup) dropout_group(factors + e, dropout, (first + e) / kDropoutGroup);
}

}  // namespace FASTFT_NAMESPACE
