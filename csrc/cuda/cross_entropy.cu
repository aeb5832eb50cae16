// Softmax cross-entropy; csrc/cpu/cross_entropy.cpp has the formulas, from which h, k and g are named here.
// Moves 3 M C sizeof(T) bytes for M rows: the forward reads the logits once, the backward reads them and writes dx.
// A team of 1, 32 or 256 threads works on a row, each by an online softmax over 16 values (8 with soft targets) at a time.
// They are read and written 16 bytes at a time wherever the row begins: BERT's 30522 classes put most rows off any grid, so
// that the pieces are those between multiples of 16 bytes, of which only the first and the last are a row's in part. Classes
// that do not come last are one thread's: then neighbouring threads read neighbouring rows, which is where memory is
// contiguous. Soft targets are always a warp's: their other kernels would be a third of this file's code. A reduction is a
// second launch of one block: its order follows from M. Not yet run on a GPU.
#include <cassert>

#include "device.cuh"

namespace fastft::cuda {
namespace {

constexpr int kThreads = 256;
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;  // of an SM, at least
template <bool kSoft>
constexpr int kBlock = kSoft ? 8 : 16;               // values of a thread that share one look at the maximum
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

// A thread's place: its team's row, and which of the row's pieces are its: every kTeam-th from `lane` on.
template <int kTeam, class Args>
struct Place {
  int64_t row, at;  // at: the row's first logit
  int lane;

