// What an encoder begins with: rows of three tables, LayerNorm, dropout.
//   h = word[id] + type[type id] + position[position id]   y = dropout's factor ((h - mean) rstd w + b)
//   backward: LayerNorm's (layer_norm.cpp has the formulas) of factor dy;   dtable[i] = sum over rows m with id i of dh[m]
//   ids (M) int64   word (V, H), position (P, H), type (C, H), w, b W   y, dy, dh (M, H) T   mean, rstd fp32 (fp64 for fp64)
// Moves M H (sizeof(W) + sizeof(T)) bytes forward (a word's row, y; the other two tables stay in cache), M H (sizeof(W) + 5 sizeof(T)) +
// (V + P + C) H sizeof(W) backward (dy, word, dh written, and read once for each table; the gradients of tables): for 2048 rows of 768 in
// fp32 0.29 ms and 3.1 ms at 44 GB/s, most of it BERT's 30522 words. Reached on two cores of Zen 4: 0.9 ms, of rows that lie anywhere in 94 MB, and
// 4.4 ms. h is not kept: that would write as much as taking the rows again reads.
// A row of a table's gradient is one task's, and its sum has a fixed order, in pieces of kSumRows, since each row of `type` sums up to M others.
#include "column_sums.h"
#include "row_norm.h"

namespace FASTFT_NAMESPACE {
namespace {

constexpr int64_t kRows = 8;        // of a task of the forward
constexpr int64_t kTableRows = 64;  // of a task of the scatter
constexpr int64_t kFewRows = 2048;  // a table of fewer rows is shared by columns, too
constexpr int64_t kColumns = 128;   // of such a task
constexpr int kUnrolled = 4;        // registers that a pass over rows sums

// The sum of the tables' rows at column j.
template <class Args>
struct Rows {
  const decltype(Args::word) word, position, type;

  Rows(const Args& p, int64_t row)
      : word(p.word + p.ids[row] * p.H),
        position(p.position + p.position_ids[row] * p.H),
        type(p.type_ids ? p.type + p.type_ids[row] * p.H : nullptr) {}

