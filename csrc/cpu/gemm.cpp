// Packing, blocking and loop order of the matrix product; the plan is in gemm.h.
#include "gemm.h"

#include <type_traits>

namespace FASTFT_NAMESPACE {
namespace {

// Whether tiles may take depth-major operands of T from where they lie. With fewer rows to a tile each step has less time for the lines that it needs: on
// AVX2 a weight gradient would lose up to half of its speed.
template <class Tile, class T>
constexpr bool kMayLie = std::is_same_v<T, float> && std::is_same_v<typename Tile::Unit, float> && kTileRows > 8;
template <class Tile>
constexpr int kPanelLines = (kTileCols<Tile> * int(sizeof(typename Tile::Unit)) + 63) / 64;  // of a step of depth
constexpr int kPanelRows = (kTileRows + 7) / 8 * 8;    // row stride of a packed tile of A
constexpr int64_t kPackDepth = 128, kPackPanels = 16;  // a task of packing B reads runs of 16 panels' width
constexpr int64_t kBlockTiles = 8, kBlockCols = 768;   // C of a task: at most 8 x 14 x 768 x 4 B = 344 KB of L2
constexpr int kTasksPerThread = 8;                     // more are not needed for an even load
constexpr int64_t kOwnRows = 280;                      // of C: a task that has all of them packs its panels of B itself
constexpr int64_t kFewRows = 512;                      // of C: a panel of B serves few tiles
constexpr size_t kReach = 12 << 20;                    // bytes of 4 KB pages whose addresses a core remembers (Zen 4)
constexpr int kRowsAhead = 4;                          // of stores: what is fetched sooner need not be in L1 any more

// ---- one task's rows of A, units [from, to) of depth

template <class Tile, class T>
void copy_rows(typename Tile::Unit* out, Operand<T> a, int64_t K, int64_t row, int64_t rows, int64_t from, int64_t to) {
  constexpr int P = Tile::kPair;
  const int64_t elements = (K < to * P ? K : to * P) - from * P;
  for (int64_t i = 0; i < rows; ++i)
    copy_units<Tile>(out + i * kCopyStride, a.data + (row + i) * a.stride + from * P, elements);
}

// Whether whole tiles can take their rows of A from where they lie: units as they are, that do not share L1's sets. Copying
// them costs 2 to 5 % of the product, of 64 rows of bf16 as much as 20.
template <class Tile, class T>
bool readable_in_place(Operand<T> a, int64_t K) {
  if (a.depth_major || sizeof(T) * Tile::kPair != sizeof(typename Tile::Unit) || (K | a.stride) % Tile::kPair)
    return false;
  return !rows_share_sets(a.stride * int64_t(sizeof(T)));
}

// Units of depth [from, to) of a depth-major A's columns [row, row + rows), as pack_panels would lay them out.
template <class Unit>
void copy_columns(Unit* out, Operand<Unit> a, int64_t row, int64_t rows, int64_t from, int64_t to) {
  for (int64_t p = from; p < to; ++p, out += kPanelRows)
    std::memcpy(out, a.data + p * a.stride + row, size_t(rows) * sizeof *out);
}

// Which depth-major operands tiles take from where they lie, in place of packing them: a weight gradient gains 2 to 6 %, a data gradient of 64 rows 8. There
// each step of a tile is at another row, which wants pages of 2 MB; of 4 KB, few enough, or few tiles that come back to them: else it loses 1 to 3 %.
struct InPlace {
  bool a, b;
};
template <class Tile, class TA, class TB>
InPlace depth_major_in_place(int64_t M, int64_t N, int64_t K, Operand<TA> a, Operand<TB> b, const Host& host) {
  using Unit = typename Tile::Unit;
  InPlace can = {kMayLie<Tile, TA> && a.depth_major, kMayLie<Tile, TB> && b.depth_major};
  const auto row_bytes = uintptr_t(b.stride) * sizeof(TB);
  if (N % kTileCols<Tile> || (uintptr_t(b.data) | row_bytes) % 64) can.b = false;  // whole panels of whole lines
  const auto small_pages = [&](const auto& operand, int64_t width) {
    return K > 0 ? host.in_small_pages(operand.data, size_t((K - 1) * operand.stride + width) * sizeof(Unit)) : 0;
  };
  const size_t small = (can.a ? small_pages(a, M) : 0) + (can.b ? small_pages(b, N) : 0);
  return small <= (a.depth_major || M <= kFewRows ? kReach : kReach / 4) ? can : InPlace{false, false};
}

// Asks for part `slice` of `slices` of a task's rows of A, units [from, to) of depth, as far as there are any: needed when
// the depth before it is done, they would otherwise wait for memory: 1 to 4 % of the product.
template <class Tile, class T>
void prefetch_rows(Operand<T> a, int64_t K, int64_t row, int64_t rows, int64_t from, int64_t to, int64_t slice,
                   int64_t slices) {
  const int64_t begin = from * Tile::kPair, end = K < to * Tile::kPair ? K : to * Tile::kPair;
  for (int64_t i = slice * rows / slices; i < (slice + 1) * rows / slices; ++i) {
    const char* const run = reinterpret_cast<const char*>(a.data + (row + i) * a.stride + begin);
    const char* const end_of_run = run + (end - begin) * int64_t(sizeof(T));
    for (const char* line = run - uintptr_t(run) % 64; line < end_of_run; line += 64) __builtin_prefetch(line);
  }
}

template <class Acc>
void prefetch_touched(const Epilogue<Acc>& epilogue, int64_t row, int64_t col, int rows, int cols) {
  for (const Touched& target : epilogue.touches) {
    if (!target.data) continue;
    for (int i = 0; i < rows; ++i) {
      const char* const line =
          static_cast<const char*>(target.data) + (row + i) * target.row_bytes + col * target.element_bytes;
      for (int64_t byte = 0; byte < int64_t(cols) * target.element_bytes; byte += 64)
        __builtin_prefetch(line + byte, 1);
    }
  }
}

// In tiles over the whole depth. Copying a tile of A costs about a third of a panel's work (2 of 64 elements against kTileCols), loading a panel of B about
// a sixth of a tile's.
inline double task_work(double tiles, double panels) { return tiles * panels + 0.3 * tiles + 0.15 * panels; }

constexpr double kPackWork = 2;  // of a panel over the whole depth: 0.5 tiles' time from L2, 2.5 from memory (Zen 4)

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

}  // namespace

Partition partition(int64_t M, int64_t N, int tile_rows, int tile_cols, int threads) {
  Partition best{ceil_div(M, tile_rows), ceil_div(N, tile_cols), 1, 1}, tried = best;
  const int64_t least_rows = ceil_div(best.tiles, kBlockTiles),
                least_cols = ceil_div(best.panels, kBlockCols / tile_cols);
  double best_time = 1e300;
  for (tried.col_blocks = least_cols; tried.col_blocks <= best.panels; ++tried.col_blocks) {
    // Only as many tasks as just fill one more round of all threads: the others in between are not worth the time of asking, which all threads wait for.
    int64_t rounds = ceil_div(least_rows * tried.col_blocks, threads);
    const int64_t most_rounds = rounds + 3 > kTasksPerThread ? rounds + 3 : kTasksPerThread;
    for (tried.row_blocks = 0; rounds <= most_rounds && tried.row_blocks < best.tiles; ++rounds) {
      const int64_t fills = rounds * threads / tried.col_blocks;
      tried.row_blocks = fills < best.tiles ? fills : best.tiles;
      if (tried.row_blocks < least_rows) tried.row_blocks = least_rows;
      // Time of the busiest thread in tiles, tasks going in order to whoever is free: rounds of average tasks and a last one of the largest; half a task more
      // is what a thread waits for at the end, since cores differ in speed from moment to moment.
      const double average =
          task_work(double(best.tiles) / double(tried.row_blocks), double(best.panels) / double(tried.col_blocks));
      const double largest = task_work(double(tried.block_tiles()), double(tried.block_panels()));
      const double time = average * (double(ceil_div(tried.tasks(), threads) - 1) + (threads > 1 ? 0.5 : 0)) + largest;
      if (time < best_time * 0.999) best_time = time, best = tried;
    }
    if (tried.col_blocks * least_rows >= kTasksPerThread * threads) break;
  }
  return best;
}

namespace {

// What gemm's two phases, packing and computing C, are cut into.
template <class Tile>
struct Plan {
  Partition part;
  // With few rows packing B is dear: a task with all of them does so itself, block by block, in L1. Data gradients of 64 rows gain 17 to 23 %, of 256 up to 7;
  // transposing B in this way loses up to 6. Not where there are too few panels for all threads.
  bool own;
  Packing b, a;  // tasks of packing, of B first; none of what is not packed

