// The rate at which this instruction set multiplies and adds, as the yardstick of benchmarks; it computes nothing.
// Every thread runs a loop of independent multiply-adds that touches no memory, until a common deadline.
// kSums chains hide the latency of every core so far: 4 cycles x 2 units = 8, with room; the registers hold no more.
#include <time.h>

#include "gemm_tiles.h"

namespace FASTFT_NAMESPACE {
namespace {

constexpr int kSums = kVectorRegisters == 32 ? 24 : 12;
constexpr int kSteps = 4096;  // between two looks at the clock: 10 us and more

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// step(c) is one multiply-add per lane; flops counts one call of it.
template <class Step>
double rate(double seconds, double flops, const Host& host, const Step& step) {
  const double start = now();
  double* const done = scratch<double>(host, host.threads * 2);
  parallel_for(host, host.threads, [&](int64_t task, int) {
    Vec<float> sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = broadcast(float(i + 1));  // all different: equal chains would be merged
    int64_t steps = 0;
    do {
      for (int s = 0; s < kSteps; ++s)
#pragma GCC unroll 24
        for (int i = 0; i < kSums; ++i) sums[i] = step(sums[i]);
      steps += kSteps;
    } while (now() < start + seconds);
    float total = 0;
    for (int i = 0; i < kSums; ++i) total += sum_lanes<float>(sums[i])[0];
    done[2 * task] = double(steps) * kSums * flops;
    done[2 * task + 1] = total;  // the sums are used
  });
  const double elapsed = now() - start;
  double all = 0;
  for (int i = 0; i < host.threads; ++i) all += done[2 * i];
  return all / elapsed;
}

}  // namespace

double peak_f32(double seconds, const Host& host) {
  const Vec<float> half = broadcast(0.5f), one = broadcast(1.0f);
  return rate(seconds, 2.0 * kLanes<float>, host, [=](Vec<float> c) { return c * half + one; });
}

double peak_bf16(double seconds, const Host& host) {
#if defined(FASTFT_ISA_AVX512_BF16)
  const Vec<uint32_t> halves = broadcast(0x3f003f00u);  // pairs of bf16 0.5
  return rate(seconds, 4.0 * kLanes<float>, host,
              [=](Vec<float> c) { return TileBf16Dot::multiply_add(c, 0x3f003f00u, halves); });
#else
  (void)seconds, (void)host;
  return 0;
#endif
}

}  // namespace FASTFT_NAMESPACE
