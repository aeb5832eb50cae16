// The kernels of planted.cu; each writes 64 floats. The first five are right.
#pragma once

#define PLANTED_KERNELS(X)     \
  X(none)                      \
  X(halves_of_words)           \
  X(lanes_that_sync)           \
  X(atomics)                   \
  X(dynamic_shared_memory)     \
  X(missing_barrier)           \
  X(missing_second_barrier)    \
  X(lanes_that_only_shuffle)   \
  X(lanes_that_sync_in_halves) \
  X(atomic_and_plain)          \
  X(unwritten_shared)          \
  X(divergent_barrier)         \
  X(exit_before_barrier)       \
  X(divergent_shuffle)         \
  X(shuffle_from_exited_lane)  \
  X(failed_assertion)          \
  X(read_before_wait)          \
  X(waits_for_older_groups)    \
  X(copy_over_what_is_read)    \
  X(misaligned_copy)           \
  X(misaligned_row)            \
  X(row_not_in_shared)         \
  X(lane_missing_from_mma)     \
  X(lane_exited_before_mma)    \
  X(unaligned_vector)          \
  X(beyond_global)             \
  X(beyond_static_shared)      \
  X(beyond_dynamic_shared)

namespace planted {
#define FASTFT_X(name) void name(float* out);
PLANTED_KERNELS(FASTFT_X)
#undef FASTFT_X
void too_many_threads(float* out);
}  // namespace planted
