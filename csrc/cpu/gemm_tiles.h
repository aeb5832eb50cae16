// Register tiles: the innermost loop of every matrix product, C (rows x kCols) += A (rows x depth) B (depth x kCols).
//
// A tile keeps kRows x kVecs accumulators in registers; each step of the depth loads kVecs registers of B and broadcasts kRows units of A.
// Floor: one fused multiply-add per accumulator and step; with 14 x 2 accumulators the loads (16 per 28 FMAs) stay below it on every core with two load ports.
// A unit is what one step of depth consumes of a row of A: one float, one double, or a pair of bf16 for VDPBF16PS.
// Accumulators start at zero and are added to C at the end, so that sums over a long depth are made of short ones (kDepth).
//
// B: panel [depth][kCols] units, packed or where it lies. A: copied, by strides known at compile time, or where it lies. C: [rows][kOutStride], dense unless
// given another stride.
// Steps also ask for lines that a later tile needs, for which there is room: a panel that comes from L3 or memory would cost its first tile 4 to 40 %.
#pragma once
#include "isa.h"

namespace FASTFT_NAMESPACE {

// Which (dtype, instruction set) uses which tile: rows x registers.
#if defined(FASTFT_ISA_AVX512) || defined(FASTFT_ISA_AVX512_BF16)
constexpr int kTileRows = 14, kTileVecs = 2;  // 28 accumulators + 2 for B + 1 broadcast = 31 of 32
#else
constexpr int kTileRows = 6, kTileVecs = 2;  // 12 + 2 + 1 = 15 of 16
#endif
constexpr bool kSmallTiles = kVectorRegisters < 32;  // what it loads weighs more beside its multiplications
// Steps of depth that a depth-major operand in place is fetched ahead, from L2 into L1: its rows lie too far apart for the CPU's own prefetcher, and what is
// fetched sooner may be gone, since they may share L1's sets.
constexpr int kAhead = 2;

constexpr int kDepth = 192;  // units per block: a panel's block of B is 24 KB (AVX-512); 128 is 1 to 2 % slower
// Row stride of a copied block of A: 13 cache lines, so that 14 rows fall into 14 different sets.
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

// ---- the rows of A, step by step: where unit i of this step is, and on to the next step

template <class Unit, int kRowStride, int kDepthStride>
struct CopiedRows {
  const Unit* a;
  Unit unit(int i) const { return a[i * kRowStride]; }
  void step() { a += kDepthStride; }
};

template <class Unit>
struct RowsInPlace {
  const char* a;
  int64_t stride;  // bytes
  Unit unit(int i) const {
    Unit unit;
    std::memcpy(&unit, a + i * stride, sizeof unit);
    return unit;
  }
  void step() {
    a += sizeof(Unit);
    asm("" : "+r"(a));  // else the compiler keeps a pointer to each row, more than there are registers
  }
};

// The same of a depth-major A: units of a step are neighbours.
template <class Unit>
struct ColumnsInPlace {
  const Unit* a;
  int64_t stride;  // units
  Unit unit(int i) const { return a[i]; }
  void step() {
    __builtin_prefetch(a + kAhead * stride);
    __builtin_prefetch(a + kAhead * stride + kTileRows - 1);
    a += stride;
  }
};

// ---- a panel of B, step by step

template <class Tile>
struct PackedPanel {
  const typename Tile::Unit* b;
  void step() { b += kTileCols<Tile>; }
};

template <class Tile>
struct PanelInPlace {
  const typename Tile::Unit* b;
  int64_t stride;  // units
  void step() {
    constexpr int kLine = 64 / int(sizeof *b);
    for (int j = 0; j < kTileCols<Tile>; j += kLine) __builtin_prefetch(b + kAhead * stride + j);
    b += stride;
  }
};

// Steps of depth from one line that a tile asks for to the next: of what comes sooner than memory gives it, the CPU drops a part.
constexpr int kFetchEvery = kSmallTiles ? 4 : 1;
struct Fetch {
  const char* line = nullptr;
  int64_t stride = 0;  // bytes
};

template <class Tile, int kRows, int kOutStride = kTileCols<Tile>, class Rows, class Panel>
void tile(typename Tile::Acc* __restrict c, Rows a, Panel b, int64_t depth, bool add, Fetch fetch) {
  using Unit = typename Tile::Unit;
  using Acc = typename Tile::Acc;
  constexpr int L = kLanes<Acc>;
  Vec<Acc> sum[kRows][kTileVecs] = {};
  const auto step = [&]() __attribute__((always_inline)) {
    Vec<Unit> panel[kTileVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kTileVecs; ++v) std::memcpy(&panel[v], b.b + v * L, sizeof panel[v]);
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) {
      const Unit value = a.unit(i);
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; ++v) sum[i][v] = Tile::multiply_add(sum[i][v], value, panel[v]);
    }
    a.step(), b.step();
    if constexpr (kFetchEvery > 1) asm("" : "+r"(b.b));  // else the compiler mixes steps, and runs out of registers
  };
  int64_t p = 0;
#pragma GCC unroll(kFetchEvery > 1 ? 1 : 2)
  for (; p + kFetchEvery <= depth; p += kFetchEvery, fetch.line += fetch.stride) {
    __builtin_prefetch(fetch.line, 0, 2);  // into L2: L1 is full
#pragma GCC unroll 4
    for (int q = 0; q < kFetchEvery; ++q) step();
  }
  if constexpr (kFetchEvery > 1)
    for (; p < depth; ++p) step();
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kTileVecs; ++v) {
      Acc* out = c + i * kOutStride + v * L;
      store(out, add ? load(out) + sum[i][v] : sum[i][v]);
    }
}

// The tile for 1 <= rows <= kTileRows: the smallest of a few sizes that holds them.
template <class Tile, int kRowStride, int kDepthStride, int kOutStride = kTileCols<Tile>, class Panel>
void tile_of_rows(int rows, typename Tile::Acc* c, const typename Tile::Unit* copied, Panel b, int64_t depth, bool add,
                  Fetch fetch = {}) {
  const CopiedRows<typename Tile::Unit, kRowStride, kDepthStride> a{copied};
  if (!fetch.line) fetch = {reinterpret_cast<const char*>(b.b)};  // a line that is there
  if (rows > kTileRows * 4 / 7) return tile<Tile, kTileRows, kOutStride>(c, a, b, depth, add, fetch);
  if constexpr (kTileRows > 8)
    if (rows > 4) return tile<Tile, 8, kOutStride>(c, a, b, depth, add, fetch);
  if (rows > 2) return tile<Tile, 4, kOutStride>(c, a, b, depth, add, fetch);
  if (rows > 1) return tile<Tile, 2, kOutStride>(c, a, b, depth, add, fetch);
  return tile<Tile, 1, kOutStride>(c, a, b, depth, add, fetch);
}

}  // namespace FASTFT_NAMESPACE
