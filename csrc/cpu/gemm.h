// C = A B, blocked and packed, with an epilogue on each finished tile while it is in L1.
//
//   C (M, N)   A (M, K)   B (K, N);   Floor: 2 M N K FLOPs at the FMA peak.
// B is packed once, by all threads, into panels [N / kTileCols][K][kTileCols], which every task then streams from L3 or memory, each block fetched into L2
// while the tiles before it run (each panel is read once per task: under 2 GB/s per core). So is A where it is transposed, into tiles [M / kTileRows][K].
// Of fp32 on AVX-512, depth-major operands are not packed, but taken from where they lie, where their pages allow it (depth_major_in_place).
// What is packed is written past the caches: a core has another's lines later than memory's. A task is a block of C; for each block of depth it takes its
// rows of A from where they lie, or copies them into L2 (with a padded leading dimension, where rows 4096 bytes apart share one L1 set; as pairs, where
// units are not the elements as they are), then runs panel by panel, B's block of a panel staying in L1. C
// stays in L2 as a list of tiles, in the accumulator's type, and never has edges: edges are the epilogue's.
// Depth is summed in blocks of kDepth, then block by block in order, whatever the partition: same bits for every number of threads, and an error
// below a plain sequential sum's (3.5x PyTorch's over K = 3072). Where C has few rows, C^T is computed, which has the same bits.
#pragma once
#include "gemm_pack.h"

namespace FASTFT_NAMESPACE {

struct Touched {  // a row-major matrix
  void* data;     // or null
  int64_t row_bytes;
  int element_bytes;
};

// What happens to a finished tile: rows x cols elements of C from (row, col) on, tile[i * kTileCols + j].
template <class Acc>
struct Epilogue {
  void (*run)(const void* context, const Acc* tile, int64_t row, int64_t col, int rows, int cols);
  const void* context;
  Touched touches
      [2];  // fetched into L1 while the tile is computed: stores that miss cost 2 to 7 %, where they are not streamed
};

// Makes A's rows [i * rows, (i + 1) * rows) for each i, on any thread, before a task reads them: while one thread makes rows and waits for memory, another
// has tiles to compute. A is not depth-major, and what its rows are made of does not overlap what the epilogue writes.
struct RowMaker {
  void (*make)(const void* context, int64_t i) = nullptr;
  const void* context = nullptr;
  int64_t rows = 0;
};

// T: the dtype of activations, which selects the tile; TA, TB: the operands' own.
template <class T, class TA, class TB>
void gemm(int64_t M, int64_t N, int64_t K, Operand<TA> a, Operand<TB> b,
          Epilogue<typename TileFor<T>::type::Acc> epilogue, const Host& host, RowMaker maker = {});

// How C is cut into tasks: a grid of row_blocks x col_blocks, each of whole tiles and as near to equal as whole tiles can be. So that no thread waits for a
// whole block of another at the end, the last `cut` blocks are `pieces` tasks each; where blocks are not cut, the larger ones come first.
struct Partition {
  int64_t tiles, panels;  // of C: ceil(M / kTileRows), ceil(N / kTileCols)
  int64_t row_blocks, col_blocks;
  int64_t cut = 0, pieces = 1;

  int64_t blocks() const { return row_blocks * col_blocks; }
  int64_t tasks() const { return blocks() + cut * (pieces - 1); }
  int64_t block_tiles() const { return ceil_div(tiles, row_blocks); }  // of a task, at most
  int64_t block_panels() const { return ceil_div(panels, col_blocks); }

  struct Range {                                             // of a task
    int64_t first_tile, last_tile, first_panel, last_panel;  // without the last
  };
  Range range(int64_t task) const {
    const int64_t whole = blocks() - cut, block = task < whole ? task : whole + (task - whole) / pieces;
    const int64_t row = block / col_blocks, col = block % col_blocks;
    Range range = {begin(tiles, row_blocks, row), begin(tiles, row_blocks, row + 1), begin(panels, col_blocks, col),
                   begin(panels, col_blocks, col + 1)};
    if (task < whole) return range;
    const int64_t piece = (task - whole) % pieces, first = range.first_panel, width = range.last_panel - first;
    range.first_panel = first + begin(width, pieces, piece), range.last_panel = first + begin(width, pieces, piece + 1);
    return range;
  }
  // Of part i of n things.
  int64_t begin(int64_t n, int64_t parts, int64_t i) const {
    return cut ? i * n / parts : n / parts * i + (i < n % parts ? i : n % parts);
  }
};
enum class RowsOfA { kCopied, kPacked, kInPlace };  // by every task; by all before, or by the task that alone has them

// gemm_tasks (isa.h) says without running what gemm's two parallel phases, packing B (0) and computing C (1), are cut into without a RowMaker, in the order in which tasks
// go to whoever is free. It returns their number and writes the work of each, at most `capacity` of them, in tiles of C over the whole depth.

}  // namespace FASTFT_NAMESPACE
