// Packing, blocking and loop order of the matrix product; maths and floor are in gemm.h, what is cut into which tasks in gemm_plan.h.
#include <sched.h>

#include <type_traits>

#include "gemm_plan.h"

namespace FASTFT_NAMESPACE {
namespace {

// Whether tiles may take depth-major operands of T from where they lie. With fewer rows to a tile each step has less time for the lines that it needs: on
// AVX2 a weight gradient would lose up to half of its speed.
template <class Tile, class T>
constexpr bool kMayLie = std::is_same_v<T, float> && std::is_same_v<typename Tile::Unit, float> && !kSmallTiles;
constexpr int64_t kTileLines = kDepth / kFetchEvery;  // that a tile fetches, at most
constexpr int kPanelRows = (kTileRows + 7) / 8 * 8;   // row stride of a packed tile of A
constexpr int64_t kFewRows = 512;                     // of C: a panel of B serves few tiles
constexpr int64_t kFewPanels = 24;                    // of C: a row of A serves few tiles
constexpr size_t kReach = 12 << 20;                   // bytes of 4 KB pages whose addresses a core remembers (Zen 4)
constexpr int kRowsAhead = 4;                         // of stores: what is fetched sooner need not be in L1 any more

// ---- one task's rows of A, units [from, to) of depth

template <class Tile, class T>
void copy_rows(typename Tile::Unit* out, Operand<T> a, int64_t K, int64_t row, int64_t rows, int64_t from, int64_t to) {
  constexpr int P = Tile::kPair;
  const int64_t elements = (K < to * P ? K : to * P) - from * P;
  for (int64_t i = 0; i < rows; ++i)
    copy_units<Tile>(out + i * kCopyStride, a.data + (row + i) * a.stride + from * P, elements);
}

// Whether whole tiles take their rows of A from where they lie: units as they are, that do not share L1's sets. Copying
// them costs 2 to 5 % of the product, of 64 rows of bf16 as much as 20. Tiles of few rows come back to each often enough
// where there are many columns: copied, side by side, AVX2 has them 0.5 to 2 % faster (of 256 rows 2 to 4 % slower).
template <class Tile, class T>
bool readable_in_place(Operand<T> a, int64_t M, int64_t N, int64_t K) {
  if (a.depth_major || sizeof(T) * Tile::kPair != sizeof(typename Tile::Unit) || (K | a.stride) % Tile::kPair)
    return false;
  if (kSmallTiles && M > kFewRows && N > kFewPanels * kTileCols<Tile>) return false;
  return !rows_share_sets(a.stride * int64_t(sizeof(T)));
}

// Units of depth [from, to) of a depth-major A's columns [row, row + rows), as pack_panels would lay them out.
template <class Unit>
void copy_columns(Unit* out, Operand<Unit> a, int64_t row, int64_t rows, int64_t from, int64_t to) {
  for (int64_t p = from; p < to; ++p, out += kPanelRows)
    std::memcpy(out, a.data + p * a.stride + row, size_t(rows) * sizeof *out);
}

// Which depth-major operands tiles take from where they lie, in place of packing them: a weight gradient gains 2 to 6 %, a data gradient of 64 rows 8. There
// each step of a tile is at another row, which wants pages of 2 MB; of 4 KB, few enough, or few tiles that come back to them: else it loses 1 to 3 %. A weight
// gradient has done with a depth's pages before it goes on: each operand may have twice the pages whose addresses a core remembers (4 to 15 % at 4096 tokens).
template <class Tile, class TA, class TB>
InPlace depth_major_in_place(int64_t M, int64_t N, int64_t K, Operand<TA> a, Operand<TB> b, const Host& host) {
  using Unit = typename Tile::Unit;
  InPlace can = {kMayLie<Tile, TA> && a.depth_major, kMayLie<Tile, TB> && b.depth_major};
  const auto row_bytes = uintptr_t(b.stride) * sizeof(TB);
  if (N % kTileCols<Tile> || (uintptr_t(b.data) | row_bytes) % 64) can.b = false;  // whole panels of whole lines
  const size_t reach = a.depth_major ? 2 * kReach : M <= kFewRows ? kReach : kReach / 4;
  const auto near = [&](const auto& operand, int64_t width) {
    return K == 0 ||
           host.in_small_pages(operand.data, size_t((K - 1) * operand.stride + width) * sizeof(Unit)) <= reach;
  };
  return {can.a && near(a, M), can.b && near(b, N)};
}

// Asks for part `slice` of `slices` of a task's rows of A, units [from, to) of depth, as far as there are any: needed when
// the depth before it is done, tiles would otherwise wait for memory: 1 to 4 % of the product.
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
  const auto [first_tile, last_tile, first_panel, last_panel] = part.range(task);
  const int64_t row = first_tile * kTileRows, end = last_tile * kTileRows;
  return {row, (end < M ? end : M) - row, first_panel, last_panel - first_panel};
}

// C = A B, or with `transposed` C^T, of which the epilogue is.
template <class T, class TA, class TB>
class Product {
  using Tile = typename TileFor<T>::type;
  using Unit = typename Tile::Unit;
  using Acc = typename Tile::Acc;
  static constexpr int kCols = kTileCols<Tile>;
  static constexpr int64_t kTileUnits = int64_t(kCopyStride) * kTileRows;  // of a copied tile of A
  static constexpr int64_t kPackedTile = kDepth * kPanelRows;              // of a packed one
  static constexpr int64_t kTileOfC = kTileRows * kCols;