  Plan(int64_t M, int64_t N, int64_t depth, bool a_depth_major, bool b_depth_major, InPlace in_place, int threads)
      : part(partition(M, N, kTileRows, kTileCols<Tile>, threads)),
        own(!a_depth_major && b_depth_major && !in_place.b && M <= kOwnRows && part.panels >= 4 * threads),
        b(depth, own || in_place.b ? 0 : part.panels, b_depth_major, threads),
        a(depth, a_depth_major && !in_place.a ? part.tiles : 0, true, threads) {
    if (!own) return;
    const int64_t most = kBlockTiles * kBlockCols / kTileCols<Tile>;  // tiles of a task
    part.row_blocks = 1, part.col_blocks = threads > 1 ? 3 * threads : 1;
    while (part.block_panels() * part.tiles > most && part.col_blocks < part.panels) part.col_blocks += threads;
    if (part.col_blocks > part.panels) part.col_blocks = part.panels;
  }
};

// Hands a panel of finished tiles, dense (rows, kTileCols) from (row, col) of C^T on, to the epilogue of C, in squares.
template <class Tile>
void run_transposed(const Epilogue<typename Tile::Acc>& epilogue, const typename Tile::Acc* tiles, int64_t row,
                    int64_t col, int64_t rows, int cols) {
  using Unit = typename Tile::Unit;
  constexpr int L = kLanes<Unit>, N = kTileCols<Tile>;
  alignas(64) Unit square[N * N];
  for (int64_t i = 0; i < rows; i += N) {
    for (int u = 0; u < N; u += L)
      for (int v = 0; v < N; v += L)
        transpose_square<Tile>(
            [&](int j) {
              Vec<Unit> units;
              std::memcpy(&units, tiles + (i + u + j) * N + v, sizeof units);
              return units;
            },
            [&](int j, Vec<Unit> units) { std::memcpy(square + (v + j) * N + u, &units, sizeof units); });
    epilogue.run(epilogue.context, reinterpret_cast<const typename Tile::Acc*>(square), col, row + i, cols,
                 int(rows - i < N ? rows - i : N));
  }
}

struct Block {  // a task's part of C
  int64_t row, rows, panel, panels;
};

inline Block block_of(const Partition& part, int64_t task, int64_t M) {
  const int64_t row_block = task / part.col_blocks, col_block = task % part.col_blocks;
  const int64_t row = part.first_tile(row_block) * kTileRows, end = part.first_tile(row_block + 1) * kTileRows;
  const int64_t panel = part.first_panel(col_block);
  return {row, (end < M ? end : M) - row, panel, part.first_panel(col_block + 1) - panel};
}

// C = A B, or with `transposed` C^T, of which the epilogue is.
template <class T, class TA, class TB>
void product(int64_t M, int64_t N, int64_t K, Operand<TA> a, Operand<TB> b,
             const Epilogue<typename TileFor<T>::type::Acc>& epilogue, bool transposed, const Host& host) {
  using Tile = typename TileFor<T>::type;
  using Unit = typename Tile::Unit;
  using Acc = typename Tile::Acc;
  constexpr int kCols = kTileCols<Tile>;
  const int64_t depth = ceil_div(K, Tile::kPair);
  const InPlace in_place = depth_major_in_place<Tile>(M, N, K, a, b, host);
  const Plan<Tile> plan(M, N, depth, a.depth_major, b.depth_major, in_place, host.threads);
  const Partition& part = plan.part;
  const int64_t row_bytes = a.stride * int64_t(sizeof(TA));
  const char* const a_bytes = reinterpret_cast<const char*>(a.data);
  const bool rows_in_place = readable_in_place<Tile>(a, K);
  const bool fetches = epilogue.touches[0].data || epilogue.touches[1].data;
  constexpr int64_t kTileUnits = int64_t(kCopyStride) * kTileRows;

  const int64_t panel_size = depth * kCols, a_panel_size = depth * kPanelRows;
  const bool packs_a = a.depth_major && !in_place.a;
  Unit* const packed =
      in_place.b ? nullptr : scratch<Unit>(host, plan.own ? host.threads * kDepth * kCols : part.panels * panel_size);
  Unit* const packed_a = packs_a ? scratch<Unit>(host, part.tiles * a_panel_size) : nullptr;
  // Panel 0 would lie at `out`, from the first unit of depth on.
  const auto pack = [&](Unit* out, const Chunk& chunk, bool past_caches) {
    if (b.depth_major)
      pack_panels<Tile, kCols, kCols>(out, panel_size, b, K, N, chunk.first, chunk.last, chunk.from, chunk.to,
                                      past_caches);
    else
      pack_transposed<Tile>(out + chunk.first * panel_size, b, K, chunk.first * kCols,
                            int(N - chunk.first * kCols < kCols ? N - chunk.first * kCols : kCols), chunk.from,
                            chunk.to, past_caches);
  };
  parallel_for(host, plan.b.tasks() + plan.a.tasks(), [&](int64_t task, int) {
    if (task < plan.b.tasks()) {
      pack(packed, plan.b.chunk_of(task), true);
    } else {
      const Chunk chunk = plan.a.chunk_of(task - plan.b.tasks());
      pack_panels<Tile, kTileRows, kPanelRows>(packed_a, a_panel_size, a, K, M, chunk.first, chunk.last, chunk.from,
                                               chunk.to, true);
    }
    streamed();
  });

  // A task's C, beyond whose rows its last square is read.
  const int64_t c_size = part.block_tiles() * part.block_panels() * kTileRows * kCols + kCols * kCols,
                a_size = in_place.a ? kDepth * kPanelRows : part.block_tiles() * kTileUnits;
  Acc* const c_all = scratch<Acc>(host, host.threads * c_size);
  Unit* const a_all = packs_a ? nullptr : scratch<Unit>(host, host.threads * a_size);
  parallel_for(host, part.tasks(), [&](int64_t task, int worker) {
    Acc* const c = c_all + worker * c_size;
    Unit* const rows_of_a = a_all + worker * a_size;
    const auto [row0, rows, panel0, panels] = block_of(part, task, M);
    const int64_t tiles = ceil_div(rows, kTileRows);
    // Probably this thread's next.
    const Block next_block = block_of(part, task + host.threads < part.tasks() ? task + host.threads : task, M);
    int64_t from = 0;
    do {
      const int64_t to = from + kDepth < depth ? from + kDepth : depth;
      if (in_place.a && rows % kTileRows) {
        if constexpr (kMayLie<Tile, TA>)
          copy_columns(rows_of_a, a, row0 + rows / kTileRows * kTileRows, rows % kTileRows, from, to);
      } else if (!a.depth_major) {
        const int64_t left = rows_in_place ? rows / kTileRows : 0;
        copy_rows<Tile>(rows_of_a + left * kTileUnits, a, K, row0 + left * kTileRows, rows - left * kTileRows, from,
                        to);
      }
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t place = (panel0 + panel) * panel_size + from * kCols;
        Unit* const b_block = in_place.b ? nullptr : packed + (plan.own ? worker * (kDepth * kCols) : place);
        if (plan.own) pack(b_block - place, {panel0 + panel, panel0 + panel + 1, from, to}, false);
        const int64_t col = (panel0 + panel) * kCols;
        const int cols = int(N - col < kCols ? N - col : kCols);
        if (!a.depth_major) {
          const bool same = to < depth;
          prefetch_rows<Tile>(a, K, same ? row0 : next_block.row, same ? rows : next_block.rows, same ? to : 0,
                              same ? to + kDepth : kDepth, panel, panels);
        }
        const bool finished = to == depth && !transposed;
        const bool kept =
            from > 0 || !finished;  // a tile that is done at once needs no place of its own, and stays in L1
        Acc* const c_panel = kept ? c + panel * tiles * (kTileRows * kCols) : c;
        // The block of B that comes next, of which each step of a tile fetches a line.
        const bool last_panel = panel + 1 == panels, last_block = last_panel && to == depth;
        const int64_t next_panel = last_block   ? next_block.panel
                                   : last_panel ? panel0
                                                : panel0 + panel + 1,
                      next_from = last_block   ? 0
                                  : last_panel ? to
                                               : from;
        const auto fetch_of_b = [&](int64_t t) -> Fetch {
          if (!plan.own && !in_place.b)
            return {reinterpret_cast<const char*>(packed + next_panel * panel_size + next_from * kCols) +
                        t % kPanelLines<Tile> * (kDepth * 64),
                    64};
          constexpr int64_t P = Tile::kPair, kLines = P * ceil_div(kCols * int64_t(sizeof(TB)), 64);  // of a step
          const int64_t b_row_bytes = b.stride * int64_t(sizeof(TB)), line = t % kLines;
          return {reinterpret_cast<const char*>(b.data + next_panel * kCols) +
                      (next_from * P + line % P) * b_row_bytes + line / P * 64,
                  P * b_row_bytes};
        };
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t row = row0 + t * kTileRows;
          Acc* const c_tile = kept ? c_panel + t * (kTileRows * kCols) : c;
          const int live = int(rows - t * kTileRows < kTileRows ? rows - t * kTileRows : kTileRows);
          Fetch fetch = fetch_of_b(t);
          // B's next block is on its way after kPanelLines tiles; the last of the others fetch A's next block.
          if (a.depth_major && t >= kPanelLines<Tile>) {
            const int64_t left = (panels - 1 - panel) * (tiles - kPanelLines<Tile>)+tiles - 1 - t;
            const int64_t a_row = to < depth ? row0 : next_block.row, a_from = to < depth ? to : 0;
            if (to < depth ? left < tiles : left < ceil_div(next_block.rows, kTileRows)) {
              if (in_place.a)
                fetch = {a_bytes + a_from * row_bytes + a_row * int64_t(sizeof(TA)) + left * 64, row_bytes};
              else
                fetch.line = reinterpret_cast<const char*>(packed_a + (a_row / kTileRows + left) * a_panel_size +
                                                           a_from * kPanelRows);
            }
          }
          const Unit* const copied = rows_of_a + t * kTileUnits;
          if (finished && fetches) prefetch_touched(epilogue, row, col, live, cols);
          const auto multiply = [&](auto of_b) {
            const bool whole = live == kTileRows, add = from > 0;
            if constexpr (kMayLie<Tile, TA>)
              if (in_place.a && whole)
                return tile<Tile, kTileRows>(c_tile, ColumnsInPlace<Unit>{a.data + from * a.stride + row, a.stride},
                                             of_b, to - from, add, fetch);
            if (a.depth_major)
              tile_of_rows<Tile, 1, kPanelRows>(
                  live, c_tile, in_place.a ? rows_of_a : packed_a + row / kTileRows * a_panel_size + from * kPanelRows,
                  of_b, to - from, add, fetch);
            else if (rows_in_place && whole)
              tile<Tile, kTileRows>(
                  c_tile, RowsInPlace<Unit>{a_bytes + row * row_bytes + from * int64_t(sizeof(Unit)), row_bytes}, of_b,
                  to - from, add, fetch);
            else
              tile_of_rows<Tile, kCopyStride, 1>(live, c_tile, copied, of_b, to - from, add, fetch);
          };
          if constexpr (kMayLie<Tile, TB>) {
            if (in_place.b)
              multiply(PanelInPlace<Tile>{b.data + from * b.stride + col, b.stride});
            else
              multiply(PackedPanel<Tile>{b_block});
          } else {
            multiply(PackedPanel<Tile>{b_block});
          }
          if (!finished) continue;
          const int group = fetches ? kRowsAhead : kTileRows;
          for (int i = 0; i < live; i += group) {
            const int some = live - i < group ? live - i : group, next = live - i - some;
            if (fetches) prefetch_touched(epilogue, row + i + some, col, next < group ? next : group, cols);
            epilogue.run(epilogue.context, c_tile + i * kCols, row + i, col, some, cols);
          }
        }
        if (to == depth && transposed) run_transposed<Tile>(epilogue, c_panel, row0, col, rows, cols);
      }
      from = to;
    } while (from < depth);
    streamed();
  });
}

