// A classifier's end, forward in one launch, backward in two; cpu/head.cpp has the formulas.
//   x, dx (B, H), logits, dlogits (B, C) T   w, dw (C, H), b, db, loss W   stats, dz fp32 (fp64 for fp64)
// For a batch of sequences and a few classes nothing here takes as long as a launch does: 32 rows of 768 are 48 KB in bf16.
//   forward   a block takes a row: its warps share the classes, four at a time, its first one makes softmax and loss. The last
//             block to end, by a count that it clears, adds the rows' losses up, in an order that follows from B.
//   backward  a block takes a span of columns of a row of dx, and leaves dz in memory; then one of four rows of dw, all of whose
//             terms it has. No sum is atomic. Dropout is drawn anew each time (philox.h).
// w is read anew for each row, from L2: with a hundred classes and more, a product of its own would be faster.
// What elements are stored as is told at run time (row.cuh). Not yet run on a GPU.
#include <cassert>

#include "row.cuh"

namespace fastft::cuda {
namespace {

template <int n>
constexpr int kClasses = n == 1 ? 1 : 4;  // that a warp takes at a time; rows off any grid are rare
constexpr int kWarps = kSumWarps;         // of a block
constexpr int kThreads = kWarp * kWarps;  // of which each warp takes a span of a row in turn

template <class F, int n, class Args>
__device__ OfLane<F> dropped(const Args& p, Types types, uint8_t* calls, int64_t row, int64_t first) {
  const Stored<F, n> of_x = load<n>(row_of(p.x, types.t, row, p.H), first, p.H);
  OfLane<F> x = of_x.values();
  drop<n>(x, calls, p, row, first);
  return x;
}

// Rows c to c + kClasses of w; zeros behind its end.
template <class F, int n>
struct Weights {
  Stored<F, n> of[kClasses<n>];

