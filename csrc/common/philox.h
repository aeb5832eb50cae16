// Philox4x32-10: a 128-bit counter and a 64-bit key become 128 random bits, the same on every device, in any order.
//   Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
//
// The rule of every dropout of a (rows, cols) matrix, so that forward, backward, CPU, CUDA and the tests agree. Elements are counted, and cut into
// groups of 128, a group into 8 slots of 16 lanes, since one call gives eight 16-bit numbers and a register has up to 16 lanes:
//   e       = row * pitch + col               pitch   = cols, rounded up to a multiple of 128, or to 16, 32 or 64
//   call    = e / 128 * 16 + e % 16           counter = call (64 bits), use, 0; key = the seed
//   slot    = e % 128 / 16                    number  = 16 bits of the call's 128, lowest first, at 16 * slot
//   element is kept where number >= threshold = round(65536 p), and then multiplied with 65536 / (65536 - threshold).
// `use` tells the dropouts apart that share a seed. Short rows share a group, where attention of 32 keys would else throw 3 of 4 numbers away; long
// ones do not: no alignment of cols is asked for.
#pragma once
#include "numeric.h"

namespace FASTFT_NAMESPACE {

constexpr int kDropoutLanes = 16, kDropoutGroup = 8 * kDropoutLanes;

FASTFT_INLINE uint64_t wide_product(uint64_t x, uint32_t factor) { return (x & 0xffffffffu) * factor; }

// U: uint64_t or a vector of them. Only the lower halves count, of the counter and of what it becomes: the product takes no more,
// and masking the upper ones away would be more operations.
template <class U>
FASTFT_INLINE void philox(U (&c)[4], uint64_t key) {
  uint32_t key0 = uint32_t(key), key1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const U p0 = wide_product(c[0], 0xD2511F53u), p1 = wide_product(c[2], 0xCD9E8D57u);
    c[0] = (p1 >> 32) ^ c[1] ^ uint64_t(key0);
    c[1] = p1;
    c[2] = (p0 >> 32) ^ c[3] ^ uint64_t(key1);
    c[3] = p0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// What a kept element is multiplied with. Everything is dropped at 65536.
FASTFT_INLINE double dropout_scale(int64_t threshold) {
  return threshold >= 65536 ? 0.0 : 65536.0 / double(65536 - threshold);
}

// The eight numbers of one call: slot i is bits 16 i to 16 i + 15.
struct DropoutCall {
  uint32_t words[4];

  FASTFT_INLINE DropoutCall(int64_t seed, int64_t use, int64_t call) {
    uint64_t c[4] = {uint64_t(call), uint64_t(call) >> 32, uint64_t(use), 0};
    philox(c, uint64_t(seed));
    for (int i = 0; i < 4; ++i) words[i] = uint32_t(c[i]);
  }
  FASTFT_INLINE uint32_t number(int slot) const {  // by comparisons: an array in registers has no index
    const uint32_t low = slot < 2 ? words[0] : words[1], high = slot < 6 ? words[2] : words[3];
    return (slot < 4 ? low : high) >> (16 * (slot % 2)) & 0xffffu;
  }
};

FASTFT_INLINE int64_t dropout_groups(int64_t cols) { return (cols + kDropoutGroup - 1) / kDropoutGroup; }

// Numbers from one row to the next.
FASTFT_INLINE int64_t dropout_pitch(int64_t cols) {
  return cols > 64 ? dropout_groups(cols) * kDropoutGroup : cols > 32 ? 64 : cols > 16 ? 32 : 16;
}

// The call and the slot of number e.
FASTFT_INLINE int64_t dropout_call(int64_t e) { return e / kDropoutGroup * kDropoutLanes + e % kDropoutLanes; }
FASTFT_INLINE int dropout_slot(int64_t e) { return int(e % kDropoutGroup) / kDropoutLanes; }

}  // namespace FASTFT_NAMESPACE