  template <class Load>
  inline auto at(int64_t j, const Load& load) const {
    auto sum = load(word + j);
    if (type) sum += load(type + j);
    return sum + load(position + j);
  }
};

// Of rows order[from] to order[to] of x, at columns j to j + registers * lanes.
template <int kRegisters, class Acc, class T, class W, class Load, class Store>
inline void sum_rows(W* out, const T* x, const int64_t* order, int64_t from, int64_t to, int64_t H, const Load& load,
                     const Store& store) {
  constexpr int L = kLanes<Acc>;
  Vec<Acc> total[kRegisters] = {};
  while (from < to) {
    const int64_t end = from + kSumRows < to ? from + kSumRows : to;
    Vec<Acc> sum[kRegisters] = {};
    for (; from < end; ++from)
      for (int r = 0; r < kRegisters; ++r) sum[r] += load(x + order[from] * H + r * L);
    for (int r = 0; r < kRegisters; ++r) total[r] += sum[r];
  }
  for (int r = 0; r < kRegisters; ++r) store(out + r * L, total[r]);
}

// Zeros, past the caches where that is possible: almost all of a gradient of words is.
template <class W>
inline void clear(W* out, int64_t count) {
  const size_t bytes = size_t(count) * sizeof(W);
  if ((reinterpret_cast<uintptr_t>(out) | bytes) % kVectorBytes != 0) {
    std::memset(out, 0, bytes);
    return;
  }
  for (int64_t j = 0; j < count; j += kVectorBytes / int64_t(sizeof(W))) stream(out + j, Vec<uint32_t>{});
}

}  // namespace

template <class T, class W>
void embedding_forward(const EmbeddingForward<T, W>& p, const Host& host) {
  using Acc = Compute<W>;
  const int64_t H = p.H, pitch = padded_row(H);
  const Dropout dropout(p.seed, p.threshold, p.use);
  Acc* const buffers = scratch<Acc>(host, 2 * pitch * host.threads);
  parallel_for(host, ceil_div(p.M, kRows), [&](int64_t task, int worker) {
    Acc *const v = buffers + 2 * pitch * worker, *const factors = v + pitch;
    for (int64_t row = task * kRows; row < p.M && row < (task + 1) * kRows; ++row) {
      const Rows<EmbeddingForward<T, W>> rows(p, row);
      if (dropout) dropout_factors(factors, dropout, row, H);
      Vec<Acc> total = {};
      for_lanes<Acc>(H, [&](int64_t j, auto load, auto) {
        const Vec<Acc> value = rows.at(j, load);
        store(v + j, value);
        total += value;
      });
      const RowMoments<Acc> moments = center_row(v, total, H, p.eps);
      for_lanes<Acc>(H, [&](int64_t j, auto load, auto store) {
        Vec<Acc> y = (FASTFT_NAMESPACE::load(v + j) - moments.shift) * moments.rstd * load(p.w + j) + load(p.b + j);
        if (dropout) y *= FASTFT_NAMESPACE::load(factors + j);
        store(p.y + row * H + j, y);
      });
      if (p.mean) p.mean[row] = moments.mean;
      if (p.rstd) p.rstd[row] = moments.rstd;
    }
  });
}

template <class T, class W>
void embedding_backward(const EmbeddingBackward<T, W>& p, const Host& host) {
  using Acc = Compute<W>;
  const int64_t H = p.H, pitch = padded_row(H), chunks = ceil_div(p.M, kSumRows);
  const Dropout dropout(p.seed, p.threshold, p.use);
  Acc* const buffers = scratch<Acc>(host, 3 * pitch * host.threads);
  Acc* const sums = scratch<Acc>(host, chunks * 2 * H);
  parallel_for(host, chunks, [&](int64_t chunk, int worker) {
    Acc *const n = buffers + 3 * pitch * worker, *const g = n + pitch, *const factors = g + pitch;
    Acc *const dw = sums + chunk * 2 * H, *const db = dw + H;
    std::memset(dw, 0, size_t(2 * H) * sizeof(Acc));
    for (int64_t row = chunk * kSumRows; row < p.M && row < (chunk + 1) * kSumRows; ++row) {
      const Rows<EmbeddingBackward<T, W>> rows(p, row);
      if (dropout) dropout_factors(factors, dropout, row, H);
      row_norm_backward(
          dw, db, n, g, p.mean[row], p.rstd[row], p.w, H, p.dh != nullptr, false,
          [&](int64_t j, auto load) {
            Vec<Acc> dy = load(p.dy + row * H + j);
            if (dropout) dy *= FASTFT_NAMESPACE::load(factors + j);
            return RowInputs<Acc>{dy, rows.at(j, load)};
          },
          [&](int64_t j, Vec<Acc> dh, auto store) { store(p.dh + row * H + j, dh); });
    }
  });
  if (p.dw) add_up(p.dw, sums, chunks, 2 * H, H, host);
  if (p.db) add_up(p.db, sums + H, chunks, 2 * H, H, host);
}

template <class T, class W>
void embedding_scatter(const EmbeddingScatter<T, W>& p, const Host& host) {
  using Acc = Compute<W>;
  constexpr int64_t kStep = kUnrolled * kLanes<Acc>;
  // The rows of dh by id: those of id i are order[ends[i - 1]] to order[ends[i]], by counting.
  int64_t* const ends = scratch<int64_t>(host, p.V + 1);
  int64_t* const order = scratch<int64_t>(host, p.M);
  std::memset(ends, 0, size_t(p.V + 1) * sizeof(int64_t));
  for (int64_t m = 0; m < p.M; ++m) ends[p.ids[m] + 1] += p.ids[m] != p.padding;
  for (int64_t i = 0; i < p.V; ++i) ends[i + 1] += ends[i];
  for (int64_t m = 0; m < p.M; ++m)
    if (p.ids[m] != p.padding) order[ends[p.ids[m]]++] = m;
  const int64_t columns = p.V < kFewRows ? kColumns : p.H, slabs = ceil_div(p.H, columns);
  parallel_for(host, ceil_div(p.V, kTableRows) * slabs, [&](int64_t task, int) {
    const int64_t first = task / slabs * kTableRows, left = task % slabs * columns;
    const int64_t count = p.H - left < columns ? p.H - left : columns;
    for (int64_t i = first; i < p.V && i < first + kTableRows; ++i) {
      const int64_t from = i ? ends[i - 1] : 0, to = ends[i];
      W* const out = p.dtable + i * p.H + left;
      const T* const x = p.dh + left;
      if (from == to) {
        clear(out, count);
        continue;
      }
      int64_t j = 0;
      for (; j + kStep <= count; j += kStep)
        sum_rows<kUnrolled, Acc>(
            out + j, x + j, order, from, to, p.H, [](const T* at) { return load(at); },
            [](W* at, Vec<Acc> v) { store(at, v); });
      for_lanes<Acc>(count - j, [&](int64_t rest, auto load, auto store) {
        sum_rows<1, Acc>(out + j + rest, x + j + rest, order, from, to, p.H, load, store);
      });
    }
    streamed();
  });
}

FASTFT_INSTANTIATE(embedding_forward, EmbeddingForward)
FASTFT_INSTANTIATE(embedding_backward, EmbeddingBackward)
FASTFT_INSTANTIATE(embedding_scatter, EmbeddingScatter)

}  // namespace FASTFT_NAMESPACE
