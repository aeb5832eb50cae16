// LayerNorm over rows of h = dropout(x) + residual, forward and backward; cpu/layer_norm.cpp has the formulas.
//   x (M, H) T   residual, h, y, w, b W   mean, rstd fp32 (fp64 for fp64)
// Moves M H (sizeof(T) + 3 sizeof(W)) bytes each way, the backward 2 M H sizeof(W) more for dw and db: at 3 TB/s 15 us for
// 4096 x 768 in bf16 with an fp32 residual. dw and db read dy and h once more, which L2 still has at BERT's sizes.
// One warp per row, which row.cuh keeps in shared memory between its passes; 16 bytes at a time where rows begin at multiples
// of that, else the same code one element at a time (n = 1, as in fp64, which is for gradcheck).
// Tried: the row in registers, 0.4x in compiling and 16 warps on an SM in place of 48. Not yet run on a GPU.
#include "row.cuh"

namespace fastft::cuda {
namespace {

template <class T, class W, int n>
__global__ void __launch_bounds__(kThreadsOfRows, kRowBlocks<W>) layer_norm_forward_kernel(LayerNormForward<T, W> p) {
  using F = Compute<W>;
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= p.M) return;  // a whole warp leaves
  const T* const x = row_of(p.x, row, p.H);
  const W* const residual = row_of(p.residual, row, p.H);
  const Kept<F> kept = kept_of_row<OfLane<F>, F>(p, row);
  const HeldRow of_h(p.H, [&](int64_t first) {
    const Stored<T, n> of_x = load<n>(x, first, p.H);
    const Stored<W, n> of_residual = load<n>(residual, first, p.H);
    OfLane<F> h = of_x.template as<F>();
    drop<n>(h, kept, first);
    if (residual) {
      const OfLane<F> more = of_residual.template as<F>();
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) h.v[i] += more.v[i];
    }
    return h;
  });
  const RowMoments<F> moments = row_moments<n, F>(of_h, p.eps);
  of_h.template each<false>([&](const OfLane<F>& h, int64_t first) {
    const OfLane<F> w = load<n>(p.w, first, p.H).template as<F>(), b = load<n>(p.b, first, p.H).template as<F>();
    OfLane<F> y;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      y.v[i] = (h.v[i] - moments.about - moments.shift) * moments.rstd;
      if (p.w) y.v[i] *= w.v[i];
      if (p.b) y.v[i] += b.v[i];
    }
    if (p.h) store<n>(row_of(p.h, row, p.H), first, p.H, h);
    store<n>(row_of(p.y, row, p.H), first, p.H, y);
  });
  if (threadIdx.x == 0) {
    if (p.mean) p.mean[row] = moments.about + moments.shift;
    if (p.rstd) p.rstd[row] = moments.rstd;
  }
}

template <class T, class W, int n>
__global__ void __launch_bounds__(kThreadsOfRows, kRowBlocks<W>) layer_norm_backward_kernel(LayerNormBackward<T, W> p) {
  using F = Compute<W>;
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= p.M) return;
  const F mean = p.mean[row], rstd = p.rstd[row];
  const Kept<F> kept = p.dx ? kept_of_row<NormalAndGradient<F>, F>(p, row) : Kept<F>{};
  const HeldRow of_h(p.H, [&](int64_t first) {
    const Stored<W, n> of_h = load<n>(row_of(p.h, row, p.H), first, p.H);
    const Stored<W, n> of_dy = load<n>(row_of(p.dy, row, p.H), first, p.H);
    const Stored<W, n> of_w = load<n>(p.w, first, p.H);
    NormalAndGradient<F> x{of_h.template as<F>(), of_dy.template as<F>()};
    const OfLane<F> w = of_w.template as<F>();
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      x.n.v[i] = (x.n.v[i] - mean) * rstd;
      if (p.w) x.g.v[i] *= w.v[i];
    }
    return x;
  });
  norm_backward(of_h, rstd, [&](OfLane<F>& dh, int64_t first) {
    if (p.dresidual) store<n>(row_of(p.dresidual, row, p.H), first, p.H, dh);
    if (!p.dx) return;
    drop<n>(dh, kept, first);
    store<n>(row_of(p.dx, row, p.H), first, p.H, dh);
  });
}

