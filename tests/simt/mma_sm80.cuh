// Stands in for csrc/cuda/mma_sm80.cuh, with the fragments as the PTX manual has them ("Matrix Fragments for mma").
// Include it as <mma_sm80.cuh>: in quotes, the one beside the including source would come first.
#pragma once
#include <cmath>

#include "device.cuh"

#define FASTFT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace simt {

struct alignas(16) Chunk {
  uint16_t values[8];
};
constexpr Chunk kPoison{{0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff}};

inline void check_chunk(const void* address, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Chunk)) fail("gives an address that is no multiple of 16", site);
}
inline void check_shared_chunk(const void* address, Site site) {
  check_chunk(address, site);
  if (!is_shared(address)) fail("gives an address that is not in shared memory", site);
}

// ---- ldmatrix: 4 matrices of 8 rows, each row given by a lane

template <bool kTransposed>
void ldmatrix(uint32_t (&r)[4], const void* row, Site site) {
  check_shared_chunk(row, site);
  struct Mine {
    Chunk row;
    uint32_t* r;
  } mine{*static_cast<const Chunk*>(row), r};
  whole_warp_operation(
      &mine,
      [](const Lanes& lanes) {
        for (int lane = 0; lane < 32; ++lane)
          for (int matrix = 0; matrix < 4; ++matrix) {
            const auto element = [&](int i, int j) {
              return uint32_t(static_cast<Mine*>(lanes.data[8 * matrix + i])->row.values[j]);
            };
            const int i = lane / 4, j = lane % 4 * 2;
            static_cast<Mine*>(lanes.data[lane])->r[matrix] =
                kTransposed ? element(j, i) | element(j + 1, i) << 16 : element(i, j) | element(i, j + 1) << 16;
          }
      },
      site);
}

// ---- mma: d (16, 8) += a (16, K) b (K, 8)

// Products are exact; a tensor core of compute capability 8.0 adds 8 of them (4 of tf32) and d, and cuts the sum off
// (Fasi et al. 2021, Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 7:e330).
inline float cut_off(double x) {
  const float nearest = float(x);
  return std::fabs(double(nearest)) > std::fabs(x) ? std::nextafterf(nearest, 0.f) : nearest;
}

template <class T>
struct Operands {
  float* d;
  const uint32_t *a, *b;

  static constexpr int kPerRegister = 4 / sizeof(T), kDepth = 8 * kPerRegister;
  static float number(uint32_t word, int half) {
    if constexpr (sizeof(T) == 2)
      return fastft::cuda::to_float(fastft::cuda::bit_cast<T>(uint16_t(word >> 16 * half)));
    else
      return fastft::cuda::bit_cast<float>(word & 0xffffe000u);  // tf32: the other bits are not looked at
  }

  // Registers 0, 2 of a hold row lane / 4, 1, 3 eight rows below; 0, 1 the first half of the columns. Of b, 0 holds the
  // first half of the rows, column lane / 4.
  static void multiply(const Lanes& lanes) {
    float a[16][kDepth], b[kDepth][8];
    for (int lane = 0; lane < 32; ++lane)
      for (int half = 0; half < kPerRegister; ++half)
        for (int at = 0; at < 4; ++at) {
          const Operands& own = *static_cast<Operands*>(lanes.data[lane]);
          const int k = lane % 4 * kPerRegister + half;
          a[lane / 4 + at % 2 * 8][k + at / 2 * (kDepth / 2)] = number(own.a[at], half);
          if (at < 2) b[k + at * (kDepth / 2)][lane / 4] = number(own.b[at], half);
        }
    for (int lane = 0; lane < 32; ++lane)
      for (int at = 0; at < 4; ++at) {
        float& d = static_cast<Operands*>(lanes.data[lane])->d[at];
        const int i = lane / 4 + at / 2 * 8, j = lane % 4 * 2 + at % 2;
        for (int from = 0; from < kDepth; from += kDepth / 2) {
          double sum = double(d);
          for (int k = from; k < from + kDepth / 2; ++k) sum += double(a[i][k]) * double(b[k][j]);
          d = cut_off(sum);
        }
      }
  }
};

template <class T>
void mma(float (&d)[4], const uint32_t* a, const uint32_t* b, Site site) {
  Operands<T> mine{d, a, b};
  whole_warp_operation(&mine, &Operands<T>::multiply, site);
}

}  // namespace simt

namespace fastft::cuda {

// The block's dynamic shared memory, launch()'s `shared` bytes; 16-byte aligned.
__device__ inline unsigned char* dynamic_shared() { return simt::dynamic_shared(); }

template <class T>
__device__ uint32_t pack(float low, float high) {
  return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
}

// What is read before it has arrived is NaN.
__device__ inline void cp_async_16(void* shared, const void* global, bool live, FASTFT_SITE) {
  simt::check_shared_chunk(shared, {file, line});
  simt::check_chunk(global, {file, line});
  simt::Chunk chunk{};
  if (live) chunk = *static_cast<const simt::Chunk*>(global);
  *static_cast<simt::Chunk*>(shared) = simt::kPoison;
  simt::copy_later(shared, &chunk);
}
__device__ inline void cp_async_commit() { simt::commit_copies(); }
template <int kPending>
__device__ void cp_async_wait() {
  simt::wait_for_copies(kPending);
}

__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, FASTFT_SITE) {
  simt::ldmatrix<false>(r, row, {file, line});
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, FASTFT_SITE) {
  simt::ldmatrix<true>(r, row, {file, line});
}

template <class T>
__device__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FASTFT_SITE) {
  static_assert(sizeof(T) == 2, "bf16 or f16");
  simt::mma<T>(d, a, b, {file, line});
}
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FASTFT_SITE) {
  simt::mma<float>(d, a, b, {file, line});
}

}  // namespace fastft::cuda
#undef FASTFT_SITE
