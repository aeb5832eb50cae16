// The matrices in scratch memory of attention, and their products: strips, kBlock columns wide, one below the other.
#pragma once
#include "gemm_pack.h"

namespace FASTFT_NAMESPACE {

// All matrices in scratch memory are strips: kBlock columns wide, one strip below the other, with a stride that spreads
// rows over the sets of L1. Left sides of products have units for elements.
constexpr int kBlock = 128, kStride = kBlock + 16;
// The last tile of a block writes no row that is the next block's.
constexpr int kLastRows = kBlock % kTileRows;
static_assert(kLastRows == 0 || kLastRows == 1 || kLastRows == 2 || kLastRows == 4, "a tile of that many rows");

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t rows_of_strip(int64_t rows) { return rows + kTileRows; }  // tiles write whole
inline int64_t strips(int64_t rows, int64_t cols) { return rows_of_strip(rows) * kStride * ceil_div(cols, kBlock); }

// Rows that the next head reads, asked for a few at a time, into L2: all at once would hold up what this head reads.
constexpr int kAheadOfTile = 12;  // rows asked for with each tile: 6 leave some of a head of 32 out, 24 are no faster
constexpr int64_t kMostAhead = 128;  // of a tensor
struct Ahead {
  struct Rows {
    const char* row;
    int64_t stride, rows;  // bytes; that are left
  } parts[4];
  int64_t bytes;  // of a row
  int count = 0;

  void some(int rows) {
    while (count > 0 && rows > 0) {
      Rows& part = parts[count - 1];
      for (; rows > 0 && part.rows > 0; --rows, --part.rows, part.row += part.stride)
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(part.row + byte, 0, 2);
      if (part.rows == 0) --count;
    }
  }
};

// C (rows, cols) = A B, or += . A: a strip matrix, or, with kTransposed, (depth, rows) in one strip. B: packed panels.
template <class Tile, bool kTransposed>
void multiply(typename Tile::Acc* c, int64_t c_strip, const typename Tile::Unit* a, int64_t a_strip,
              const typename Tile::Unit* b, int64_t panel, int64_t rows, int64_t cols, int64_t depth, bool add,
              Ahead& ahead) {
  constexpr int kCols = kTileCols<Tile>;
  static_assert(kBlock % kCols == 0, "a panel lies in one strip");
  // PyTorch multiplies one row by a sum in each lane, whose error a sum of more than a few products exceeds.
  const int64_t most = rows > kTileRows ? kBlock : kBlock / 4;
  for (int64_t col = 0; col < cols; col += kCols, b += panel) {
    typename Tile::Acc* const c_col = c + col / kBlock * c_strip + col % kBlock;
    int64_t from = 0;
    do {
      const int64_t units = least(depth - from, most);
      const typename Tile::Unit* const a_col =
          a + from / kBlock * a_strip + from % kBlock * (kTransposed ? kStride : 1);
      for (int64_t row = 0; row < rows; row += kTileRows) {
        const int live = int(least(rows - row, kTileRows));
        if constexpr (kTransposed)
          tile_of_rows<Tile, 1, kStride, kStride>(live, c_col + row * kStride, a_col + row,
                                                  PackedPanel<Tile>{b + from * kCols}, units, add || from > 0);
        else
          tile_of_rows<Tile, kStride, 1, kStride>(live, c_col + row * kStride, a_col + row * kStride,
                                                  PackedPanel<Tile>{b + from * kCols}, units, add || from > 0);
        ahead.some(kAheadOfTile);
      }
      from += most;
    } while (from < depth);
  }
}

// Rows of D elements as strips of units.
template <class Tile, class T>
void copy_rows(typename Tile::Unit* out, int64_t strip, const T* in, int64_t stride, int64_t rows, int64_t D) {
  constexpr int kElements = kBlock * Tile::kPair;
  for (int64_t from = 0; from < D; from += kElements, out += strip)
    for (int64_t i = 0; i < rows; ++i) {
      const T* row = in + i * stride + from;
      int64_t elements = least(D - from, kElements), units = 0;
      if constexpr (Tile::kPair * sizeof(T) == sizeof(float)) {  // whole units as they are, without a call of memcpy
        units = elements / Tile::kPair;
        const auto* const words = reinterpret_cast<const float*>(row);
        auto* const to = reinterpret_cast<float*>(out + i * kStride);
        for_lanes<float>(units, [&](int64_t j, auto load, auto store) { store(to + j, load(words + j)); });
        row += units * Tile::kPair, elements -= units * Tile::kPair;
      }
      if (elements > 0) copy_units<Tile>(out + i * kStride + units, row, elements);
    }
}

// Strips, times a factor for each row, rounded into rows of D elements; with `large`, past the caches where rows are aligned.
template <class T, class Acc, class Factor>
void store_rows(T* out, int64_t stride, const Acc* in, int64_t strip, int64_t rows, int64_t D, bool large,
                const Factor& factor) {
  constexpr int kVecs = int(sizeof(Acc) / sizeof(T)), L = kVecs * kLanes<Acc>;  // that fill a register of T
  const bool past_caches = large && (uintptr_t(out) | uintptr_t(stride) * sizeof(T)) % kVectorBytes == 0;
  for (int64_t from = 0; from < D; from += kBlock, in += strip)
    for (int64_t i = 0; i < rows; ++i) {
      const Vec<Acc> f = broadcast(factor(i));
      const Acc* const row = in + i * kStride;
      T* const to = out + i * stride + from;
      const int64_t cols = least(D - from, kBlock);
      int64_t j = 0;
      for (; j + L <= cols; j += L) {
        Vec<Acc> v[kVecs];
#pragma GCC unroll 2
        for (int k = 0; k < kVecs; ++k) v[k] = load(row + j + k * kLanes<Acc>) * f;
        put(to + j, v, past_caches);
      }
      for_lanes<Acc>(cols - j, [&](int64_t k, auto load_some, auto store_some) {
        (void)load_some;
        store_some(to + j + k, load(row + j + k) * f);
      });
    }
}

// Whole panels of B (depth, cols), where depth or cols is contiguous in memory.
template <class Tile, class T>
void pack_depth_major(typename Tile::Unit* out, int64_t panel, const T* b, int64_t stride, int64_t depth,
                      int64_t cols) {
  constexpr int kCols = kTileCols<Tile>;
  pack_panels<Tile, kCols, kCols>(out, panel, Operand<T>{b, stride, true}, depth, cols, 0, ceil_div(cols, kCols), 0,
                                  ceil_div(depth, Tile::kPair), false);
}
template <class Tile, class T>
void pack_col_major(typename Tile::Unit* out, int64_t panel, const T* b, int64_t stride, int64_t depth, int64_t cols) {
  for (int64_t col = 0; col < cols; col += kTileCols<Tile>, out += panel)
    pack_transposed<Tile>(out, Operand<T>{b, stride, false}, depth, col, int(least(cols - col, kTileCols<Tile>)), 0,
                          ceil_div(depth, Tile::kPair), false);
}

}  // namespace FASTFT_NAMESPACE
