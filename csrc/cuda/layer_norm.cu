// LayerNorm over rows of h = dropout(x) + residual, forward and backward; cpu/layer_norm.cpp has the formulas.
//   x (M, H) T   residual, h, y, w, b W   mean, rstd fp32 (fp64 for fp64)
// Moves M H (sizeof(T) + 3 sizeof(W)) bytes each way, the backward 2 M H sizeof(W) more for dw and db: at 3 TB/s 15 us for
// 4096 x 768 in bf16 with an fp32 residual. dw and db read dy and h once more, which L2 still has at BERT's sizes.
// One warp per row, which row.cuh keeps in shared memory between its passes; 16 bytes at a time where rows begin at multiples
// of that, else the same code one element at a time (n = 1, as in fp64, which is for gradcheck).
// What elements are stored as is told at run time (row.cuh): 11 instances instead of 33.
// Tried: the row in registers, 0.4x in compiling and 16 warps on an SM in place of 48. Not yet run on a GPU.
#include "row.cuh"

namespace fastft::cuda {
namespace {

template <class F, int n>
__global__ void __launch_bounds__(kThreadsOfRows, kRowBlocks<F, n>)
    layer_norm_forward_kernel(LayerNormForward<Any<F>, Any<F>> p, Types types) {
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= p.M) return;  // a whole warp leaves
  const auto x = row_of(p.x, types.t, row, p.H), residual = row_of(p.residual, types.w, row, p.H);
  const auto w = row_of(p.w, types.w, 0, p.H), b = row_of(p.b, types.w, 0, p.H);
  const HeldRow of_h(p.H, [&](int64_t first) {
    const Stored<F, n> of_x = load<n>(x, first, p.H), of_residual = load<n>(residual, first, p.H);
    OfLane<F> h = of_x.values();
    drop<n>(h, calls_of_warp(), p, row, first);
    if (residual.data) {
      const OfLane<F> more = of_residual.values();
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) h.v[i] += more.v[i];
    }
    return h;
  });
  const auto output = [&](OfLane<F>& y, const OfLane<F>& h, int64_t first) {
    const OfLane<F> of_w = load<n>(w, first, p.H).values(), of_b = load<n>(b, first, p.H).values();
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      if (p.w) y.v[i] *= of_w.v[i];
      if (p.b) y.v[i] += of_b.v[i];
    }
    if (p.h) store<n>(row_of(p.h, types.w, row, p.H), first, p.H, h);
    store<n>(row_of(p.y, types.w, row, p.H), first, p.H, y);
  };
  const RowMoments<F> moments = normalize<n, F>(of_h, p.eps, output);
  if (threadIdx.x == 0) {
    if (p.mean) p.mean[row] = moments.about + moments.shift;
    if (p.rstd) p.rstd[row] = moments.rstd;
  }
}

template <class F, int n>
__global__ void __launch_bounds__(kThreadsOfRows, kRowBlocks<F, n>)
    layer_norm_backward_kernel(LayerNormBackward<Any<F>, Any<F>> p, Types types) {
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= p.M) return;
  const F mean = p.mean[row], rstd = p.rstd[row];
  const auto h = row_of(p.h, types.w, row, p.H), dy = row_of(p.dy, types.w, row, p.H);
  const auto w = row_of(p.w, types.w, 0, p.H);
  const HeldRow of_h(p.H, [&](int64_t first) {
    const Stored<F, n> of_h = load<n>(h, first, p.H), of_dy = load<n>(dy, first, p.H), of_w = load<n>(w, first, p.H);
    NormalAndGradient<F> x{of_h.values(), of_dy.values()};
    const OfLane<F> times = of_w.values();
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      x.n.v[i] = (x.n.v[i] - mean) * rstd;
      if (p.w) x.g.v[i] *= times.v[i];
    }
    return x;
  });
  norm_backward(of_h, rstd, [&](OfLane<F>& dh, int64_t first) {
    if (p.dresidual) store<n>(row_of(p.dresidual, types.w, row, p.H), first, p.H, dh);
    if (!p.dx) return;
    drop<n>(dh, calls_of_warp(), p, row, first);
    store<n>(row_of(p.dx, types.t, row, p.H), first, p.H, dh);
  });
}

