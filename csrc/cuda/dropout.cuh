// Dropout in kernels whose warps take a row each; philox.h has the rule.
#pragma once
#include "device.cuh"
#include "philox.h"

namespace fastft::cuda {

// Of a group of 128 columns a lane takes those of half of one call's slots.
constexpr int kSlotsOfLane = kDropoutGroup / kWarp;

__device__ inline int first_slot_of_lane() { return int(threadIdx.x) / kDropoutLanes * kSlotsOfLane; }

__device__ inline int64_t column_of_lane(int64_t group, int i) {
  return group * kDropoutGroup + (first_slot_of_lane() + i) * kDropoutLanes + int(threadIdx.x) % kDropoutLanes;
}

// Dropout's factors of this lane's columns of a group; ones without a seed.
template <class Acc>
struct LaneFactors {
  Acc of_slot[kSlotsOfLane];

  __device__ LaneFactors(int64_t row, int64_t group, int64_t groups, const int64_t* seed, int64_t threshold,
                         int64_t use) {
    for (int i = 0; i < kSlotsOfLane; ++i) of_slot[i] = Acc(1);
    if (!seed) return;
    const Acc scale = Acc(dropout_scale(threshold));
    const DropoutCall call(*seed, use, (row * groups + group) * kDropoutLanes + int(threadIdx.x) % kDropoutLanes);
    for (int i = 0; i < kSlotsOfLane; ++i)
      of_slot[i] = call.number(first_slot_of_lane() + i) >= threshold ? scale : Acc(0);
  }
};

// Calls body(column, dropout's factor) for the columns of this lane.
template <class Acc, class Body>
__device__ void for_columns(int64_t row, int64_t H, const int64_t* seed, int64_t threshold, int64_t use,
                            const Body& body) {
  const int64_t groups = dropout_groups(H);
  for (int64_t group = 0; group < groups; ++group) {
    const LaneFactors<Acc> factors(row, group, groups, seed, threshold, use);
    for (int i = 0; i < kSlotsOfLane; ++i) {
      const int64_t j = column_of_lane(group, i);
      if (j < H) body(j, factors.of_slot[i]);
    }
  }
}

}  // namespace fastft::cuda
