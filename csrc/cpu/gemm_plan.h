// What a matrix product is cut into: who packs which operand, and the tasks of both phases. All of it is decided by sizes, before anything is read.
#pragma once
#include "gemm.h"

namespace FASTFT_NAMESPACE {

constexpr int64_t kPackDepth = 128, kPackPanels = 16;  // a task of packing B reads runs of 16 panels' width
constexpr int64_t kBlockTiles = 8, kBlockCols = 768;   // C of a task: at most 8 x 14 x 768 x 4 B = 344 KB of L2
constexpr int64_t kPackedTiles = kSmallTiles ? 16 : kBlockTiles;  // likewise, where A is packed: AVX2 gains 0.5 %
constexpr int kTasksPerThread = 8;                                // more are not needed for an even load
constexpr int64_t kPieces = 8, kPiecePanels = 3;  // of each of the last blocks at most; of a piece at least
constexpr int64_t kOwnRows = 400;                 // of C: a task that has all of them packs its panels of B itself

// Which depth-major operands tiles take from where they lie, in place of packing them.
struct InPlace {
  bool a, b;
};

// Work beside multiplying: of a tile's rows of A, in panels, and of a panel of B, in tiles. A small tile is done sooner, its
// operands are not. Copying rows costs less than packing them, fetching packed ones least.
struct Beside {
  double copied, packed_by_task, packed, of_b;
  double packs_a;  // all of a tile, before any task
};
constexpr Beside kBeside = kSmallTiles ? Beside{0.6, 2, 0.4, 0.35, 3.2} : Beside{0.3, 0.5, 0.1, 0.15, 0.8};
constexpr double kPackWork = 2;  // of a panel of B, in tiles: 0.5 from L2, 2.5 from memory (Zen 4)

// Work of a task in tiles over the whole depth.
inline double task_work(double tiles, double panels, RowsOfA a, bool alone) {
  const double of_a = a == RowsOfA::kCopied            ? kBeside.copied
                      : a == RowsOfA::kPacked && alone ? kBeside.packed_by_task
                                                       : kBeside.packed;
  return tiles * panels + of_a * tiles + kBeside.of_b * panels;
}

struct Chunk {  // panels [first, last), units [from, to) of depth
  int64_t first, last, from, to;
};

// Packing B, or a transposed A: a task is a chunk of the depth of a group of panels.
struct Packing {
  int64_t depth, panels, length, group;
  Packing(int64_t depth, int64_t panels, bool depth_major, int threads)
      : depth(depth),
        panels(panels),
        length(depth_major ? kPackDepth : kPackDepth * 8),
        group(depth_major ? kPackPanels : 1) {
    while (tasks() < 4 * threads && group > 1) group /= 2;  // long runs only where there is enough to share
    while (tasks() < 4 * threads && length > 64) length /= 2;
  }
  int64_t chunks() const { return ceil_div(depth, length); }
  int64_t tasks() const { return chunks() * ceil_div(panels, group); }
  Chunk chunk_of(int64_t task) const {
    const int64_t first = task / chunks() * group, from = task % chunks() * length;
    return {first, first + group < panels ? first + group : panels, from,
            from + length < depth ? from + length : depth};
  }
};

// The last blocks, one for each thread, in up to `thin` pieces: cores that differ in speed would else wait for each other's whole
// blocks, and training steps of 2048 tokens gain 0.6 %.
inline void cut_last(Partition& part, int64_t thin, int threads) {
  if (threads > 1 && thin > 1) part.cut = threads, part.pieces = thin < kPieces ? thin : kPieces;
}

// Whether a task packs its rows of a depth-major A, which no other task has, itself.
inline bool packs_own_a(RowsOfA a, const Partition& part) { return a == RowsOfA::kPacked && part.col_blocks == 1; }

inline Partition partition(int64_t M, int64_t N, int tile_rows, int tile_cols, RowsOfA a, int threads) {
  Partition best{ceil_div(M, tile_rows), ceil_div(N, tile_cols), 1, 1}, tried = best;
  const int64_t least_rows = ceil_div(best.tiles, a == RowsOfA::kPacked ? kPackedTiles : kBlockTiles),
                least_cols = ceil_div(best.panels, kBlockCols / tile_cols);
  double best_time = 1e300;
  for (tried.col_blocks = least_cols; tried.col_blocks <= best.panels; ++tried.col_blocks) {
    const bool alone = tried.col_blocks == 1;
    const auto panels = double(best.panels) / double(tried.col_blocks), most_panels = double(tried.block_panels());
    const double before = a == RowsOfA::kPacked && !alone ? kBeside.packs_a * double(best.tiles) / threads : 0;
    // Only as many tasks as just fill one more round of all threads: the others in between are not worth the time of asking, which all threads wait for.
    int64_t rounds = ceil_div(least_rows * tried.col_blocks, threads);
    const int64_t most_rounds = rounds + 3 > kTasksPerThread ? rounds + 3 : kTasksPerThread;
    for (tried.row_blocks = 0; rounds <= most_rounds && tried.row_blocks < best.tiles; ++rounds) {
      const int64_t fills = rounds * threads / tried.col_blocks;
      tried.row_blocks = fills < best.tiles ? fills : best.tiles;
      if (tried.row_blocks < least_rows) tried.row_blocks = least_rows;
      // Time of the busiest thread in tiles, tasks going in order to whoever is free: rounds of average tasks and a last one of the largest; half a task more
      // is what a thread waits for at the end, since cores differ in speed from moment to moment.
      const double average = task_work(double(best.tiles) / double(tried.row_blocks), panels, a, alone);
      const double largest = task_work(double(tried.block_tiles()), most_panels, a, alone);
      const double time =
          before + average * (double(ceil_div(tried.blocks(), threads) - 1) + (threads > 1 ? 0.5 : 0)) + largest;
      if (time < best_time * 0.999) best_time = time, best = tried;
    }
    if (tried.col_blocks * least_rows >= kTasksPerThread * threads) break;
  }
  // Where a block packs its rows of A, each of its pieces would: bf16 weight gradients gain 1 to 2 % without.
  if (best.blocks() >= 2 * threads && !packs_own_a(a, best))
    cut_last(best, best.block_panels() / kPiecePanels, threads);
  return best;
}

// B before it is packed; narrowed: of wider elements than the units'.
struct SourceOfB {
  bool depth_major, narrowed;
};
template <class T, class TB>
constexpr bool kNarrows = sizeof(TB) * TileFor<T>::type::kPair > sizeof(typename TileFor<T>::type::Unit);

// Whether a task that has all of C's rows would pack its panels of B itself (Plan::own). Transposing the weights of 256 rows so loses 1 to 6 % where a task
// has few panels, whose lines then are fetched for others, too, and gains 1 to 18 with more; a bf16 step of 256 rows, of fp32 weights, loses 1. Of so few
// panels that they are the tasks, every thread must have as many; then whole lines of C are its own, and no phase of packing is waited for: 4 to 29 %.
template <class Tile>
bool packs_own(int64_t M, int64_t N, SourceOfB b, int threads) {
  const int64_t panels = ceil_div(N, kTileCols<Tile>);
  if (M > kOwnRows) return false;
  if (panels < 4 * threads) return panels % threads == 0;
  return b.depth_major || M <= 128 || (!b.narrowed && panels >= 24 * threads);
}

// What gemm's two phases, packing and computing C, are cut into.
template <class Tile>
struct Plan {
  RowsOfA rows;
  Partition part;
  // With few rows packing B is dear: a task with all of them does so itself, block by block, in L1. Data gradients of 64 rows gain 17 to 23 %, of 256 up to
  // 7, forwards of 64 to 128 that are not computed transposed 5 to 20, of 256 2 to 4.
  bool own;
  bool own_a;    // a task that has all columns packs its rows of A, in L2: weight gradients of bf16 gain 1 to 3 %
  Packing b, a;  // tasks of packing, of B first; none of what is not packed

