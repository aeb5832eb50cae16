// The kernels of planted.cu; each writes 64 floats.
#pragma once

#define PLANTED_KERNELS(X)    \
  X(none)                     \
  X(missing_barrier)          \
  X(missing_second_barrier)   \
  X(unwritten_shared)         \
  X(divergent_barrier)        \
  X(exit_before_barrier)      \
  X(divergent_shuffle)        \
  X(shuffle_from_exited_lane) \
  X(failed_assertion)         \
  X(read_before_wait)         \
  X(waits_for_older_groups)   \
  X(misaligned_copy)          \
  X(misaligned_row)           \
  X(row_not_in_shared)        \
  X(lane_missing_from_mma)    \
  X(lane_exited_before_mma)

namespace planted {
#define FASTFT_X(name) void name(float* out);
PLANTED_KERNELS(FASTFT_X)
#undef FASTFT_X
void too_many_threads(float* out);
}  // namespace planted
