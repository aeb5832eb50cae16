// What an encoder begins with: rows of three tables, LayerNorm, dropout; cpu/embedding.cpp has the formulas.
//   ids (M) int64   word (V, H), position (P, H), type (C, H), w, b W   y, dy, dh (M, H) T   mean, rstd fp32 (fp64 for fp64)
// Moves M H (sizeof(W) + sizeof(T)) bytes forward, backward M H (2 sizeof(W) + 3 sizeof(T)) and for each table M H sizeof(T) more, besides its
// gradient: at 3 TB/s 9 us and 25 us for 4096 x 768 in fp32 with three tables, and 31 us for BERT's words.
// One warp per row, as layer_norm.cu has it. A table's gradient is summed by one block for each id that occurs, over rows that were sorted by id
// (stably, so that the order is theirs): nothing is added atomically.
#include <cassert>

#include "row_norm.cuh"

namespace fastft::cuda {
namespace {

// The sum of the tables' rows at column j.
template <class Acc, class Args>
__device__ Acc sum_at(const Args& p, int64_t row, int64_t j) {
  Acc sum = Acc(to_float(p.word[p.ids[row] * p.H + j]));
  if (p.type_ids) sum += Acc(to_float(p.type[p.type_ids[row] * p.H + j]));
  return sum + Acc(to_float(p.position[p.position_ids[row] * p.H + j]));
}

template <class Args>
__device__ void check_ids(const Args& p, int64_t row) {
  assert(p.ids[row] >= 0 && p.ids[row] < p.V && "embeddings: an id is out of range");
  assert(p.position_ids[row] >= 0 && p.position_ids[row] < p.P && "embeddings: a position is out of range");
  assert((!p.type_ids || (p.type_ids[row] >= 0 && p.type_ids[row] < p.C)) && "embeddings: a type is out of range");
}

template <class T, class W>
__global__ void embedding_forward_kernel(EmbeddingForward<T, W> p) {
  using Acc = Compute<W>;
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= p.M) return;  // a whole warp leaves
  check_ids(p, row);
  const auto each = [&](const auto& body) {
    for (int64_t j = threadIdx.x; j < p.H; j += kWarp) body(j, sum_at<Acc>(p, row, j));
  };
  Acc total = 0;
  each([&](int64_t, Acc value) { total += value; });
  const RowMoments<Acc> moments = row_moments(total, p.H, p.eps, each);
  for_columns<Acc>(row, p.H, p.seed, p.threshold, p.use, [&](int64_t j, Acc factor) {
    const Acc n = (sum_at<Acc>(p, row, j) - moments.about - moments.shift) * moments.rstd;
    p.y[row * p.H + j] = from_float<T>((n * Acc(to_float(p.w[j])) + Acc(to_float(p.b[j]))) * factor);
  });
  if (threadIdx.x == 0) {
    if (p.mean) p.mean[row] = moments.about + moments.shift;
    if (p.rstd) p.rstd[row] = moments.rstd;
  }
}

template <class T, class W>
__global__ void embedding_backward_kernel(EmbeddingBackward<T, W> p) {
  using Acc = Compute<W>;
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= p.M) return;
  check_ids(p, row);
  const int64_t at = row * p.H;
  const Acc mean = p.mean[row], rstd = p.rstd[row];
  const auto each = [&](const auto& body) {
    for_columns<Acc>(row, p.H, p.seed, p.threshold, p.use, [&](int64_t j, Acc factor) {
      const Acc g = Acc(to_float(p.dy[at + j])) * factor * Acc(to_float(p.w[j]));
      body(j, g, (sum_at<Acc>(p, row, j) - mean) * rstd);
    });
  };
  Acc g_total = 0, gn_total = 0;
  each([&](int64_t, Acc g, Acc n) {
    g_total += g;
    gn_total += g * n;
  });
  const Acc g_mean = warp_reduce(g_total, Sum()) / Acc(p.H), gn_mean = warp_reduce(gn_total, Sum()) / Acc(p.H);
  each([&](int64_t j, Acc g, Acc n) { p.dh[at + j] = from_float<T>((g - g_mean - n * gn_mean) * rstd); });
}

