// Register tiles: the innermost loop of every matrix product, C (rows x kCols) += A (rows x depth) B (depth x kCols).
//
// A tile keeps kRows x kVecs accumulators in registers; each step of the depth loads kVecs registers of B and broadcasts kRows units of A.
// Floor: one fused multiply-add per accumulator and step; with 14 x 2 accumulators the loads (16 per 28 FMAs) stay below it on every core with two load ports.
// A unit is what one step of depth consumes of a row of A: one float, one double, or a pair of bf16 for VDPBF16PS.
// Accumulators start at zero and are added to C at the end, so that sums over a long depth are made of short ones (kDepth).
//
// B: panel [depth][kCols] units. A: unit (i, p) at a[i * kRowStride + p * kDepthStride], both compile-time constants, so that one pointer serves all rows.
// C: [rows][kOutStride], dense unless given another stride.
#pragma once
#include "isa.h"

namespace FASTFT_NAMESPACE {

// Which (dtype, instruction set) uses which tile: rows x registers.
#if defined(FASTFT_ISA_AVX512) || defined(FASTFT_ISA_AVX512_BF16)
constexpr int kTileRows = 14, kTileVecs = 2;  // 28 accumulators + 2 for B + 1 broadcast = 31 of 32
#else
constexpr int kTileRows = 6, kTileVecs = 2;  // 12 + 2 + 1 = 15 of 16
#endif

constexpr int kDepth = 128;  // units per block: a panel's block of B is 16 KB (AVX-512), its tile of A 7 KB: both in L1
// Row stride of a copied block of A: 9 cache lines, so that 14 rows fall into 14 different sets.
constexpr int kCopyStride = kDepth + 16;

struct TileF32 {
  using Unit = float;
  using Acc = float;
  static constexpr int kPair = 1;  // elements of depth per unit
  static inline Vec<float> multiply_add(Vec<float> c, float a, Vec<float> b) { return c + broadcast(a) * b; }
};

struct TileF64 {
  using Unit = double;
  using Acc = double;
  static constexpr int kPair = 1;
  static inline Vec<double> multiply_add(Vec<double> c, double a, Vec<double> b) { return c + broadcast(a) * b; }
};

#if defined(FASTFT_ISA_AVX512_BF16)
struct TileBf16Dot {
  using Unit = uint32_t;  // two bf16: the lower half is the earlier in depth
  using Acc = float;
  static constexpr int kPair = 2;
  static inline Vec<float> multiply_add(Vec<float> c, uint32_t a, Vec<uint32_t> b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
};
#endif

template <class Tile>
constexpr int kTileCols = kTileVecs * kLanes<typename Tile::Acc>;

template <class Tile, int kRows, int kRowStride, int kDepthStride, int kOutStride = kTileCols<Tile>>
void tile(typename Tile::Acc* __restrict c, const typename Tile::Unit* __restrict a,
          const typename Tile::Unit* __restrict b, int64_t depth, bool add) {
  using Unit = typename Tile::Unit;
  using Acc = typename Tile::Acc;
  constexpr int L = kLanes<Acc>, N = kTileCols<Tile>;
  Vec<Acc> sum[kRows][kTileVecs] = {};
  for (int64_t p = 0; p < depth; ++p) {
    Vec<Unit> panel[kTileVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kTileVecs; ++v) std::memcpy(&panel[v], b + p * N + v * L, sizeof panel[v]);
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) {
      const Unit value = a[i * kRowStride + p * kDepthStride];
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; ++v) sum[i][v] = Tile::multiply_add(sum[i][v], value, panel[v]);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kTileVecs; ++v) {
      Acc* out = c + i * kOutStride + v * L;
      store(out, add ? load(out) + sum[i][v] : sum[i][v]);
    }
}

// The tile for 1 <= rows <= kTileRows: the smallest of a few sizes that holds them.
template <class Tile, int kRowStride, int kDepthStride, int kOutStride = kTileCols<Tile>>
void tile_of_rows(int rows, typename Tile::Acc* c, const typename Tile::Unit* a, const typename Tile::Unit* b,
                  int64_t depth, bool add) {
  if (rows > kTileRows * 4 / 7) return tile<Tile, kTileRows, kRowStride, kDepthStride, kOutStride>(c, a, b, depth, add);
  if constexpr (kTileRows > 8)
    if (rows > 4) return tile<Tile, 8, kRowStride, kDepthStride, kOutStride>(c, a, b, depth, add);
  if (rows > 2) return tile<Tile, 4, kRowStride, kDepthStride, kOutStride>(c, a, b, depth, add);
  if (rows > 1) return tile<Tile, 2, kRowStride, kDepthStride, kOutStride>(c, a, b, depth, add);
  return tile<Tile, 1, kRowStride, kDepthStride, kOutStride>(c, a, b, depth, add);
}

}  // namespace FASTFT_NAMESPACE