// Sums of dy n, and of dy.
template <class W, int n>
__global__ void __launch_bounds__(kSumWarps* kWarp, 2)
    layer_norm_partial_kernel(Statistic<W>* partial, const W* dy, const W* h, const Statistic<W>* mean,
                              const Statistic<W>* rstd, int64_t M, int64_t H) {
  using F = Compute<W>;
  sum_rows<n>(partial, M, H, [&](OfLane<F>(&sums)[2], int64_t row, int64_t first) {
    const Stored<W, n> of_dy = load<n>(dy + row * H, first, H), of_h = load<n>(h + row * H, first, H);
    const OfLane<F> g = of_dy.template as<F>(), x = of_h.template as<F>();
    const F about = mean[row], scale = rstd[row];
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      sums[0].v[i] += g.v[i] * ((x.v[i] - about) * scale);
      sums[1].v[i] += g.v[i];
    }
  });
}

constexpr int kSumColumns = 32, kSumParts = 8;  // of a block: every eighth chunk is a warp's

template <class W>
__global__ void layer_norm_sum_kernel(W* dw, W* db, const Statistic<W>* partial, int64_t chunks, int64_t H) {
  using F = Compute<W>;
  __shared__ F sums[2][kSumParts][kSumColumns];
  const int64_t j = int64_t(blockIdx.x) * kSumColumns + threadIdx.x;
  F w = 0, b = 0;
#pragma unroll 4
  for (int64_t chunk = threadIdx.y; j < H && chunk < chunks; chunk += kSumParts) {
    w += partial[chunk * 2 * H + j];
    b += partial[(chunk * 2 + 1) * H + j];
  }
  sums[0][threadIdx.y][threadIdx.x] = w;
  sums[1][threadIdx.y][threadIdx.x] = b;
  __syncthreads();
  if (threadIdx.y > 1 || j >= H) return;
  F total = 0;
  for (int part = 0; part < kSumParts; ++part) total += sums[threadIdx.y][part][threadIdx.x];
  W* const out = threadIdx.y ? db : dw;
  if (out) out[j] = from_float<W>(total);
}

}  // namespace

// ---- launchers
template <class W>
void add_partial_sums(W* dw, W* db, const Statistic<W>* partial, int64_t chunks, int64_t H, Stream stream) {
  launch(&layer_norm_sum_kernel<W>, grid_of(ceil_div(H, kSumColumns)), dim3(kSumColumns, kSumParts), 0, stream, dw, db,
         partial, chunks, H);
}

template <class T, class W>
void layer_norm_forward(const LayerNormForward<T, W>& p, Stream stream) {
  with_neighbours<T, W>(p.H, aligned(p.y, p.h, p.x, p.residual, p.w, p.b), [&](auto n) {
    launch(&layer_norm_forward_kernel<T, W, n.value>, grid_of(ceil_div(p.M, kRowsPerBlock)), dim3(kWarp, kRowsPerBlock),
           shared_for<OfLane<Compute<W>>>(p), stream, p);
  });
}

template <class T, class W>
void layer_norm_backward(const LayerNormBackward<T, W>& p, Stream stream) {
  const dim3 block(kWarp, kRowsPerBlock);
  if (p.dx || p.dresidual)
    with_neighbours<T, W>(p.H, aligned(p.dx, p.dresidual, p.dy, p.h, p.w), [&](auto n) {
      launch(&layer_norm_backward_kernel<T, W, n.value>, grid_of(ceil_div(p.M, kRowsPerBlock)), block,
             shared_for<NormalAndGradient<Compute<W>>>(p), stream, p);
    });
  if (!p.dw && !p.db) return;
  with_neighbours<W, W>(p.H, aligned(p.dy, p.h), [&](auto n) {
    launch(&layer_norm_partial_kernel<W, n.value>, grid_of(sum_blocks(p.M, p.H)), dim3(kWarp, kSumWarps), 0, stream,
           p.partial, p.dy, p.h, p.mean, p.rstd, p.M, p.H);
  });
  add_partial_sums(p.dw, p.db, p.partial, ceil_div(p.M, kSumRows), p.H, stream);
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
