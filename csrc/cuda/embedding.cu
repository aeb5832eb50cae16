// What an encoder begins with: rows of three tables, LayerNorm, dropout; cpu/embedding.cpp has the formulas.
//   ids (M) int64   word (V, H), position (P, H), type (C, H), w, b W   y, dy, dh (M, H) T   mean, rstd fp32 (fp64 for fp64)
// Moves M H (sizeof(W) + sizeof(T)) bytes forward, backward M H (2 sizeof(W) + 3 sizeof(T)) and for each table M H sizeof(T)
// more, besides its gradient: at 3 TB/s 9 us and 25 us for 4096 x 768 in fp32 with three tables, and 31 us for BERT's words.
// One warp per row, as layer_norm.cu has it. The gradient of a table sums rows that were sorted by id (stably, so that the
// order is theirs): a warp takes kScatterRows of them, and what goes on in the next ones is added by a second kernel, so
// that a table of two rows, of types, has as many warps as one of words. Nothing is added atomically. Not yet run on a GPU.
#include <cassert>

#include "row.cuh"

namespace fastft::cuda {
namespace {

template <class F, int n>
struct RowsOfTables {
  Stored<F, n> word, type, position;

  __device__ OfLane<F> sum() const {
    OfLane<F> sum = word.values();
    const OfLane<F> t = type.values(), p = position.values();
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) sum.v[i] = sum.v[i] + t.v[i] + p.v[i];
    return sum;
  }
};

// The three rows that are added.
template <class F>
struct Sources {
  Row<const Any<F>> word, type, position;

  template <class Args>
  __device__ Sources(const Args& p, Type of, int64_t row)
      : word(row_of(p.word, of, p.ids[row], p.H)),
        type(row_of(p.type_ids ? p.type : nullptr, of, p.type_ids ? p.type_ids[row] : 0, p.H)),
        position(row_of(p.position, of, p.position_ids[row], p.H)) {
    assert(p.ids[row] >= 0 && p.ids[row] < p.V && "embeddings: an id is out of range");
    assert(p.position_ids[row] >= 0 && p.position_ids[row] < p.P && "embeddings: a position is out of range");
    assert((!p.type_ids || (p.type_ids[row] >= 0 && p.type_ids[row] < p.C)) && "embeddings: a type is out of range");
  }

  template <int n>
  __device__ RowsOfTables<F, n> read(int64_t first, int64_t H) const {
    return {load<n>(word, first, H), load<n>(type, first, H), load<n>(position, first, H)};
  }
};

template <class F, int n>
__global__ void __launch_bounds__(kThreadsOfRows, kRowBlocks<F, n>)
    embedding_forward_kernel(EmbeddingForward<Any<F>, Any<F>> p, Types types) {
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= p.M) return;  // a whole warp leaves
  const Sources<F> sources(p, types.w, row);
  const auto w = row_of(p.w, types.w, 0, p.H), b = row_of(p.b, types.w, 0, p.H);
  const HeldRow sum(p.H, [&](int64_t first) { return sources.template read<n>(first, p.H).sum(); });
  const RowMoments<F> moments = normalize<n, F>(sum, p.eps, [&](OfLane<F>& y, const OfLane<F>&, int64_t first) {
    const OfLane<F> of_w = load<n>(w, first, p.H).values(), of_b = load<n>(b, first, p.H).values();
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) y.v[i] = y.v[i] * of_w.v[i] + of_b.v[i];
    drop<n>(y, calls_of_warp(), p, row, first);
    store<n>(row_of(p.y, types.t, row, p.H), first, p.H, y);
  });
  if (threadIdx.x == 0) {
    if (p.mean) p.mean[row] = moments.about + moments.shift;
    if (p.rstd) p.rstd[row] = moments.rstd;
  }
}

// n = (h - mean) rstd, and dropout's factor times dy.
template <int n, class F>
__device__ NormalAndGradient<F> normal_and_gradient(const EmbeddingBackward<Any<F>, Any<F>>& p, Type of_dy,
                                                    const Sources<F>& sources, uint8_t* calls, int64_t row,
                                                    int64_t first) {
  const Stored<F, n> dy = load<n>(row_of(p.dy, of_dy, row, p.H), first, p.H);
  OfLane<F> h = sources.template read<n>(first, p.H).sum(), g = dy.values();
  drop<n>(g, calls, p, row, first);
  const F mean = p.mean[row], rstd = p.rstd[row];
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) h.v[i] = (h.v[i] - mean) * rstd;
  return {h, g};
}