// Packing B takes a pass of its own, a dear one where it is transposed, and with few rows nothing makes up for it. Of
// C^T = B^T A^T it is A^T that is packed: forwards of 64 rows gain 2 to 12 % (384 -> 384 loses 2),
// those of 512 lose up to 4 %.
inline bool transposes(int64_t M, int64_t N, bool a_depth_major, bool b_depth_major) {
  return !a_depth_major && !b_depth_major && 6 * M <= N;
}

}  // namespace

template <class T, class TA, class TB>
void gemm(int64_t M, int64_t N, int64_t K, Operand<TA> a, Operand<TB> b,
          Epilogue<typename TileFor<T>::type::Acc> epilogue, const Host& host) {
  if (M == 0 || N == 0) return;
  if (transposes(M, N, a.depth_major, b.depth_major))
    product<T>(N, M, K, b, a, epilogue, true, host);
  else
    product<T>(M, N, K, a, b, epilogue, false, host);
}

namespace {

template <class Tile>
int64_t tasks_of(GemmQuery q, int phase, double* work, int64_t capacity) {
  if (transposes(q.M, q.N, q.a_depth_major, q.b_depth_major))
    q = {q.N, q.M, q.K, q.is_bf16, !q.b_depth_major, !q.a_depth_major, q.threads};
  const int64_t depth = ceil_div(q.K, Tile::kPair);
  const Plan<Tile> plan(q.M, q.N, depth, q.a_depth_major, q.b_depth_major, {}, q.threads);
  const Partition& part = plan.part;
  const int64_t b_tasks = plan.b.tasks(), tasks = phase == 0 ? b_tasks + plan.a.tasks() : part.tasks();
  for (int64_t task = 0; task < tasks && task < capacity; ++task)
    if (phase == 0) {
      const bool of_a = task >= b_tasks;
      const Chunk chunk = of_a ? plan.a.chunk_of(task - b_tasks) : plan.b.chunk_of(task);
      work[task] = kPackWork * double(chunk.last - chunk.first) * double(chunk.to - chunk.from) / double(depth) *
                   (of_a ? double(kTileRows) / kTileCols<Tile> : 1);
    } else {
      const int64_t row = task / part.col_blocks, col = task % part.col_blocks;
      const auto panels = double(part.first_panel(col + 1) - part.first_panel(col));
      work[task] = task_work(double(part.first_tile(row + 1) - part.first_tile(row)), panels) +
                   (plan.own ? kPackWork * panels : 0);
    }
  return tasks;
}

}  // namespace

int64_t gemm_tasks(const GemmQuery& q, int phase, double* work, int64_t capacity) {
  if (q.M == 0 || q.N == 0) return 0;
  return q.is_bf16 ? tasks_of<TileFor<bf16>::type>(q, phase, work, capacity)
                   : tasks_of<TileFor<float>::type>(q, phase, work, capacity);
}

// Forward and data gradient multiply activations by parameters, the weight gradient activations by activations.
#define FASTFT_GEMM(T, TA, TB)                                                       \
  template void gemm<T, TA, TB>(int64_t, int64_t, int64_t, Operand<TA>, Operand<TB>, \
                                Epilogue<typename TileFor<T>::type::Acc>, const Host&);
FASTFT_GEMM(bf16, bf16, bf16)
FASTFT_GEMM(bf16, bf16, float)
FASTFT_GEMM(bf16, float, float)
#if !defined(FASTFT_ISA_AVX512_BF16)
FASTFT_GEMM(float, float, float)
FASTFT_GEMM(double, double, double)
#endif

}  // namespace FASTFT_NAMESPACE