 public:
  Product(int64_t M, int64_t N, int64_t K, Operand<TA> a, Operand<TB> b, const Epilogue<Acc>& epilogue, bool transposed,
          RowMaker maker, const Host& host)
      : M(M),
        N(N),
        K(K),
        a(a),
        b(b),
        epilogue(epilogue),
        transposed(transposed),
        maker(maker),
        host(host),
        packed(in_place.b ? nullptr
                          : scratch<Unit>(host, plan.own ? host.threads * kDepth * kCols : part.panels * panel_size)),
        packed_a(packs_a ? scratch<Unit>(host, part.tiles * a_panel_size) : nullptr),
        c_all(scratch<Acc>(host, host.threads * c_size)),
        a_all(packs_a ? nullptr : scratch<Unit>(host, host.threads * a_size)) {}

  void run() const {
    parallel_for(host, plan.b.tasks() + plan.a.tasks(), [&](int64_t task, int) {
      if (task < plan.b.tasks()) {
        pack_b(packed, plan.b.chunk_of(task), true);
      } else {
        const Chunk chunk = plan.a.chunk_of(task - plan.b.tasks());
        pack_panels<Tile, kTileRows, kPanelRows>(packed_a, a_panel_size, a, K, M, chunk.first, chunk.last, chunk.from,
                                                 chunk.to, true);
      }
      streamed();
    });
    if (maker.make) return compute_made();
    parallel_for(host, part.tasks(), [&](int64_t task, int worker) {
      compute(task, worker);
      streamed();
    });
  }

 private:
  const int64_t M, N, K, depth = ceil_div(K, Tile::kPair);
  const Operand<TA> a;
  const Operand<TB> b;
  const Epilogue<Acc>& epilogue;
  const bool transposed;
  const RowMaker maker;
  const Host& host;

  const InPlace in_place = depth_major_in_place<Tile>(M, N, K, a, b, host);
  const bool rows_in_place = readable_in_place<Tile>(a, M, N, K);
  const Plan<Tile> plan{
      M, N, depth, a.depth_major, {b.depth_major, kNarrows<T, TB>}, in_place, !rows_in_place, host.threads};
  const Partition& part = plan.part;
  const bool packs_a = plan.a.tasks() > 0;
  const bool fetches = epilogue.touches[0].data || epilogue.touches[1].data;
  const int64_t panel_size = depth * kCols, a_panel_size = depth * kPanelRows;
  // A task's C, beyond whose rows its last square is read, and rows of A.
  const int64_t c_size = part.block_tiles() * part.block_panels() * kTileOfC + kCols * kCols;
  const int64_t a_size = in_place.a ? kPackedTile : part.block_tiles() * (plan.own_a ? kPackedTile : kTileUnits);
  Unit* const packed;    // B: all panels, or with plan.own a block for each thread
  Unit* const packed_a;  // or null
  Acc* const c_all;
  Unit* const a_all;  // or null

