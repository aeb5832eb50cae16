// LayerNorm over rows of h = dropout(x) + residual, forward and backward; cpu/layer_norm.cpp has the formulas.
//   x (M, H) T   residual, h, y, w, b W   mean, rstd fp32 (fp64 for fp64)
// Moves M H (sizeof(T) + 3 sizeof(W)) bytes each way, the backward 2 M H sizeof(W) more for dw and db: at 3 TB/s 15 us for 4096 x 768 in bf16 with an fp32 residual.
// One warp per row. A lane takes the columns of one call of Philox's: half of its eight slots, in each group of 128 columns; so 16 neighbours read 16
// neighbours. Rows are read again rather than held, since H has no bound.
#include "row_norm.cuh"

namespace fastft::cuda {
namespace {

template <class T, class W>
__global__ void layer_norm_forward_kernel(LayerNormForward<T, W> p) {
  using Acc = Compute<W>;
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= p.M) return;  // a whole warp leaves
  const int64_t at = row * p.H;
  const auto each = [&](const auto& body) {
    for_columns<Acc>(row, p.H, p.seed, p.threshold, p.use, [&](int64_t j, Acc factor) {
      Acc value = Acc(to_float(p.x[at + j])) * factor;
      if (p.residual) value += Acc(to_float(p.residual[at + j]));
      body(j, value);
    });
  };
  Acc total = 0;
  each([&](int64_t j, Acc value) {
    if (p.h) p.h[at + j] = from_float<W>(value);
    total += value;
  });
  const RowMoments<Acc> moments = row_moments(total, p.H, p.eps, each);
  each([&](int64_t j, Acc value) {
    Acc n = (value - moments.about - moments.shift) * moments.rstd;
    if (p.w) n *= Acc(to_float(p.w[j]));
    if (p.b) n += Acc(to_float(p.b[j]));
    p.y[at + j] = from_float<W>(n);
  });
  if (threadIdx.x == 0) {
    if (p.mean) p.mean[row] = moments.about + moments.shift;
    if (p.rstd) p.rstd[row] = moments.rstd;
  }
}

template <class T, class W>
__global__ void layer_norm_backward_kernel(LayerNormBackward<T, W> p) {
  using Acc = Compute<W>;
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= p.M) return;
  const int64_t at = row * p.H;
  const Acc mean = p.mean[row], rstd = p.rstd[row];
  const auto normal = [&](int64_t j) { return (Acc(to_float(p.h[at + j])) - mean) * rstd; };
  const auto gradient = [&](int64_t j) {
    const Acc dy = Acc(to_float(p.dy[at + j]));
    return p.w ? dy * Acc(to_float(p.w[j])) : dy;
  };
  Acc g_total = 0, gn_total = 0;
  for (int64_t j = threadIdx.x; j < p.H; j += kWarp) {
    const Acc g = gradient(j);
    g_total += g;
    gn_total += g * normal(j);
  }
  const Acc g_mean = warp_reduce(g_total, Sum()) / Acc(p.H), gn_mean = warp_reduce(gn_total, Sum()) / Acc(p.H);
  for_columns<Acc>(row, p.H, p.dx ? p.seed : nullptr, p.threshold, p.use, [&](int64_t j, Acc factor) {
    const Acc dh = (gradient(j) - g_mean - normal(j) * gn_mean) * rstd;
    if (p.dresidual) p.dresidual[at + j] = from_float<W>(dh);
    if (p.dx) p.dx[at + j] = from_float<T>(dh * factor);
  });
}

constexpr int kColumns = 128;  // of a block of the two kernels below

// partial[chunk] = sums of dy n, and of dy, over the chunk's rows.
template <class T, class W>
__global__ void layer_norm_partial_kernel(LayerNormBackward<T, W> p) {
  using Acc = Compute<W>;
  const int64_t blocks = ceil_div(p.H, kColumns), chunk = blockIdx.x / blocks;
  const int64_t j = blockIdx.x % blocks * kColumns + threadIdx.x;
  if (j >= p.H) return;
  Acc dw = 0, db = 0;
  for (int64_t row = chunk * kSumRows; row < p.M && row < (chunk + 1) * kSumRows; ++row) {
    const Acc dy = Acc(to_float(p.dy[row * p.H + j]));
    dw += dy * (Acc(to_float(p.h[row * p.H + j])) - p.mean[row]) * p.rstd[row];
    db += dy;
  }
  p.partial[chunk * 2 * p.H + j] = dw;
  p.partial[(chunk * 2 + 1) * p.H + j] = db;
}

template <class W>
__global__ void layer_norm_sum_kernel(W* dw, W* db, const Statistic<W>* partial, int64_t chunks, int64_t H) {
  using Acc = Compute<W>;
  const int64_t j = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  if (j >= H) return;
  Acc w = 0, b = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    w += partial[chunk * 2 * H + j];
    b += partial[(chunk * 2 + 1) * H + j];
  }
  if (dw) dw[j] = from_float<W>(w);
  if (db) db[j] = from_float<W>(b);
}

}  // namespace

// ---- launchers
template <class W>
void add_partial_sums(W* dw, W* db, const Statistic<W>* partial, int64_t chunks, int64_t H, Stream stream) {
  launch(&layer_norm_sum_kernel<W>, grid_of(ceil_div(H, kColumns)), dim3(kColumns), 0, stream, dw, db, partial, chunks,
         H);
}

template <class T, class W>
void layer_norm_forward(const LayerNormForward<T, W>& p, Stream stream) {
  launch(&layer_norm_forward_kernel<T, W>, grid_of(ceil_div(p.M, kRowsPerBlock)), dim3(kWarp, kRowsPerBlock), 0, stream,
         p);
}

template <class T, class W>
void layer_norm_backward(const LayerNormBackward<T, W>& p, Stream stream) {
  if (p.dx || p.dresidual)
    launch(&layer_norm_backward_kernel<T, W>, grid_of(ceil_div(p.M, kRowsPerBlock)), dim3(kWarp, kRowsPerBlock), 0,
           stream, p);
  if (!p.dw && !p.db) return;
  const int64_t chunks = ceil_div(p.M, kSumRows), blocks = ceil_div(p.H, kColumns);
  launch(&layer_norm_partial_kernel<T, W>, grid_of(chunks * blocks), dim3(kColumns), 0, stream, p);
  add_partial_sums(p.dw, p.db, p.partial, chunks, p.H, stream);
}

#define FASTFT_X(suffix, T, W)                                             \
  template void layer_norm_forward(const LayerNormForward<T, W>&, Stream); \
  template void layer_norm_backward(const LayerNormBackward<T, W>&, Stream);
FASTFT_CUDA_DTYPES(FASTFT_X)
#undef FASTFT_X

#define FASTFT_X(W) template void add_partial_sums(W*, W*, const Statistic<W>*, int64_t, int64_t, Stream);
FASTFT_X(float) FASTFT_X(double) FASTFT_X(bf16) FASTFT_X(f16)
#undef FASTFT_X

}  // namespace fastft::cuda
