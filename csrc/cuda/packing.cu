// Rows of padded sequences one after the other, and back: kernels.h has where each lies.
//   padded (B, S, H), packed (T, H)   any type: elements are copied, not looked at
// Moves 2 T H elements one way, (T + B S) H the other: at 3 TB/s 2 and 3 us for 32 sequences of 128 in bf16, H = 768, half of
// which is padding. One warp per padded row, 16 bytes at a time where rows are multiples of that. Not yet run on a GPU.
#include <cassert>

#include "device.cuh"

namespace fastft::cuda {
namespace {

constexpr int kRowsPerBlock = 4;

using Chunk = Vector<uint32_t, 4>;  // of what is copied; or uint16_t, of which all types are multiples

// Row `row` of the padded ones.
struct Place {
  int64_t at;    // its packed row
  bool is_live;  // whether there is one

  __device__ Place(int64_t row, const int32_t* cu_seqlens, int64_t tokens, int64_t B, int64_t S) {
    const int64_t b = row / S, s = row % S, begin = cu_seqlens[b], length = cu_seqlens[b + 1] - begin;
    assert(begin >= 0 && length >= 0 && length <= S && begin + length <= tokens && cu_seqlens[B] == tokens &&
           "packing: the attention mask has other lengths than it came with");
    at = begin + s;
    is_live = s < length;
  }
};

template <class Unit>
__global__ void pack_kernel(Unit* packed, const Unit* padded, const uint8_t* present, const int32_t* cu_seqlens,
                            int64_t tokens, int64_t B, int64_t S, int64_t units) {
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= B * S) return;
  const Place place(row, cu_seqlens, tokens, B, S);
  assert((!present || bool(present[row]) == place.is_live) &&
         "packing: the attention mask is not one up to a length and zero behind it");
  if (!place.is_live) return;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < units; i += kWarp) packed[place.at * units + i] = padded[row * units + i];
}

template <class Unit>
__global__ void unpack_kernel(Unit* padded, const Unit* packed, const int32_t* cu_seqlens, int64_t tokens, int64_t B,
                              int64_t S, int64_t units) {
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= B * S) return;
  const Place place(row, cu_seqlens, tokens, B, S);
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < units; i += kWarp)
    padded[row * units + i] = place.is_live ? packed[place.at * units + i] : Unit{};
}

// body(a unit, how many a row has)
template <class T, class Body>
void with_units(int64_t H, bool aligned, const Body& body) {
  const int64_t bytes = H * int64_t(sizeof(T));
  if (aligned && bytes % int64_t(sizeof(Chunk)) == 0)
    body(Chunk(), bytes / int64_t(sizeof(Chunk)));
  else
    body(uint16_t(), bytes / 2);
}

dim3 grid_for(int64_t rows) { return grid_of(ceil_div(rows, kRowsPerBlock)); }

}  // namespace

// ---- launchers
template <class T, class W>
void pack_rows(const PackRows<T, W>& p, Stream stream) {
  with_units<T>(p.H, aligned(p.packed, p.padded), [&](auto unit, int64_t units) {
    using Unit = decltype(unit);
    launch(&pack_kernel<Unit>, grid_for(p.B * p.S), dim3(kWarp, kRowsPerBlock), 0, stream,
           reinterpret_cast<Unit*>(p.packed), reinterpret_cast<const Unit*>(p.padded), p.present, p.cu_seqlens,
           p.tokens, p.B, p.S, units);
  });
}

template <class T, class W>
void unpack_rows(const UnpackRows<T, W>& p, Stream stream) {
  with_units<T>(p.H, aligned(p.padded, p.packed), [&](auto unit, int64_t units) {
    using Unit = decltype(unit);
    launch(&unpack_kernel<Unit>, grid_for(p.B * p.S), dim3(kWarp, kRowsPerBlock), 0, stream,
           reinterpret_cast<Unit*>(p.padded), reinterpret_cast<const Unit*>(p.packed), p.cu_seqlens, p.tokens, p.B, p.S,
           units);
  });
}

#define FASTFT_X(suffix, T, W)                            \
  template void pack_rows(const PackRows<T, W>&, Stream); \
  template void unpack_rows(const UnpackRows<T, W>&, Stream);
FASTFT_CUDA_DTYPES(FASTFT_X)
#undef FASTFT_X

}  // namespace fastft::cuda