  struct Task {
    Block block, next;  // next: probably this thread's
    int64_t tiles;
    Acc* c;
    Unit* rows_of_a;  // copied, or packed by this task; null where A is packed before
    Unit* own_b;      // with plan.own, else null
  };
  struct Step {  // a block of depth, [from, to), of a task's panel
    int64_t panel, from, to;
    Unit* packed;  // null where B is taken from where it lies
    // From which on tiles fetch A's next rows, those before it B's next block. Rows that are copied only where all of them
    // can be fetched: of a panel's burst (prefetch_rows) the CPU drops most, and copying waits for memory, 1 to 4 % of the
    // product. Rows in place have all of a task's time to come.
    int64_t fetches_a;
  };

  // Panel 0 would lie at `out`, from the first unit of depth on.
  void pack_b(Unit* out, const Chunk& chunk, bool past_caches) const {
    if (b.depth_major)
      pack_panels<Tile, kCols, kCols>(out, panel_size, b, K, N, chunk.first, chunk.last, chunk.from, chunk.to,
                                      past_caches);
    else
      pack_transposed<Tile>(out + chunk.first * panel_size, b, K, chunk.first * kCols, cols_of(chunk.first), chunk.from,
                            chunk.to, past_caches);
  }

  int cols_of(int64_t panel) const { return int(N - panel * kCols < kCols ? N - panel * kCols : kCols); }

  // Before task t come the rows of tasks up to t + threads. A task waits only for rows that come before it, which somebody
  // has begun to make.
  void compute_made() const {
    const int64_t chunks = ceil_div(M, maker.rows), tasks = part.tasks();
    int64_t* const order = scratch<int64_t>(host, chunks + tasks);  // a task, or ~i of rows
    char* const made = scratch<char>(host, chunks);
    std::memset(made, 0, size_t(chunks));
    int64_t count = 0, ordered = 0;
    for (int64_t task = 0; task < tasks; order[count++] = task++) {
      const Block ahead = block_of(part, task + host.threads < tasks ? task + host.threads : tasks - 1, M);
      while (ordered * maker.rows < ahead.row + ahead.rows) order[count++] = ~ordered++;
    }
    parallel_for(host, count, [&](int64_t i, int worker) {
      if (order[i] < 0) {
        maker.make(maker.context, ~order[i]);
        streamed();
        __atomic_store_n(made + ~order[i], 1, __ATOMIC_RELEASE);
        return;
      }
      const Block block = block_of(part, order[i], M);
      for (int64_t chunk = block.row / maker.rows; chunk * maker.rows < block.row + block.rows; ++chunk)
        while (!__atomic_load_n(made + chunk, __ATOMIC_ACQUIRE)) sched_yield();
      compute(order[i], worker);
      streamed();
    });
  }

  void compute(int64_t index, int worker) const {
    const int64_t following = index + host.threads < part.tasks() ? index + host.threads : index;
    const Block block = block_of(part, index, M);
    const Task task = {block,
                       block_of(part, following, M),
                       ceil_div(block.rows, kTileRows),
                       c_all + worker * c_size,
                       packs_a ? nullptr : a_all + worker * a_size,
                       plan.own ? packed + worker * (kDepth * kCols) : nullptr};
    int64_t from = 0;
    do {
      const int64_t to = from + kDepth < depth ? from + kDepth : depth;
      copy_a(task, from, to);
      for (int64_t panel = 0; panel < block.panels; ++panel) compute_panel(task, panel, from, to);
      from = to;
    } while (from < depth);
  }

  // What tiles cannot take from where it lies, and is not packed.
  void copy_a(const Task& task, int64_t from, int64_t to) const {
    const auto [row, rows, panel, panels] = task.block;
    const int64_t whole = rows / kTileRows;
    if (in_place.a && rows % kTileRows) {
      if constexpr (kMayLie<Tile, TA>)
        copy_columns(task.rows_of_a, a, row + whole * kTileRows, rows % kTileRows, from, to);
    } else if (plan.own_a) {
      const int64_t first = row / kTileRows;
      pack_panels<Tile, kTileRows, kPanelRows>(task.rows_of_a - first * kPackedTile - from * kPanelRows, kPackedTile, a,
                                               K, M, first, first + task.tiles, from, to, false);
    } else if (!a.depth_major) {
      const int64_t left = rows_in_place ? whole : 0;
      copy_rows<Tile>(task.rows_of_a + left * kTileUnits, a, K, row + left * kTileRows, rows - left * kTileRows, from,
                      to);
    }
  }