  template <class Args>
  __device__ Weights(const Args& p, Type type, int64_t c, int64_t first) {
#pragma unroll
    for (int k = 0; k < kClasses<n>; ++k)
      of[k] = load<n>(row_of(c + k < p.C ? p.w : nullptr, type, c + k, p.H), first, p.H);
  }
};

template <class Args>
__device__ bool is_ignored(const Args& p, int64_t row) {
  const int64_t c = p.target[row];
  assert((c == p.ignore_index || (c >= 0 && c < p.C)) && "cross_entropy: target is out of range");
  return c == p.ignore_index;
}

template <class F, int n>
__global__ void __launch_bounds__(kThreads, sizeof(F) == 8 ? 1 : 2)
    head_forward_kernel(HeadForward<Any<F>, Any<F>> p, Types types) {
  __shared__ Words held[kWarps][kParts<OfLane<F>> * kWarp];  // of a row: 2048 columns at a time
  __shared__ F logits[kHeadClasses];
  __shared__ __align__(8) uint8_t calls[kWarps][kCallsOfSpan];
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x, warp = threadIdx.y;
#pragma unroll 1
  for (int64_t begin = 0; begin < p.H; begin += kWarps * kSpan) {
    if (begin) __syncthreads();  // what was held has been read
    const int64_t own = begin + warp * kSpan;
    if (own < p.H) keep(held[warp] + lane, dropped<F, n>(p, types, calls[warp], row, own));
    __syncthreads();
#pragma unroll 1
    for (int64_t c = warp * kClasses<n>; c < p.C; c += kWarps * kClasses<n>) {
      F sums[kClasses<n>] = {};
#pragma unroll 1
      for (int64_t first = begin; first < p.H && first < begin + kWarps * kSpan; first += kSpan) {
        const Weights<F, n> weights(p, types.w, c, first);
        const auto x = recall<OfLane<F>>(held[(first - begin) / kSpan] + lane);
#pragma unroll
        for (int k = 0; k < kClasses<n>; ++k) {
          const OfLane<F> w = weights.of[k].values();
#pragma unroll
          for (int i = 0; i < kOfLane; ++i) sums[k] += x.v[i] * w.v[i];
        }
      }
#pragma unroll
      for (int k = 0; k < kClasses<n>; ++k) {
        const F sum = warp_reduce(sums[k], Sum());
        if (lane == 0 && c + k < p.C) logits[c + k] = begin ? logits[c + k] + sum : sum;
      }
    }
  }
  __syncthreads();
  const auto z = row_of(p.logits, types.t, row, p.C);
  const auto b = row_of(p.b, types.w, 0, p.C);
  for (int c = warp * kWarp + lane; c < p.C; c += kThreads) {
    put(z, c, b.data ? logits[c] + get(b, c) : logits[c]);
    logits[c] = get(z, c);  // as it was rounded
  }
  __syncthreads();
  if (warp != 0) return;

  F max = logits[0], sum = 0;
  for (int c = lane; c < p.C; c += kWarp) max = Max()(logits[c], max);
  max = warp_reduce(max, Max());
  for (int c = lane; c < p.C; c += kWarp) sum += exp(logits[c] - max);
  const F log_sum = log(warp_reduce(sum, Sum()));
  int is_last = 0;
  if (lane == 0) {
    p.row_loss[row] = is_ignored(p, row) ? F(0) : log_sum - (logits[p.target[row]] - max);
    if (p.stats) p.stats[row] = max, p.stats[p.B + row] = log_sum;
    __threadfence();
    is_last = atomicAdd(p.blocks_done, 1) == int(gridDim.x) - 1;
  }
  if (!__shfl_sync(kAllLanes, is_last, 0)) return;

  __threadfence();
  double loss = 0, rows = 0;
  const volatile F* const losses = p.row_loss;  // of other blocks: not in this SM's L1
  for (int64_t r = lane; r < p.B; r += kWarp) {
    loss += double(losses[r]);
    rows += is_ignored(p, r) ? 0 : 1;
  }
  loss = warp_reduce(loss, Sum());
  rows = warp_reduce(rows, Sum());
  if (lane != 0) return;
  put(Row<Any<F>>{p.loss, types.w}, 0, F(loss / rows));
  if (p.divisor) *p.divisor = F(rows);
  *p.blocks_done = 0;
}

// dz, and dx = dropout's factor dz w
template <class F, int n>
__global__ void __launch_bounds__(kThreads, sizeof(F) == 8 ? 1 : 2)
    head_backward_kernel(HeadBackward<Any<F>, Any<F>> p, Types types) {
  __shared__ F of_warps[kSumWarps][kSpan];
  __shared__ __align__(8) uint8_t calls[kWarps][kCallsOfSpan];
  const int64_t spans = p.dx ? ceil_div(p.H, kSpan) : 1, row = blockIdx.x / spans, first = blockIdx.x % spans * kSpan;
  const int lane = threadIdx.x, warp = threadIdx.y;
  const auto z = row_of(p.logits, types.t, row, p.C), dlogits = row_of(p.dlogits, types.t, row, p.C);
  const bool has_loss = p.dloss && !is_ignored(p, row);
  const F max = p.stats[row], scale = exp(-p.stats[p.B + row]);
  const F grad = has_loss ? get(Row<const Any<F>>(p.dloss, types.w), 0) / *p.divisor : F(0);
  OfLane<F> sums = {};
#pragma unroll 1
  for (int64_t c = warp * kClasses<n>; c < p.C; c += kWarps * kClasses<n>) {
    const Weights<F, n> weights(p, p.dx ? types.w : kFloat, c, p.dx ? first : p.H);
#pragma unroll
    for (int k = 0; k < kClasses<n>; ++k) {
      if (c + k >= p.C) break;
      F dz = 0;
      if (has_loss) dz = grad * (exp(get(z, c + k) - max) * scale - (c + k == p.target[row] ? F(1) : F(0)));
      if (dlogits.data) dz += get(dlogits, c + k);
      if (first == 0 && lane == 0) p.dz[row * p.C + c + k] = dz;
      const OfLane<F> w = weights.of[k].values();
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) sums.v[i] += dz * w.v[i];
    }
  }
  if (!p.dx) return;
  drop<n>(sums, calls[warp], p, row, first);
  const auto dx = row_of(p.dx, types.t, row, p.H);
  add_warps<n>(of_warps, sums, [&](int column, F sum) {
    if (first + column < p.H) put(dx, first + column, sum);
  });
}

// dw = dz^T dropout(x), db = sum of dz
template <class F, int n>
__global__ void __launch_bounds__(kThreads, sizeof(F) == 8 ? 1 : 2)
    head_parameters_kernel(HeadBackward<Any<F>, Any<F>> p, Types types) {
  __shared__ F of_warps[kSumWarps][kSpan], totals_of_warps[kSumWarps][kClasses<n>];
  __shared__ __align__(8) uint8_t calls[kWarps][kCallsOfSpan];
  const int64_t spans = p.dw ? ceil_div(p.H, kSpan) : 1;
  const int64_t c = blockIdx.x / spans * kClasses<n>, first = blockIdx.x % spans * kSpan;
  const int lane = threadIdx.x, warp = threadIdx.y;
  OfLane<F> sums[kClasses<n>] = {};
  F totals[kClasses<n>] = {};
#pragma unroll 1
  for (int64_t row = warp; row < p.B; row += kWarps) {
    OfLane<F> x = {};
    if (p.dw) x = dropped<F, n>(p, types, calls[warp], row, first);
#pragma unroll
    for (int k = 0; k < kClasses<n>; ++k) {
      const F dz = c + k < p.C ? p.dz[row * p.C + c + k] : F(0);
      totals[k] += dz;
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) sums[k].v[i] += dz * x.v[i];
    }
  }
  if (p.db && first == 0) {
#pragma unroll
    for (int k = 0; k < kClasses<n>; ++k)
      if (lane == k) totals_of_warps[warp][k] = totals[k];
    __syncthreads();
    if (warp == 0 && lane < kClasses<n> && c + lane < p.C) {
      F total = 0;
      for (int of = 0; of < kWarps; ++of) total += totals_of_warps[of][lane];
      put(Row<Any<F>>{p.db, types.w}, c + lane, total);
    }
  }
  if (!p.dw) return;
#pragma unroll
  for (int k = 0; k < kClasses<n>; ++k) {
    if (c + k >= p.C) return;
    if (k) __syncthreads();  // the last class's have been read
    const auto dw = row_of(p.dw, types.w, c + k, p.H);
    add_warps<n>(of_warps, sums[k], [&](int column, F sum) {
      if (first + column < p.H) put(dw, first + column, sum);
    });
  }
}