  __device__ explicit Place(const Args& p)
      : row(int64_t(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam),
        at(row / p.S * p.C * p.S + row % p.S),
        lane(threadIdx.x % kTeam) {}
};

// ---- pieces of a row: n classes between multiples of 16 bytes, which are moved at once where they lie side by side

template <int kTeam, class T>
constexpr int kPiece = kTeam == 1 ? 1 : kWidth<T>;

// How many classes of the row before lie in its first piece.
template <int n, class T>
__device__ int before_row(const T* row, int64_t stride) {
  return stride == 1 ? int(reinterpret_cast<uintptr_t>(row) / sizeof(T) % n) : 0;
}

template <int n, class T>
__device__ bool is_vector(const T* row, int64_t c, int64_t C, int64_t stride) {
  return n > 1 && stride == 1 && c >= 0 && c + n <= C &&
         reinterpret_cast<uintptr_t>(row + c) % alignof(Vector<T, n>) == 0;
}

// Classes c to c + n - 1, `missing` where the row has none.
template <int n, class T>
__device__ Vector<T, n> piece_of(const T* row, int64_t c, int64_t C, int64_t stride, T missing) {
  if (is_vector<n>(row, c, C, stride)) return *reinterpret_cast<const Vector<T, n>*>(row + c);
  Vector<T, n> x;
#pragma unroll
  for (int i = 0; i < n; ++i) x.v[i] = c + i >= 0 && c + i < C ? row[(c + i) * stride] : missing;
  return x;
}

template <int n, class T>
__device__ void store_piece(T* row, int64_t c, int64_t C, int64_t stride, const Vector<T, n>& x) {
  if (is_vector<n>(row, c, C, stride)) {
    *reinterpret_cast<Vector<T, n>*>(row + c) = x;
    return;
  }
#pragma unroll
  for (int i = 0; i < n; ++i)
    if (c + i >= 0 && c + i < C) row[(c + i) * stride] = x.v[i];
}

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

// k of the classes of a piece, zeros where the row has none; uniform: smoothing / C, of the host's division.
template <int n, class F, class Args>
__device__ Vector<F, n> soft_targets(const Args& p, F uniform, int64_t at, int64_t c) {
  Vector<F, n> k;
#pragma unroll
  for (int i = 0; i < n; ++i) k.v[i] = uniform;
  if (p.q) {
    const auto q = piece_of<n>(p.q + at, c, p.C, p.S, {});
#pragma unroll
    for (int i = 0; i < n; ++i) k.v[i] += F(1 - p.smoothing) * F(to_float(q.v[i]));
  }
#pragma unroll
  for (int i = 0; i < n; ++i) k.v[i] *= c + i >= 0 && c + i < p.C ? weight_of<F>(p, c + i) : F(0);
  return k;
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
__global__ void __launch_bounds__(kThreads, kBlocks<T>) forward_kernel(CrossEntropyForward<T, W> p, Compute<T> uniform) {
  using F = Compute<T>;
  const Place<kTeam, CrossEntropyForward<T, W>> place(p);
  const int64_t rows = p.N * p.S, row = place.row;
  if (row >= rows) return;  // a whole team

  constexpr int n = kPiece<kTeam, T>, kPieces = kBlock<kSoft> / n;
  const T* const x = p.x + place.at;
  const T impossible = from_float<T>(F(-HUGE_VAL));
  Online<kSoft, F> online;
  for (int64_t c = int64_t(place.lane) * n - before_row<n>(x, p.S); c < p.C; c += kPieces * kTeam * n) {
    Vector<T, n> pieces[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces[i] = piece_of<n>(x, c + i * kTeam * n, p.C, p.S, impossible);
    F top = online.max;
#pragma unroll
    for (int i = 0; i < kPieces * n; ++i) {
      const F value = to_float(pieces[i / n].v[i % n]);
      top = value > top ? value : top;
    }
    online.raise(top);
    F sum = 0, dot = 0, mass = 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      Vector<F, n> k = {};
      if constexpr (kSoft) k = soft_targets<n>(p, uniform, place.at, c + i * kTeam * n);
#pragma unroll
      for (int e = 0; e < n; ++e) {
        const F below = F(to_float(pieces[i].v[e])) - top;
        sum += exp(below);
        const int64_t at = c + i * kTeam * n + e;
        if (kSoft && at >= 0 && at < p.C) dot += k.v[e] * below, mass += k.v[e];
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
__global__ void __launch_bounds__(kThreads, kBlocks<T>) backward_kernel(CrossEntropyBackward<T, W> p, Compute<T> uniform) {
  using F = Compute<T>;
  const Place<kTeam, CrossEntropyBackward<T, W>> place(p);
  const int64_t rows = p.N * p.S, row = place.row;
  if (row >= rows) return;
  const Target<F> t = target_of<F>(p, row);
  const F max = p.stats[row], log_sum = p.stats[rows + row];
  F grad = to_float(p.dy[p.reduction == kNone ? row : 0]);
  if (p.reduction == kMean) grad /= *p.divisor;
  const F hard = grad * t.hard, softmax = (kSoft ? hard + grad * p.stats[2 * rows + row] : hard) * exp(-log_sum);
  constexpr int n = kPiece<kTeam, T>, kPieces = n > 1 && !kSoft ? 2 : 1;
  const T* const x = p.x + place.at;
  for (int64_t first = int64_t(place.lane) * n - before_row<n>(x, p.S); first < p.C; first += kPieces * kTeam * n) {
    Vector<T, n> pieces[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces[i] = piece_of<n>(x, first + i * kTeam * n, p.C, p.S, {});
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int64_t c = first + i * kTeam * n;
      Vector<F, n> k = {};
      Vector<W, n> dq = {};
      if constexpr (kSoft) k = soft_targets<n>(p, uniform, place.at, c);
#pragma unroll
      for (int e = 0; e < n; ++e) {
        const F below = F(to_float(pieces[i].v[e])) - max;
        F dx = exp(below) * softmax;
        if (kSoft) dx -= grad * k.v[e];
        if (c + e == t.index) dx -= hard;
        pieces[i].v[e] = from_float<T>(t.ignored ? F(0) : dx);
        if (kSoft && p.dq && c + e >= 0 && c + e < p.C)
          dq.v[e] = from_float<W>(grad * F(1 - p.smoothing) * weight_of<F>(p, c + e) * (log_sum - below));
      }
      if (p.dx) store_piece<n>(p.dx + place.at, c, p.C, p.S, pieces[i]);
      if (kSoft && p.dq) store_piece<n>(p.dq + place.at, c, p.C, p.S, dq);
    }
  }
}

// ---- launchers

// body(kTeam as a type, kSoft as a type, grid)
template <class T, class Args, class Body>
void with_team(const Args& p, const Body& body) {
  const auto start = [&](auto team, auto soft) {
    body(team, soft, grid_of(ceil_div(p.N * p.S, kThreads / team.value)));
  };
  using Warp = std::integral_constant<int, kWarp>;
  if (p.q || p.smoothing > 0) return start(Warp(), std::true_type());
  if constexpr (std::is_same_v<T, double>) {  // for gradcheck
    start(Warp(), std::false_type());
  } else if (p.S > 1 || p.C <= kOneThread) {
    start(std::integral_constant<int, 1>(), std::false_type());
  } else if (p.C <= kOneWarp) {
    start(Warp(), std::false_type());
  } else {
    start(std::integral_constant<int, kThreads>(), std::false_type());
  }
}

template <template <class, class> class Args, class T, class W>
Compute<T> uniform_of(const Args<T, W>& p) {
  return Compute<T>(p.smoothing / double(p.C));
}

}  // namespace

template <class T, class W>
void cross_entropy_forward(const CrossEntropyForward<T, W>& p, Stream stream) {
  with_team<T>(p, [&](auto team, auto soft, dim3 grid) {
    launch(forward_kernel<team.value, soft.value, T, W>, grid, kThreads, 0, stream, p,
           uniform_of(p));
  });
  if (p.reduction != kNone) launch(reduce_kernel<T, W>, dim3(1), kThreads, 0, stream, p);
}

template <class T, class W>
void cross_entropy_backward(const CrossEntropyBackward<T, W>& p, Stream stream) {
  with_team<T>(p, [&](auto team, auto soft, dim3 grid) {
    launch(backward_kernel<team.value, soft.value, T, W>, grid, kThreads, 0, stream, p, uniform_of(p));
  });
}

#define FASTFT_X(suffix, T, W)                                                         \
  template void cross_entropy_forward<T, W>(const CrossEntropyForward<T, W>&, Stream); \
  template void cross_entropy_backward<T, W>(const CrossEntropyBackward<T, W>&, Stream);
FASTFT_CUDA_DTYPES(FASTFT_X)
#undef FASTFT_X

}  // namespace fastft::cuda