  void compute_panel(const Task& task, int64_t panel, int64_t from, int64_t to) const {
    const int64_t index = task.block.panel + panel, col = index * kCols, place = index * panel_size + from * kCols;
    const int cols = cols_of(index);
    const Step step = {panel, from, to,
                       in_place.b ? nullptr
                       : plan.own ? task.own_b
                                  : packed + place,
                       first_to_fetch_a(task, to - from)};
    if (plan.own) pack_b(step.packed - place, {index, index + 1, from, to}, false);
    if (step.fetches_a == task.tiles) {
      const bool same = to < depth;
      const Block& block = same ? task.block : task.next;
      prefetch_rows<Tile>(a, K, block.row, block.rows, same ? to : 0, same ? to + kDepth : kDepth, panel,
                          task.block.panels);
    }
    const bool finished = to == depth && !transposed;
    const bool kept = from > 0 || !finished;  // a tile that is done at once needs no place of its own, and stays in L1
    Acc* const c_panel = kept ? task.c + panel * task.tiles * kTileOfC : task.c;
    for (int64_t t = 0; t < task.tiles; ++t) {
      const int64_t row = task.block.row + t * kTileRows, left = task.block.rows - t * kTileRows;
      const int live = int(left < kTileRows ? left : kTileRows);
      Acc* const c_tile = kept ? c_panel + t * kTileOfC : task.c;
      if (finished && fetches) prefetch_touched(epilogue, row, col, live, cols);
      if constexpr (kMayLie<Tile, TB>) {
        if (in_place.b)
          multiply(c_tile, PanelInPlace<Tile>{b.data + from * b.stride + col, b.stride}, task, step, t, live);
        else
          multiply(c_tile, PackedPanel<Tile>{step.packed}, task, step, t, live);
      } else {
        multiply(c_tile, PackedPanel<Tile>{step.packed}, task, step, t, live);
      }
      if (finished) finish(c_tile, row, col, live, cols);
    }
    if (to == depth && transposed) run_transposed<Tile>(epilogue, c_panel, task.block.row, col, task.block.rows, cols);
  }

  // Tile t of a panel, of which `live` rows count.
  template <class Panel>
  inline __attribute__((always_inline)) void multiply(Acc* c_tile, Panel of_b, const Task& task, const Step& step,
                                                      int64_t t, int live) const {
    const int64_t row = task.block.row + t * kTileRows, length = step.to - step.from;
    const bool whole = live == kTileRows, add = step.from > 0;
    const Fetch fetch = fetch_of(task, step, t);
    if constexpr (kMayLie<Tile, TA>)
      if (in_place.a && whole)
        return tile<Tile, kTileRows>(c_tile, ColumnsInPlace<Unit>{a.data + step.from * a.stride + row, a.stride}, of_b,
                                     length, add, fetch);
    if (a.depth_major)
      return tile_of_rows<Tile, 1, kPanelRows>(live, c_tile, packed_rows(task, step, t), of_b, length, add, fetch);
    if (rows_in_place && whole)
      return tile<Tile, kTileRows>(c_tile, RowsInPlace<Unit>{bytes_of_a(row, step.from * Tile::kPair), row_bytes(a)},
                                   of_b, length, add, fetch);
    tile_of_rows<Tile, kCopyStride, 1>(live, c_tile, task.rows_of_a + t * kTileUnits, of_b, length, add, fetch);
  }

  // Of a depth-major A's tile t.
  const Unit* packed_rows(const Task& task, const Step& step, int64_t t) const {
    if (packs_a) return packed_a + (task.block.row / kTileRows + t) * a_panel_size + step.from * kPanelRows;
    return task.rows_of_a + (plan.own_a ? t * kPackedTile : 0);
  }
  // Of a row of an A that is not depth-major, from an element of depth on.
  const char* bytes_of_a(int64_t row, int64_t element) const {
    return reinterpret_cast<const char*>(a.data + row * a.stride + element);
  }
  template <class Element>
  static int64_t row_bytes(const Operand<Element>& operand) {
    return operand.stride * int64_t(sizeof(Element));
  }
  // One of the lines that have the elements from `outer` on in a depth-major operand's rows of a unit of depth.
  template <class Element>
  static const char* line_of_step(const Operand<Element>& operand, int64_t unit, int64_t outer, int64_t line) {
    const Element* const row = operand.data + (unit * Tile::kPair + line % Tile::kPair) * operand.stride;
    return reinterpret_cast<const char*>(row + outer) + line / Tile::kPair * 64;
  }

