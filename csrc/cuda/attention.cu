// Scaled dot-product attention and its gradients; formulas and what is summed where are in cpu/attention.cpp.
// Plain CUDA cores, for what attention_sm80.cu does not take: fp32, fp64 and heads of more than 128 elements.
// A warp per query (forward and dq) or per key (dk and dv), 32 keys or queries at a time: first a lane takes one of them
// for the score, then D elements lie across the lanes, kWarp apart. Rows come from L1 and L2: 4 D / 32 loads a score.
// The forward is an online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).
#include <cassert>

#include "attention.cuh"
#include "device.cuh"
#include "philox.h"

namespace fastft::cuda {
namespace {

constexpr int kWarps = 4;  // of a block
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? 1 : 4;  // of an SM, at least
constexpr int kLargestHead = 256, kPerLane = kLargestHead / kWarp;

template <class F>
constexpr F kInfinity = F(HUGE_VAL);

// Told at run time, as types would double the kernels: whether 16-bit numbers, all of which are given as f16, are bf16, and
// whether an additive mask is of float.
struct Types {
  bool is_bf16, float_bias;
};
template <class F, class T>
__device__ F get(T x, Types types) {
  if constexpr (std::is_same_v<T, f16>)
    return types.is_bf16 ? to_float(bf16{x.bits}) : to_float(x);
  else
    return to_float(x);
}

// A row of queries or keys of one (sequence, head) for each warp.
struct Place : Sequence {
  int64_t i;  // among the sequence's rows of queries, or of keys
  int lane;
  bool live;

  template <class Args>
  __device__ Place(const Args& p, int64_t most) : Place(p, most, int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp) {}