  Plan(int64_t M, int64_t N, int64_t depth, bool a_depth_major, SourceOfB from_b, InPlace in_place, bool copies,
       int threads)
      : rows(!a_depth_major ? RowsOfA::kCopied
             : in_place.a   ? RowsOfA::kInPlace
                            : RowsOfA::kPacked),
        part(partition(M, N, kTileRows, kTileCols<Tile>, rows, threads)),
        own(!a_depth_major && !in_place.b && packs_own<Tile>(M, N, from_b, threads)),
        own_a(packs_own_a(rows, part)),
        b(depth, own || in_place.b ? 0 : part.panels, from_b.depth_major, threads),
        a(depth, rows == RowsOfA::kPacked && !own_a ? part.tiles : 0, true, threads) {
    if (!own) return;
    const int64_t most = kBlockTiles * kBlockCols / kTileCols<Tile>;  // tiles of a task
    part = {part.tiles, part.panels, 1, threads > 1 ? 3 * threads : 1};
    while (part.block_panels() * part.tiles > most && part.col_blocks < part.panels) part.col_blocks += threads;
    if (part.col_blocks > part.panels) part.col_blocks = part.panels;
    cut_last(part, part.block_panels() / (copies ? kPiecePanels : 1), threads);
  }
};

// Packing B takes time, more where it is transposed, and with few rows nothing makes up for it. Of C^T = B^T A^T it is A^T that
// is packed, but M fills whole panels: where tasks could pack B themselves, C^T is 4 to 19 % faster for 32, 64 and 96 rows,
// slower by up to 6 for 56 and 84, 24 for 100, and 2 to 3 times for 1 to 8. More rows take more columns to make up for C's own
// transposition: 512 x 30522 gains 3 %, 512 x 4096 loses 5.
template <class Tile>
bool transposes(int64_t M, int64_t N, bool a_depth_major, SourceOfB b, int threads) {
  if (a_depth_major || b.depth_major) return false;
  const int64_t filled = ceil_div(M, kTileCols<Tile>) * kTileCols<Tile>;
  if (packs_own<Tile>(M, N, b, threads)) return 6 * M <= N && 25 * filled <= 23 * M + 256;
  return (M <= 256 ? 6 : 12) * M <= N;
}

}  // namespace FASTFT_NAMESPACE