template <class F, int n>
__global__ void __launch_bounds__(kThreadsOfRows, kRowBlocks<F, n>)
    embedding_backward_kernel(EmbeddingBackward<Any<F>, Any<F>> p, Types types) {
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= p.M) return;
  const Sources<F> sources(p, types.w, row);
  const HeldRow given(p.H, [&](int64_t first) {
    NormalAndGradient<F> x = normal_and_gradient<n>(p, types.t, sources, calls_of_warp(), row, first);
    const OfLane<F> w = load<n>(row_of(p.w, types.w, 0, p.H), first, p.H).values();
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) x.g.v[i] *= w.v[i];
    return x;
  });
  norm_backward(given, F(p.rstd[row]),
                [&](const OfLane<F>& dh, int64_t first) { store<n>(row_of(p.dh, types.t, row, p.H), first, p.H, dh); });
}

// Sums of dropout's factor dy n, and of factor dy.
template <class F, int n>
__global__ void __launch_bounds__(kSumWarps* kWarp, sizeof(F) == 8 ? 1 : 2)
    embedding_partial_kernel(EmbeddingBackward<Any<F>, Any<F>> p, Types types) {
  __shared__ __align__(8) uint8_t calls[kSumWarps][kCallsOfSpan];
  sum_rows<n>(p.partial, p.M, p.H, [&](OfLane<F>(&sums)[2], int64_t row, int64_t first) {
    const Sources<F> sources(p, types.w, row);
    const NormalAndGradient<F> x = normal_and_gradient<n>(p, types.t, sources, calls[threadIdx.y], row, first);
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      sums[0].v[i] += x.g.v[i] * x.n.v[i];
      sums[1].v[i] += x.g.v[i];
    }
  });
}

// ---- gradients of tables. Of the sorted ids a run of equal ones has one sum; a part is kScatterRows of the sorted rows.

template <class F>
struct Runs {
  const EmbeddingScatter<Any<F>, Any<F>>& p;
  int64_t part, begin, end;  // sorted rows of the part

  __device__ Runs(const EmbeddingScatter<Any<F>, Any<F>>& p, int64_t part)
      : p(p),
        part(part),
        begin(part * kScatterRows),
        end((part + 1) * kScatterRows < p.M ? (part + 1) * kScatterRows : p.M) {}

  __device__ bool begins_earlier() const { return begin > 0 && p.ids[begin - 1] == p.ids[begin]; }  // its first run
  __device__ bool goes_on() const { return end < p.M && p.ids[end - 1] == p.ids[end]; }             // its last
  __device__ bool is_one() const { return p.ids[begin] == p.ids[end - 1]; }
  // (parts, 2, H): sums of a part's first run, if that begins earlier, and of its last, if that goes on.
  __device__ Row<Any<F>> partial(int64_t part, bool last) const { return row_of(p.partial + (part * 2 + last) * p.H); }
};

template <class F, int n>
__global__ void __launch_bounds__(kThreadsOfRows, kRowBlocks<F, n>)
    embedding_scatter_kernel(EmbeddingScatter<Any<F>, Any<F>> p, Types types) {
  const int64_t spans = ceil_div(p.H, kSpan), warp = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  const int64_t first = warp % spans * kSpan;
  const Runs<F> runs(p, warp / spans);
  if (runs.begin >= p.M) return;
  const auto row = [&](int64_t at) { return load<n>(row_of(p.dh, types.t, p.order[at], p.H), first, p.H); };
  OfLane<F> sum = {};
  bool is_first = true;  // run of this part
  Stored<F, n> next = row(runs.begin);
#pragma unroll 1
  for (int64_t at = runs.begin; at < runs.end; ++at) {
    const OfLane<F> dh = next.values();
    if (at + 1 < runs.end) next = row(at + 1);  // on its way while this one is added
    const int64_t id = p.ids[at];
    assert(id >= 0 && id < p.V && "embeddings: an id is out of range");
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) sum.v[i] += dh.v[i];
    if (at + 1 < runs.end && p.ids[at + 1] == id) continue;
    const bool began_earlier = is_first && runs.begins_earlier();
    const bool partial = began_earlier || (at + 1 == runs.end && runs.goes_on());
    if (partial || id != p.padding)
      store<n>(partial ? runs.partial(runs.part, !began_earlier) : row_of(p.dtable, types.w, id, p.H), first, p.H, sum);
    sum = {};
    is_first = false;
  }
}