 private:
  template <class Args>
  __device__ Place(const Args& p, int64_t most, int64_t warp)
      : Sequence(p, warp / most / p.N < p.B ? warp / most / p.N : 0, warp / most % p.N),
        i(warp % most),
        lane(threadIdx.x % kWarp),
        live(warp / most / p.N < p.B) {}
};

// Four sums: their error is that of a quarter of the length.
template <class F, class T>
__device__ F dot(const T* a, const T* b, int64_t D, Types types) {
  F sums[4] = {};
  int64_t d = 0;
  for (; d + 4 <= D; d += 4)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += get<F>(a[d + i], types) * get<F>(b[d + i], types);
  for (; d < D; ++d) sums[0] += get<F>(a[d], types) * get<F>(b[d], types);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// scale q k^T + mask, -infinity where masked
template <class F, class Args, class T>
__device__ F score(const Args& p, const Place& at, const T* q, const T* k, int64_t i, int64_t j, Types types) {
  if (p.causal && j > i) return -kInfinity<F>;
  const int64_t mask = at.b * p.mask_batch + at.h * p.mask_head + i * p.mask_query + j * p.mask_key;
  if (p.keep && !p.keep[mask]) return -kInfinity<F>;
  const F x = dot<F>(q, k, p.D, types) * F(p.scale);
  return p.bias ? x + bias_at<F>(p.bias, mask, types.float_bias) : x;
}

template <class F, class Args>
__device__ F factor(const Args& p, int64_t row, int64_t key) {
  if (!p.seed) return F(1);
  const int64_t e = row * dropout_pitch(p.Sk) + key;
  const uint32_t number = DropoutCall(*p.seed, p.use, dropout_call(e)).number(dropout_slot(e));
  return int64_t(number) >= p.threshold ? F(dropout_scale(p.threshold)) : F(0);
}

// sum[e] += over the lanes r < live: weight of r times row(r)[lane + e kWarp]. Weights go by way of shared memory, which is
// read as fast as lanes shuffle.
template <class F, class Row>
__device__ void add_rows(F (&sum)[kPerLane], F weight, int live, int lane, int64_t D, Types types, const Row& row) {
  __shared__ F of_lanes[kWarps][kWarp];
  F* const weights = of_lanes[threadIdx.x / kWarp];
  __syncwarp();  // an earlier call's have been read
  weights[lane] = weight;
  __syncwarp();
  F part[kPerLane] = {};
  for (int r = 0; r < live; ++r) {
    const F w = weights[r];
    const auto* const of_r = row(r);
#pragma unroll
    for (int e = 0; e < kPerLane; ++e)
      if (lane + e * kWarp < D) part[e] += w * get<F>(of_r[lane + e * kWarp], types);
  }
  for (int e = 0; e < kPerLane; ++e) sum[e] += part[e];
}

template <class F, class T>
__device__ void store_row(T* out, const F (&sum)[kPerLane], F times, int lane, int64_t D, Types types) {
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) {
    if (lane + e * kWarp >= D) break;
    const F x = sum[e] * times;
    if constexpr (std::is_same_v<T, f16>)
      out[lane + e * kWarp] = types.is_bf16 ? f16{from_float<bf16>(x).bits} : from_float<f16>(x);
    else
      out[lane + e * kWarp] = x;
  }
}

template <class F>
__device__ int at_most_a_warp(F n) {
  return int(n < kWarp ? n : kWarp);
}

// ---- kernels

template <class T>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks<T>) forward_kernel(AttentionForward<T, T> p, Types types) {
  using F = Compute<T>;
  const Place at(p, p.Sq);
  if (!at.live || at.i >= at.queries) return;  // a whole warp
  const T* const q = at.query(p, p.q, p.q_batch, p.q_head, p.q_token, at.i);
  const int64_t row = at.row + at.i, keys = p.causal && at.i + 1 < at.keys ? at.i + 1 : at.keys;
  F max = -kInfinity<F>, sum = 0, o[kPerLane] = {};
  for (int64_t first = 0; first < keys; first += kWarp) {
    const int live = at_most_a_warp(keys - first);
    const int64_t j = first + at.lane;
    F x = -kInfinity<F>;
    if (at.lane < live) x = score<F>(p, at, q, at.key(p, p.k, p.k_batch, p.k_head, p.k_token, j), at.i, j, types);
    const F top = warp_reduce(Max()(max, x), Max());
    if (top == -kInfinity<F>) continue;  // nothing but masked keys so far
    const F shrink = exp(max - top), e = exp(x - top);
    max = top;
    sum = sum * shrink + warp_reduce(e, Sum());
    for (int d = 0; d < kPerLane; ++d) o[d] *= shrink;
    const F weight = at.lane < live ? e * factor<F>(p, row, j) : F(0);
    add_rows(o, weight, live, at.lane, p.D, types,
             [&](int r) { return at.key(p, p.v, p.v_batch, p.v_head, p.v_token, first + r); });
  }
  const bool nothing = max == -kInfinity<F>;
  const F over_sum = nothing ? F(0) : 1 / sum;
  store_row(at.query(p, p.o, p.o_batch, p.o_head, p.o_token, at.i), o, over_sum, at.lane, p.D, types);
  if (!p.stats || at.lane != 0) return;
  p.stats[row] = nothing ? F(0) : sum == sum ? max : sum;  // NaN where the backward is to give NaN
  p.stats[p.rows + row] = nothing ? F(1) : over_sum;
}

// What a score and dy v^T become, of one query and key.
template <class F>
struct Weight {
  F p, dp, factor;
};
template <class F, class Args>
__device__ Weight<F> weight_of(const Args& p, const Place& at, int64_t i, int64_t j, Types types) {
  const auto* const q = at.query(p, p.q, p.q_batch, p.q_head, p.q_token, i);
  const auto* const dy = at.query(p, p.dy, p.dy_batch, p.dy_head, p.dy_token, i);
  const auto* const k = at.key(p, p.k, p.k_batch, p.k_head, p.k_token, j);
  const auto* const v = at.key(p, p.v, p.v_batch, p.v_head, p.v_token, j);
  const int64_t row = at.row + i;
  const F x = score<F>(p, at, q, k, i, j, types), f = factor<F>(p, row, j);
  return {exp(x - p.stats[row]) * p.stats[p.rows + row], dot<F>(dy, v, p.D, types) * f, f};
}

template <class T>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks<T>) grad_query_kernel(AttentionBackward<T, T> p, Types types) {
  using F = Compute<T>;
  const Place at(p, p.Sq);
  if (!at.live || at.i >= at.queries) return;
  const int64_t keys = p.causal && at.i + 1 < at.keys ? at.i + 1 : at.keys;
  F delta = 0, dq[kPerLane] = {};
  for (int64_t j = at.lane; j < keys; j += kWarp) {
    const Weight<F> w = weight_of<F>(p, at, at.i, j, types);
    delta += w.p * w.dp;
  }
  delta = warp_reduce(delta, Sum());
  if (at.lane == 0) p.delta[at.row + at.i] = delta;
  if (!p.dq) return;
  for (int64_t first = 0; first < keys; first += kWarp) {
    const int live = at_most_a_warp(keys - first);
    F ds = 0;
    if (at.lane < live) {
      const Weight<F> w = weight_of<F>(p, at, at.i, first + at.lane, types);
      ds = w.p * (w.dp - delta);
    }
    add_rows(dq, ds, live, at.lane, p.D, types,
             [&](int r) { return at.key(p, p.k, p.k_batch, p.k_head, p.k_token, first + r); });
  }
  store_row(at.query(p, p.dq, p.dq_batch, p.dq_head, p.dq_token, at.i), dq, F(p.scale), at.lane, p.D, types);
}

