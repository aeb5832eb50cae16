// Dropout in kernels whose warps take a row each; philox.h has the rule.
#pragma once
#include "device.cuh"
#include "philox.h"

namespace fastft::cuda {

constexpr int kSlotsOfLane = kDropoutGroup / kWarp;

// Calls body(column, dropout's factor) for the columns of this lane: those of half of one call's slots in each group.
template <class Acc, class Body>
__device__ void for_columns(int64_t row, int64_t H, const int64_t* seed, int64_t threshold, int64_t use,
                            const Body& body) {
  const int lane = threadIdx.x % kDropoutLanes, half = threadIdx.x / kDropoutLanes;
  const Acc scale = Acc(dropout_scale(threshold));
  const int64_t groups = dropout_groups(H);
  for (int64_t group = 0; group < groups; ++group) {
    Acc factors[kSlotsOfLane];
    if (seed) {
      const DropoutCall call(*seed, use, (row * groups + group) * kDropoutLanes + lane);
      for (int i = 0; i < kSlotsOfLane; ++i)
        factors[i] = call.number(half * kSlotsOfLane + i) >= threshold ? scale : Acc(0);
    }
    for (int i = 0; i < kSlotsOfLane; ++i) {
      const int64_t j = group * kDropoutGroup + (half * kSlotsOfLane + i) * kDropoutLanes + lane;
      if (j < H) body(j, seed ? factors[i] : Acc(1));
    }
  }
}

}  // namespace fastft::cuda
