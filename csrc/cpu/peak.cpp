// Yardsticks of benchmarks, which compute nothing: the rate at which this instruction set multiplies and adds, and what
// is left of it in a register tile whose operands stay in L1. Every thread repeats a loop until a common deadline.
// kSums chains hide the latency of every core so far: 4 cycles x 2 units = 8, with room; the registers hold no more.
#include <time.h>

#include "gemm_pack.h"

namespace FASTFT_NAMESPACE {
namespace {

constexpr int kSums = kVectorRegisters == 32 ? 24 : 12;
constexpr int kSteps = 4096;  // between two looks at the clock: 10 us and more

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// work(worker) takes some microseconds and flops; all that the threads do of it in a second, together.
template <class Work>
double rate(double seconds, double flops, const Host& host, const Work& work) {
  const double start = now();
  double* const done = scratch<double>(host, host.threads);
  parallel_for(host, host.threads, [&](int64_t task, int) {
    int64_t calls = 0;
    do {
      work(task);
      ++calls;
    } while (now() < start + seconds);
    done[task] = double(calls) * flops;
  });
  const double elapsed = now() - start;
  double all = 0;
  for (int i = 0; i < host.threads; ++i) all += done[i];
  return all / elapsed;
}

// step(c) is one multiply-add of `pair` products per lane, which touches no memory.
template <class Step>
double step_rate(double seconds, int pair, const Host& host, const Step& step) {
  constexpr int L = kLanes<float>;
  float* const all = scratch<float>(host, int64_t(host.threads) * kSums * L);
  for (int64_t i = 0; i < int64_t(host.threads) * kSums * L; ++i)
    all[i] = float(i / L % kSums + 1);  // all different: equal chains would be merged
  return rate(seconds, 2.0 * pair * L * kSums * kSteps, host, [&](int64_t worker) {
    float* const kept = all + worker * kSums * L;
    Vec<float> sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = load(kept + i * L);
    for (int s = 0; s < kSteps; ++s)
#pragma GCC unroll 24
      for (int i = 0; i < kSums; ++i) sums[i] = step(sums[i]);
    for (int i = 0; i < kSums; ++i) store(kept + i * L, sums[i]);
  });
}

// The loop of gemm.cpp on one tile.
template <class Tile>
double tile_rate(double seconds, const Host& host) {
  using Unit = typename Tile::Unit;
  constexpr int N = kTileCols<Tile>;
  constexpr int64_t a_size = kTileRows * kCopyStride, b_size = kDepth * N, c_size = kTileRows * N;
  float* const c = scratch<float>(host, host.threads * c_size);
  Unit* const a = scratch<Unit>(host, host.threads * (a_size + b_size));
  std::memset(a, 0x3f, size_t(host.threads * (a_size + b_size)) * sizeof *a);  // 0.75 in both dtypes
  std::memset(c, 0, size_t(host.threads * c_size) * sizeof *c);
  constexpr int kCalls = 16;
  return rate(seconds, 2.0 * Tile::kPair * kDepth * kTileRows * N * kCalls, host, [&](int64_t worker) {
    const Unit* const own = a + worker * (a_size + b_size);
    for (int i = 0; i < kCalls; ++i)
      tile_of_rows<Tile, kCopyStride, 1>(kTileRows, c + worker * c_size, own, PackedPanel<Tile>{own + a_size}, kDepth,
                                         true);
  });
}

}  // namespace

double peak_f32(double seconds, const Host& host) {
  const Vec<float> half = broadcast(0.5f), one = broadcast(1.0f);
  return step_rate(seconds, 1, host, [=](Vec<float> c) { return c * half + one; });
}

double peak_bf16(double seconds, const Host& host) {
#if defined(FASTFT_ISA_AVX512_BF16)
  const Vec<uint32_t> halves = broadcast(0x3f003f00u);  // pairs of bf16 0.5
  return step_rate(seconds, 2, host, [=](Vec<float> c) { return TileBf16Dot::multiply_add(c, 0x3f003f00u, halves); });
#else
  (void)seconds, (void)host;
  return 0;
#endif
}

double tile_f32(double seconds, const Host& host) { return tile_rate<TileF32>(seconds, host); }

double tile_bf16(double seconds, const Host& host) { return tile_rate<TileFor<bf16>::type>(seconds, host); }

}  // namespace FASTFT_NAMESPACE