  static constexpr int64_t kLinesOfB =
      Tile::kPair * ceil_div(kCols * int64_t(sizeof(TB)), 64);  // of a step, in its rows
  static constexpr int64_t kTilesForB =
      ceil_div(kFetchEvery * kCols * int64_t(sizeof(Unit)), 64);  // where it is packed

  // Step::fetches_a for a block of so many steps; the number of tiles if none does.
  int64_t first_to_fetch_a(const Task& task, int64_t steps) const {
    const int64_t for_b = plan.own || in_place.b ? kFetchEvery * kLinesOfB : kTilesForB;
    if (a.depth_major) return for_b < task.tiles ? for_b : task.tiles - 1;
    const int64_t most = steps / kFetchEvery, lines = kDepth * Tile::kPair * int64_t(sizeof(TA)) / 64 + 1;
    if (rows_in_place || most == 0) return task.tiles;
    const bool all = ceil_div(task.block.rows, most) * lines <= task.block.panels * (task.tiles - for_b);
    return all ? for_b : task.tiles;
  }

  // What tile t of a panel asks for: B's next block is on its way first, the last of the other tiles fetch A's.
  Fetch fetch_of(const Task& task, const Step& step, int64_t t) const {
    const bool last_depth = step.to == depth;
    if (t >= step.fetches_a) {
      const int64_t left = (task.block.panels - 1 - step.panel) * (task.tiles - step.fetches_a) + task.tiles - 1 - t;
      const Block& block = last_depth ? task.next : task.block;
      const Fetch of_a = fetch_of_a(block, last_depth ? 0 : step.to, left, (step.to - step.from) / kFetchEvery);
      if (of_a.line) return of_a;
    }
    const bool last_panel = step.panel + 1 == task.block.panels, last_block = last_panel && last_depth;
    const int64_t panel = last_block ? task.next.panel : task.block.panel + (last_panel ? 0 : step.panel + 1);
    const int64_t from = last_block ? 0 : last_panel ? step.to : step.from;
    if (!plan.own && !in_place.b) {
      const Unit* const next = packed + panel * panel_size + from * kCols;
      return {reinterpret_cast<const char*>(next) + t % kTilesForB * (kTileLines * 64), 64};
    }
    if (!b.depth_major) {  // a line of each of its rows, those behind the next panel's too
      constexpr int64_t kLines = ceil_div(kDepth * Tile::kPair * int64_t(sizeof(TB)), 64);
      const TB* const row = b.data + panel * kCols * b.stride + from * Tile::kPair;
      return {reinterpret_cast<const char*>(row) + (step.panel * task.tiles + t) % kLines * 64, row_bytes(b)};
    }
    const int64_t line = t % (kLinesOfB * kFetchEvery);
    return {line_of_step(b, from + line / kLinesOfB * kTileLines, panel * kCols, line % kLinesOfB),
            Tile::kPair * row_bytes(b)};
  }