// partial[chunk] = sums of dropout's factor dy n, and of factor dy, over the chunk's rows; a warp takes 128 columns.
template <class T, class W>
__global__ void embedding_partial_kernel(EmbeddingBackward<T, W> p) {
  using Acc = Compute<W>;
  const int64_t groups = dropout_groups(p.H), chunk = blockIdx.x / groups, group = blockIdx.x % groups;
  Acc dw[kSlotsOfLane] = {}, db[kSlotsOfLane] = {};
  for (int64_t row = chunk * kSumRows; row < p.M && row < (chunk + 1) * kSumRows; ++row) {
    check_ids(p, row);
    const LaneFactors<Acc> factors(row, group, groups, p.seed, p.threshold, p.use);
    for (int i = 0; i < kSlotsOfLane; ++i) {
      const int64_t j = column_of_lane(group, i);
      if (j >= p.H) continue;
      const Acc dy = Acc(to_float(p.dy[row * p.H + j])) * factors.of_slot[i];
      dw[i] += dy * (sum_at<Acc>(p, row, j) - p.mean[row]) * p.rstd[row];
      db[i] += dy;
    }
  }
  for (int i = 0; i < kSlotsOfLane; ++i) {
    const int64_t j = column_of_lane(group, i);
    if (j >= p.H) continue;
    p.partial[chunk * 2 * p.H + j] = dw[i];
    p.partial[(chunk * 2 + 1) * p.H + j] = db[i];
  }
}

constexpr int kColumns = 128;  // threads of the kernel below

// A block for each of the sorted ids and kColumns columns; the first of equal ones sums for all.
template <class T, class W>
__global__ void embedding_scatter_kernel(EmbeddingScatter<T, W> p) {
  using Acc = Compute<W>;
  const int64_t blocks = ceil_div(p.H, kColumns), j = blockIdx.x % blocks * kColumns + threadIdx.x;
  int64_t at = blockIdx.x / blocks;
  const int64_t id = p.ids[at];
  if (j >= p.H || id == p.padding || (at > 0 && p.ids[at - 1] == id)) return;
  assert(id >= 0 && id < p.V && "embeddings: an id is out of range");
  Acc total = 0;
  while (at < p.M && p.ids[at] == id) {
    Acc sum = 0;
    for (int64_t end = at + kSumRows; at < end && at < p.M && p.ids[at] == id; ++at)
      sum += Acc(to_float(p.dh[p.order[at] * p.H + j]));
    total += sum;
  }
  p.dtable[id * p.H + j] = from_float<W>(total);
}

}  // namespace

// ---- launchers
template <class T, class W>
void embedding_forward(const EmbeddingForward<T, W>& p, Stream stream) {
  launch(&embedding_forward_kernel<T, W>, grid_of(ceil_div(p.M, kRowsPerBlock)), dim3(kWarp, kRowsPerBlock), 0, stream,
         p);
}

template <class T, class W>
void embedding_backward(const EmbeddingBackward<T, W>& p, Stream stream) {
  if (p.dh)
    launch(&embedding_backward_kernel<T, W>, grid_of(ceil_div(p.M, kRowsPerBlock)), dim3(kWarp, kRowsPerBlock), 0,
           stream, p);
  if (!p.dw && !p.db) return;
  const int64_t chunks = ceil_div(p.M, kSumRows);
  launch(&embedding_partial_kernel<T, W>, grid_of(chunks * dropout_groups(p.H)), dim3(kWarp), 0, stream, p);
  add_partial_sums(p.dw, p.db, p.partial, chunks, p.H, stream);
}

template <class T, class W>
void embedding_scatter(const EmbeddingScatter<T, W>& p, Stream stream) {
  launch(&embedding_scatter_kernel<T, W>, grid_of(p.M * ceil_div(p.H, kColumns)), dim3(kColumns), 0, stream, p);
}

#define FASTFT_X(suffix, T, W)                                              \
  template void embedding_forward(const EmbeddingForward<T, W>&, Stream);   \
  template void embedding_backward(const EmbeddingBackward<T, W>&, Stream); \
  template void embedding_scatter(const EmbeddingScatter<T, W>&, Stream);
FASTFT_CUDA_DTYPES(FASTFT_X)
#undef FASTFT_X

}  // namespace fastft::cuda
