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

// Writes the factors of a row, dropout_groups(cols) * kDropoutGroup of them: the buffer of a whole number of groups.
template <class F>
inline void dropout_factors(F* factors, const Dropout& dropout, int64_t row, int64_t cols) {
  constexpr int L = kLanes<float>;
  const F scale = F(dropout_scale(dropout.threshold));
  const uint32_t threshold = uint32_t(dropout.threshold);
  Vec<uint64_t> lane;
  for (int i = 0; i < kLanes<uint64_t>; ++i) lane[i] = uint64_t(i);
  const int64_t groups = dropout_groups(cols);
  for (int64_t group = 0; group < groups; ++group, factors += kDropoutGroup)
    for (int first = 0; first < kDropoutLanes; first += L) {
      const uint64_t call = uint64_t(row * groups + group) * kDropoutLanes + uint64_t(first);
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

}  // namespace FASTFT_NAMESPACE
