// Softmax cross-entropy; csrc/cpu/cross_entropy.cpp has the formulas, from which h, k and g are named here.
// Moves 3 M C sizeof(T) bytes for M rows: the forward reads the logits once, the backward reads them and writes dx.
// A team of 1, 32 or 256 threads works on a row, each by an online softmax over 16 values (4 with soft targets) at a time. Classes that do
// not come last are one thread's: then neighbouring threads read neighbouring rows, which is where memory is
// contiguous. Soft targets are never a block's, whose kernels would be a fifth of this file's code. A reduction is a
// second launch of one block: its order follows from M.
#include <cassert>

#include "device.cuh"

namespace fastft::cuda {
namespace {

constexpr int kThreads = 256;
template <bool kSoft>
constexpr int kBlock = kSoft ? 4 : 16;               // values of a thread that share one look at the maximum
constexpr int64_t kOneThread = 16, kOneWarp = 1024;  // classes up to which a row is not worth a warp, a block

template <int kTeam, class F, class Op>
__device__ F team_reduce(F value, Op op) {
  if constexpr (kTeam == kThreads)
    return block_reduce<kThreads>(value, op);
  else if constexpr (kTeam == kWarp)
    return warp_reduce(value, op);
  else
    return value;
}

// A thread's place: its team's row, and which of the row's classes are its: every kTeam-th from `lane` on.
template <int kTeam, class Args>
struct Place {
  int64_t row, at;  // at: the row's first logit
  int lane;

  __device__ explicit Place(const Args& p)
      : row(int64_t(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam),
        at(row / p.S * p.C * p.S + row % p.S),
        lane(threadIdx.x % kTeam) {}
};

template <class F, class Args>
__device__ F weight_of(const Args& p, int64_t c) {
  return p.w ? F(to_float(p.w[c])) : F(1);
}

template <class F>
struct Target {
  int64_t index;  // -1: none, because it is ignored or there are probabilities
  F hard;         // h
  F weight;       // in the divisor of a mean
  bool ignored;
};

template <class F, class Args>
__device__ Target<F> target_of(const Args& p, int64_t row) {
  if (!p.target) return {-1, F(0), F(1), false};
  const int64_t c = p.target[row];
  if (c == p.ignore_index) return {-1, F(0), F(0), true};
  assert(c >= 0 && c < p.C && "cross_entropy: target is out of range");
  const F weight = weight_of<F>(p, c);
  return {c, F(1 - p.smoothing) * weight, weight, false};
}

template <class F, class Args>
__device__ F soft_target(const Args& p, int64_t at, int64_t c) {  // k
  const F q = p.q ? F(to_float(p.q[at + c * p.S])) : F(0);
  return (F(p.smoothing / double(p.C)) + F(1 - p.smoothing) * q) * weight_of<F>(p, c);
}

template <bool kSoft, class F>
struct Online {
  static constexpr F kLargest = sizeof(F) == 8 ? F(1.7976931348623157e308) : F(3.4028234e38f);
  F max = -kLargest, sum = 0, dot = 0, mass = 0;  // not -infinity, which minus itself is NaN

  __device__ void raise(F top) {
    sum *= exp(max - top);
    if (kSoft && mass != 0) dot += mass * (max - top);  // 0 times the infinite difference of two extreme maxima is NaN
    max = top;
  }
};

// ---- kernels

template <int kTeam, bool kSoft, class T, class W>
__global__ void __launch_bounds__(kThreads) forward_kernel(CrossEntropyForward<T, W> p) {
  using F = Compute<T>;
  const Place<kTeam, CrossEntropyForward<T, W>> place(p);
  const int64_t rows = p.N * p.S, row = place.row;
  if (row >= rows) return;  // a whole team

  constexpr int kValues = kBlock<kSoft>;
  Online<kSoft, F> online;
  for (int64_t from = place.lane; from < p.C; from += kValues * kTeam) {
    F x[kValues], top = online.max;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int64_t c = from + i * kTeam;
      x[i] = c < p.C ? F(to_float(p.x[place.at + c * p.S])) : F(-HUGE_VAL);
      top = x[i] > top ? x[i] : top;
    }
    online.raise(top);
    F sum = 0, dot = 0, mass = 0;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int64_t c = from + i * kTeam;
      sum += exp(x[i] - top);
      if (kSoft && c < p.C) {
        const F k = soft_target<F>(p, place.at, c);
        dot += k * (x[i] - top), mass += k;
      }
    }
    online.sum += sum, online.dot += dot, online.mass += mass;
  }
  online.raise(team_reduce<kTeam>(online.max, Max()));
  const F log_sum = log(team_reduce<kTeam>(online.sum, Sum()));
  if constexpr (kSoft) {
    online.dot = team_reduce<kTeam>(online.dot, Sum());
    online.mass = team_reduce<kTeam>(online.mass, Sum());
  }
  if (place.lane != 0) return;