template <class T>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks<T>) grad_key_kernel(AttentionBackward<T, T> p, Types types) {
  using F = Compute<T>;
  const Place at(p, p.Sk);
  if (!at.live || at.i >= at.keys) return;
  F dk[kPerLane] = {}, dv[kPerLane] = {};
  for (int64_t first = p.causal ? at.i / kWarp * kWarp : 0; first < at.queries; first += kWarp) {
    const int live = at_most_a_warp(at.queries - first);
    const int64_t i = first + at.lane;
    F ds = 0, kept = 0;
    if (at.lane < live) {
      const Weight<F> w = weight_of<F>(p, at, i, at.i, types);
      kept = w.p * w.factor;
      if (p.dk) ds = w.p * (w.dp - p.delta[at.row + i]);
    }
    if (p.dk)
      add_rows(dk, ds, live, at.lane, p.D, types,
               [&](int r) { return at.query(p, p.q, p.q_batch, p.q_head, p.q_token, first + r); });
    if (p.dv)
      add_rows(dv, kept, live, at.lane, p.D, types,
               [&](int r) { return at.query(p, p.dy, p.dy_batch, p.dy_head, p.dy_token, first + r); });
  }
  if (p.dk) store_row(at.key(p, p.dk, p.dk_batch, p.dk_head, p.dk_token, at.i), dk, F(p.scale), at.lane, p.D, types);
  if (p.dv) store_row(at.key(p, p.dv, p.dv_batch, p.dv_head, p.dv_token, at.i), dv, F(1), at.lane, p.D, types);
}

template <class Args>
dim3 warps_for(const Args& p, int64_t most) {
  return grid_of(ceil_div(p.B * p.N * most, kWarps));
}

template <class Args>
void check_head(const Args& p) {
  if (p.D > kLargestHead) throw Failure("fastft: attention has kernels for heads of at most %d elements", kLargestHead);
}

// What a T is given as.
template <class T>
using Given = std::conditional_t<kTensorAttention<T>, f16, T>;
template <class T, class W>
Types types_of() {
  return {std::is_same_v<T, bf16>, !std::is_same_v<T, W>};
}

template <class T>
void forward(const AttentionForward<T, T>& p, Types types, Stream stream) {
  launch(forward_kernel<T>, warps_for(p, p.Sq), kWarps * kWarp, 0, stream, p, types);
}
template <class T>
void backward(const AttentionBackward<T, T>& p, Types types, Stream stream) {
  if (p.dq || p.dk) launch(grad_query_kernel<T>, warps_for(p, p.Sq), kWarps * kWarp, 0, stream, p, types);
  if (p.dk || p.dv) launch(grad_key_kernel<T>, warps_for(p, p.Sk), kWarps * kWarp, 0, stream, p, types);
}

}  // namespace

// ---- launchers

template <class T, class W>
void attention_forward(const AttentionForward<T, W>& p, Stream stream) {
  check_head(p);
  if constexpr (kTensorAttention<T>)
    if (p.D <= kLargestTensorHead) return tensor_attention_forward(p, stream);
  forward(bit_cast<AttentionForward<Given<T>, Given<T>>>(p), types_of<T, W>(), stream);
}

template <class T, class W>
void attention_backward(const AttentionBackward<T, W>& p, Stream stream) {
  check_head(p);
  if constexpr (kTensorAttention<T>)
    if (p.D <= kLargestTensorHead) return tensor_attention_backward(p, stream);
  backward(bit_cast<AttentionBackward<Given<T>, Given<T>>>(p), types_of<T, W>(), stream);
}

#define FASTFT_X(suffix, T, W)                                                  \
  template void attention_forward<T, W>(const AttentionForward<T, W>&, Stream); \
  template void attention_backward<T, W>(const AttentionBackward<T, W>&, Stream);
FASTFT_CUDA_DTYPES(FASTFT_X)
#undef FASTFT_X

}  // namespace fastft::cuda