// Sums of dy n, and of dy.
template <class F, int n>
__global__ void __launch_bounds__(kSumWarps* kWarp, sizeof(F) == 8 ? 1 : 3)
    layer_norm_partial_kernel(LayerNormBackward<Any<F>, Any<F>> p, Types types) {
  sum_rows<n>(p.partial, p.M, p.H, [&](OfLane<F>(&sums)[2], int64_t row, int64_t first) {
    const Stored<F, n> of_dy = load<n>(row_of(p.dy, types.w, row, p.H), first, p.H);
    const Stored<F, n> of_h = load<n>(row_of(p.h, types.w, row, p.H), first, p.H);
    const OfLane<F> g = of_dy.values(), x = of_h.values();
    const F about = p.mean[row], scale = p.rstd[row];
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      sums[0].v[i] += g.v[i] * ((x.v[i] - about) * scale);
      sums[1].v[i] += g.v[i];
    }
  });
}

constexpr int kSumColumns = 32, kSumParts = 8;  // of a block: every eighth chunk is a warp's

template <class F>
__global__ void layer_norm_sum_kernel(Any<F>* dw, Any<F>* db, Type type, const F* partial, int64_t chunks, int64_t H) {
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
  const Row<Any<F>> out{threadIdx.y ? db : dw, type};
  if (out.data) put(out, j, total);
}

// ---- launchers, of erased arguments

template <class F>
void forward(const LayerNormForward<Any<F>, Any<F>>& p, Types types, Stream stream) {
  with_neighbours<F>(p.H, aligned(p.y, p.h, p.x, p.residual, p.w, p.b),
                     [&](auto n) { launch_rows<OfLane<F>>(&layer_norm_forward_kernel<F, n.value>, p, types, stream); });
}

template <class F>
void backward(const LayerNormBackward<Any<F>, Any<F>>& p, Types types, Stream stream) {
  if (p.dx || p.dresidual)
    with_neighbours<F>(p.H, aligned(p.dx, p.dresidual, p.dy, p.h, p.w), [&](auto n) {
      launch_rows<NormalAndGradient<F>>(&layer_norm_backward_kernel<F, n.value>, p, types, stream);
    });
  if (!p.dw && !p.db) return;
  with_neighbours<F>(p.H, aligned(p.dy, p.h),
                     [&](auto n) { launch_sums(&layer_norm_partial_kernel<F, n.value>, p, types, stream); });
  add_partial_sums(p.dw, p.db, types.w, p.partial, ceil_div(p.M, kSumRows), p.H, stream);
}

}  // namespace

template <class F>
void add_partial_sums(Any<F>* dw, Any<F>* db, Type type, const F* partial, int64_t chunks, int64_t H, Stream stream) {
  launch(&layer_norm_sum_kernel<F>, grid_of(ceil_div(H, kSumColumns)), dim3(kSumColumns, kSumParts), 0, stream, dw, db,
         type, partial, chunks, H);
}
template void add_partial_sums(Any<float>*, Any<float>*, Type, const float*, int64_t, int64_t, Stream);
template void add_partial_sums(Any<double>*, Any<double>*, Type, const double*, int64_t, int64_t, Stream);

template <class T, class W>
void layer_norm_forward(const LayerNormForward<T, W>& p, Stream stream) {
  forward<Compute<W>>(erased(p), types_of(p), stream);
}
template <class T, class W>
void layer_norm_backward(const LayerNormBackward<T, W>& p, Stream stream) {
  backward<Compute<W>>(erased(p), types_of(p), stream);
}

#define FASTFT_X(suffix, T, W)                                             \
  template void layer_norm_forward(const LayerNormForward<T, W>&, Stream); \
  template void layer_norm_backward(const LayerNormBackward<T, W>&, Stream);
FASTFT_CUDA_DTYPES(FASTFT_X)
#undef FASTFT_X

}  // namespace fastft::cuda