  const Target<F> t = target_of<F>(p, row);
  F loss = kSoft && !t.ignored ? online.mass * log_sum - online.dot : F(0);
  if (t.index >= 0) loss += t.hard * (log_sum - (F(to_float(p.x[place.at + t.index * p.S])) - online.max));
  if (p.reduction == kNone)
    p.loss[row] = from_float<W>(loss);
  else
    p.row_loss[row] = loss;
  if (!p.stats) return;
  p.stats[row] = online.max;
  p.stats[rows + row] = log_sum;
  if (kSoft) p.stats[2 * rows + row] = online.mass;
}

template <class T, class W>
__global__ void __launch_bounds__(kThreads) reduce_kernel(CrossEntropyForward<T, W> p) {
  double loss = 0, weight = 0;
  for (int64_t row = threadIdx.x; row < p.N * p.S; row += kThreads) {
    loss += double(p.row_loss[row]);
    weight += double(target_of<Compute<T>>(p, row).weight);
  }
  loss = block_reduce<kThreads>(loss, Sum());
  weight = block_reduce<kThreads>(weight, Sum());
  if (threadIdx.x != 0) return;
  *p.loss = from_float<W>(Compute<T>(p.reduction == kMean ? loss / weight : loss));
  if (p.divisor) *p.divisor = Compute<T>(weight);
}

template <int kTeam, bool kSoft, class T, class W>
__global__ void __launch_bounds__(kThreads) backward_kernel(CrossEntropyBackward<T, W> p) {
  using F = Compute<T>;
  const Place<kTeam, CrossEntropyBackward<T, W>> place(p);
  const int64_t rows = p.N * p.S, row = place.row;
  if (row >= rows) return;
  const Target<F> t = target_of<F>(p, row);
  const F max = p.stats[row], log_sum = p.stats[rows + row];
  F grad = to_float(p.dy[p.reduction == kNone ? row : 0]);
  if (p.reduction == kMean) grad /= *p.divisor;
  const F hard = grad * t.hard, softmax = (kSoft ? hard + grad * p.stats[2 * rows + row] : hard) * exp(-log_sum);
  for (int64_t c = place.lane; c < p.C; c += kTeam) {
    const int64_t at = place.at + c * p.S;
    const F x = to_float(p.x[at]) - max;
    F dx = exp(x) * softmax;
    if (kSoft) dx -= grad * soft_target<F>(p, place.at, c);
    if (c == t.index) dx -= hard;
    if (p.dx) p.dx[at] = from_float<T>(t.ignored ? F(0) : dx);
    if (kSoft && p.dq) p.dq[at] = from_float<W>(grad * F(1 - p.smoothing) * weight_of<F>(p, c) * (log_sum - x));
  }
}

// ---- launchers

// body(kTeam as a type, kSoft as a type, grid)
template <class T, class Args, class Body>
void with_team(const Args& p, const Body& body) {
  const auto with_soft = [&](auto team) {
    const dim3 grid = grid_of(ceil_div(p.N * p.S, kThreads / team.value));
    p.q || p.smoothing > 0 ? body(team, std::true_type(), grid) : body(team, std::false_type(), grid);
  };
  if constexpr (std::is_same_v<T, double>)  // for gradcheck
    with_soft(std::integral_constant<int, kWarp>());
  else if (p.S > 1 || p.C <= kOneThread)
    with_soft(std::integral_constant<int, 1>());
  else if (p.C <= kOneWarp || p.q || p.smoothing > 0)
    with_soft(std::integral_constant<int, kWarp>());
  else
    body(std::integral_constant<int, kThreads>(), std::false_type(), grid_of(p.N * p.S));
}

}  // namespace

template <class T, class W>
void cross_entropy_forward(const CrossEntropyForward<T, W>& p, Stream stream) {
  with_team<T>(p, [&](auto team, auto soft, dim3 grid) {
    launch(forward_kernel<team.value, soft.value, T, W>, grid, kThreads, 0, stream, p);
  });
  if (p.reduction != kNone) launch(reduce_kernel<T, W>, dim3(1), kThreads, 0, stream, p);
}

template <class T, class W>
void cross_entropy_backward(const CrossEntropyBackward<T, W>& p, Stream stream) {
  with_team<T>(p, [&](auto team, auto soft, dim3 grid) {
    launch(backward_kernel<team.value, soft.value, T, W>, grid, kThreads, 0, stream, p);
  });
}

#define FASTFT_X(suffix, T, W)                                                         \
  template void cross_entropy_forward<T, W>(const CrossEntropyForward<T, W>&, Stream); \
  template void cross_entropy_backward<T, W>(const CrossEntropyBackward<T, W>&, Stream);
FASTFT_CUDA_DTYPES(FASTFT_X)
#undef FASTFT_X

}  // namespace fastft::cuda