// ---- launchers, of erased arguments

template <class F>
void forward(const HeadForward<Any<F>, Any<F>>& p, Types types, Stream stream) {
  with_neighbours<F>(p.H, aligned(p.x, p.w), [&](auto n) {
    launch(&head_forward_kernel<F, n.value>, grid_of(p.B), dim3(kWarp, kWarps), 0, stream, p, types);
  });
}

template <class F>
void backward(const HeadBackward<Any<F>, Any<F>>& p, Types types, Stream stream) {
  const int64_t spans = ceil_div(p.H, kSpan);
  const dim3 block(kWarp, kWarps);
  with_neighbours<F>(p.H, aligned(p.w, p.x), [&](auto n) {
    const int64_t groups = ceil_div(p.C, kClasses<n.value>);
    launch(&head_backward_kernel<F, n.value>, grid_of(p.B * (p.dx ? spans : 1)), block, 0, stream, p, types);
    if (p.dw || p.db)
      launch(&head_parameters_kernel<F, n.value>, grid_of(groups * (p.dw ? spans : 1)), block, 0, stream, p, types);
  });
}

}  // namespace

template <class T, class W>
void head_forward(const HeadForward<T, W>& p, Stream stream) {
  forward<Compute<W>>(erased(p), types_of(p), stream);
}
template <class T, class W>
void head_backward(const HeadBackward<T, W>& p, Stream stream) {
  backward<Compute<W>>(erased(p), types_of(p), stream);
}

#define FASTFT_X(suffix, T, W)                                  \
  template void head_forward(const HeadForward<T, W>&, Stream); \
  template void head_backward(const HeadBackward<T, W>&, Stream);
FASTFT_CUDA_DTYPES(FASTFT_X)
#undef FASTFT_X

}  // namespace fastft::cuda
