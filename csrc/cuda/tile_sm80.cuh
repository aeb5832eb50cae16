// Tiles of 16-bit numbers: from memory to shared memory, from there into the fragments of tensor cores, and back.
// A tile's rows are padded by 16 bytes, so that the eight rows that an ldmatrix reads lie in different banks.
#pragma once
#include <mma_sm80.cuh>  // not the one beside this file by its place: tests/simt has another one

#include "device.cuh"

namespace fastft::cuda {

constexpr int kChunk = 8;  // elements of 16 bytes: what is moved at once where it lies at a multiple of that

template <class T>
struct alignas(16) Chunk {
  T v[kChunk];
};

// Whether all rows begin at multiples of a chunk; each of the strides is elements from one to the next of something.
template <class T, class... Strides>
bool in_chunks(const T* data, Strides... strides) {
  return ((strides % kChunk == 0) && ...) && reinterpret_cast<uintptr_t>(data) % alignof(Chunk<T>) == 0;
}

constexpr int tile_pitch(int cols) { return cols + kChunk; }

// Starts to bring a tile (kRows, kCols) into shared memory, zeros where a row is not below `rows` or a column not below
// `cols`, which may be negative. Without chunks it has come when this returns. All threads of the block take part.
template <int kRows, int kCols, int kThreads, class T>
__device__ void load_tile(T* tile, const T* data, int64_t stride, int64_t rows, int64_t cols, bool chunks) {
  constexpr int kAcross = kCols / kChunk, kApart = kThreads / kAcross;
  static_assert(kCols % kChunk == 0 && kThreads % kAcross == 0 && kRows % kApart == 0, "chunks for every thread");
  const int line = threadIdx.x / kAcross, column = threadIdx.x % kAcross * kChunk;
  const auto is_live = [=](int row) { return row < rows && column < cols; };
  if (chunks) {
#pragma unroll
    for (int row = line; row < kRows; row += kApart)
      cp_async_16(tile + row * tile_pitch(kCols) + column, data + (is_live(row) ? row * stride + column : 0),
                  is_live(row));
  } else {
#pragma unroll 1
    for (int row = line; row < kRows; row += kApart)
#pragma unroll 1
      for (int e = 0; e < kChunk; ++e)
        tile[row * tile_pitch(kCols) + column + e] =
            is_live(row) && column + e < cols ? data[row * stride + column + e] : T{};
  }
}

// The fragment of rows row..row + 15 and depth d..d + 15: of a, or of b for two products side by side. kAcross: rows of
// the operand are columns of the tile.
template <int kPitch, bool kAcross, class T>
__device__ void load_a(uint32_t (&r)[4], const T* tile, int row, int d) {
  const int lane = threadIdx.x % kWarp, i = lane % 8, lower = lane / 8 % 2 * 8, upper = lane / 16 * 8;
  if constexpr (kAcross)
    ldmatrix_x4_trans(r, tile + (d + i + upper) * kPitch + row + lower);
  else
    ldmatrix_x4(r, tile + (row + i + lower) * kPitch + d + upper);
}
template <int kPitch, bool kAcross, class T>
__device__ void load_b(uint32_t (&r)[4], const T* tile, int row, int d) {
  const int lane = threadIdx.x % kWarp, i = lane % 8, lower = lane / 8 % 2 * 8, upper = lane / 16 * 8;
  if constexpr (kAcross)
    ldmatrix_x4_trans(r, tile + (d + i + lower) * kPitch + row + upper);
  else
    ldmatrix_x4(r, tile + (row + i + upper) * kPitch + d + lower);
}

// Products with both halves of load_b's fragment.
template <class T>
__device__ void mma_pair(float (&left)[4], float (&right)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma_m16n8k16<T>(left, a, {b[0], b[1]});
  mma_m16n8k16<T>(right, a, {b[2], b[3]});
}

// ---- eight neighbours at once, or the first `live` of them one by one

template <class T>
__device__ void read(float (&values)[kChunk], const T* from, int live, bool chunks) {
  if (chunks) {
    const auto chunk = *reinterpret_cast<const Chunk<T>*>(from);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) values[e] = to_float(chunk.v[e]);
  } else {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) values[e] = e < live ? to_float(from[e]) : 0.f;
  }
}

template <class T>
__device__ void write(T* to, const Chunk<T>& chunk, int live, bool chunks) {
  if (chunks) {
    *reinterpret_cast<Chunk<T>*>(to) = chunk;
  } else {
#pragma unroll
    for (int e = 0; e < kChunk; ++e)
      if (e < live) to[e] = chunk.v[e];
  }
}
template <class T>
__device__ void write(T* to, const float (&values)[kChunk], int live, bool chunks) {
  Chunk<T> chunk;
#pragma unroll
  for (int e = 0; e < kChunk; ++e) chunk.v[e] = from_float<T>(values[e]);
  write(to, chunk, live, chunks);
}

}  // namespace fastft::cuda