  // Lines of A's next rows, from unit `from` of depth on, for the last tile but `left` before they are needed, which asks for
  // `most`; a null line if there are none left. It asks for rows behind the block's, too: to count them would cost more.
  Fetch fetch_of_a(const Block& block, int64_t from, int64_t left, int64_t most) const {
    const int64_t units = from + kDepth < depth ? kDepth : depth - from;
    if (units == 0 || most == 0) return {};
    if (!a.depth_major) {
      const char* const run = bytes_of_a(block.row, from * Tile::kPair);
      const bool whole_lines = (uintptr_t(run) | uintptr_t(row_bytes(a))) % 64 == 0;
      const int64_t lines = ceil_div(units * Tile::kPair * int64_t(sizeof(TA)), 64) + !whole_lines;
      const int64_t row = left / lines * most;  // a line of each row, then of the next rows
      if (row >= block.rows) return {};
      return {run + row * row_bytes(a) + left % lines * 64, row_bytes(a)};
    }
    if (packs_a) {
      const int64_t parts = ceil_div(units * kPanelRows * int64_t(sizeof(Unit)), most * 64), tile = left / parts;
      if (tile >= ceil_div(block.rows, kTileRows)) return {};
      const Unit* const next = packed_a + (block.row / kTileRows + tile) * a_panel_size + from * kPanelRows;
      return {reinterpret_cast<const char*>(next) + left % parts * most * 64, 64};
    }
    // Rows of depth begin alike in a line, as a rule. Packing reads whole registers.
    const int64_t parts = ceil_div(units, most), line = left / parts;
    const auto in_line = int64_t(uintptr_t(a.data + block.row) % 64);
    const int64_t bytes = (block.rows + kPanelRows - kTileRows) * int64_t(sizeof(TA));
    if (line >= Tile::kPair * ceil_div(in_line + bytes, 64)) return {};
    return {line_of_step(a, from + left % parts * most, block.row, line) - in_line, Tile::kPair * row_bytes(a)};
  }

  void finish(const Acc* c_tile, int64_t row, int64_t col, int live, int cols) const {
    const int group = fetches ? kRowsAhead : kTileRows;
    for (int i = 0; i < live; i += group) {
      const int some = live - i < group ? live - i : group, next = live - i - some;
      if (fetches) prefetch_touched(epilogue, row + i + some, col, next < group ? next : group, cols);
      epilogue.run(epilogue.context, c_tile + i * kCols, row + i, col, some, cols);
    }
  }
};

}  // namespace

template <class T, class TA, class TB>
void gemm(int64_t M, int64_t N, int64_t K, Operand<TA> a, Operand<TB> b,
          Epilogue<typename TileFor<T>::type::Acc> epilogue, const Host& host, RowMaker maker) {
  if (M == 0 || N == 0) return;
  const SourceOfB from_b = {b.depth_major, kNarrows<T, TB>};
  if (!maker.make && transposes<typename TileFor<T>::type>(M, N, a.depth_major, from_b, host.threads))
    Product<T, TB, TA>(N, M, K, b, a, epilogue, true, {}, host).run();
  else
    Product<T, TA, TB>(M, N, K, a, b, epilogue, false, maker, host).run();
}

namespace {

template <class Tile>
int64_t tasks_of(GemmQuery q, int phase, double* work, int64_t capacity) {
  if (transposes<Tile>(q.M, q.N, q.a_depth_major, {q.b_depth_major, false}, q.threads))
    q = {q.N, q.M, q.K, q.is_bf16, !q.b_depth_major, !q.a_depth_major, q.threads};
  const int64_t depth = ceil_div(q.K, Tile::kPair);
  const Plan<Tile> plan(q.M, q.N, depth, q.a_depth_major, {q.b_depth_major, false}, {}, false, q.threads);
  const Partition& part = plan.part;
  const int64_t b_tasks = plan.b.tasks(), tasks = phase == 0 ? b_tasks + plan.a.tasks() : part.tasks();
  for (int64_t task = 0; task < tasks && task < capacity; ++task)
    if (phase == 0) {
      const bool of_a = task >= b_tasks;
      const Chunk chunk = of_a ? plan.a.chunk_of(task - b_tasks) : plan.b.chunk_of(task);
      work[task] = kPackWork * double(chunk.last - chunk.first) * double(chunk.to - chunk.from) / double(depth) *
                   (of_a ? double(kTileRows) / kTileCols<Tile> : 1);
    } else {
      const auto [first_tile, last_tile, first_panel, last_panel] = part.range(task);
      const auto panels = double(last_panel - first_panel);
      work[task] = task_work(double(last_tile - first_tile), panels, plan.rows, plan.own_a) +
                   (plan.own && depth > 0 ? kPackWork * panels : 0);
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
                                Epilogue<typename TileFor<T>::type::Acc>, const Host&, RowMaker);
FASTFT_GEMM(bf16, bf16, bf16)
FASTFT_GEMM(bf16, bf16, float)
FASTFT_GEMM(bf16, float, float)
#if !defined(FASTFT_ISA_AVX512_BF16)
FASTFT_GEMM(float, float, float)
FASTFT_GEMM(double, double, double)
#endif

}  // namespace FASTFT_NAMESPACE