// The sums of runs that do not end in the part where they begin, a block for each such part and span.
template <class F, int n>
__global__ void __launch_bounds__(kSumWarps* kWarp, 2)
    embedding_runs_kernel(EmbeddingScatter<Any<F>, Any<F>> p, Types types) {
  const int64_t spans = ceil_div(p.H, kSpan), first = blockIdx.x % spans * kSpan;
  const Runs<F> runs(p, blockIdx.x / spans);
  if (!runs.goes_on() || (runs.is_one() && runs.begins_earlier())) return;
  const int64_t id = p.ids[runs.end - 1];
  if (id == p.padding) return;
  int64_t inside = runs.end, behind = p.M;  // of the run, by bisection: it may be all rows
  while (behind - inside > 1) {
    const int64_t middle = inside + (behind - inside) / 2;
    (p.ids[middle] == id ? inside : behind) = middle;
  }
  const int64_t last = inside / kScatterRows;  // part that the run is in
  OfLane<F> sum = {};
#pragma unroll 2
  for (int64_t part = runs.part + threadIdx.y; part <= last; part += kSumWarps) {
    const Row<Any<F>> row = runs.partial(part, part == runs.part);
    const OfLane<F> more = load<n>(Row<const Any<F>>(row.data, kFloat), first, p.H).values();
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) sum.v[i] += more.v[i];
  }
  __shared__ F of_warps[kSumWarps][kSpan];
  const Row<Any<F>> out = row_of(p.dtable, types.w, id, p.H);
  add_warps<n>(of_warps, sum, [&](int column, F total) {
    if (first + column < p.H) put(out, first + column, total);
  });
}

// ---- launchers, of erased arguments

template <class F>
void forward(const EmbeddingForward<Any<F>, Any<F>>& p, Types types, Stream stream) {
  with_neighbours<F>(p.H, aligned(p.y, p.word, p.position, p.type, p.w, p.b),
                     [&](auto n) { launch_rows<OfLane<F>>(&embedding_forward_kernel<F, n.value>, p, types, stream); });
}

template <class F>
void backward(const EmbeddingBackward<Any<F>, Any<F>>& p, Types types, Stream stream) {
  with_neighbours<F>(p.H, aligned(p.dh, p.dy, p.word, p.position, p.type, p.w), [&](auto n) {
    if (p.dh) launch_rows<NormalAndGradient<F>>(&embedding_backward_kernel<F, n.value>, p, types, stream);
    if (p.dw || p.db) launch_sums(&embedding_partial_kernel<F, n.value>, p, types, stream);
  });
  if (p.dw || p.db) add_partial_sums(p.dw, p.db, types.w, p.partial, ceil_div(p.M, kSumRows), p.H, stream);
}

template <class F>
void scatter(const EmbeddingScatter<Any<F>, Any<F>>& p, Types types, Stream stream) {
  const int64_t works = ceil_div(p.M, kScatterRows) * ceil_div(p.H, kSpan);
  with_neighbours<F>(p.H, aligned(p.dtable, p.dh, p.partial), [&](auto n) {
    launch(&embedding_scatter_kernel<F, n.value>, grid_of(ceil_div(works, kRowsPerBlock)), dim3(kWarp, kRowsPerBlock),
           0, stream, p, types);
    launch(&embedding_runs_kernel<F, n.value>, grid_of(works), dim3(kWarp, kSumWarps), 0, stream, p, types);
  });
}

}  // namespace

template <class T, class W>
void embedding_forward(const EmbeddingForward<T, W>& p, Stream stream) {
  forward<Compute<W>>(erased(p), types_of(p), stream);
}
template <class T, class W>
void embedding_backward(const EmbeddingBackward<T, W>& p, Stream stream) {
  backward<Compute<W>>(erased(p), types_of(p), stream);
}
template <class T, class W>
void embedding_scatter(const EmbeddingScatter<T, W>& p, Stream stream) {
  scatter<Compute<W>>(erased(p), types_of(p), stream);
}

#define FASTFT_X(suffix, T, W)                                              \
  template void embedding_forward(const EmbeddingForward<T, W>&, Stream);   \
  template void embedding_backward(const EmbeddingBackward<T, W>&, Stream); \
  template void embedding_scatter(const EmbeddingScatter<T, W>&, Stream);
FASTFT_CUDA_DTYPES(FASTFT_X)
#undef FASTFT_X

}  // namespace fastft::cuda
