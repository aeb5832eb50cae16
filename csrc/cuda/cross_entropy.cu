// Softmax cross-entropy; csrc/cpu/cross_entropy.cpp has the formulas, from which h, k and g are named here.
// Moves 3 M C sizeof(T) bytes for M rows: the forward reads the logits once, the backward reads them and writes dx.
// A team of 1, 32 or 256 threads works on a row, each by an online softmax over 16 values (8 with soft targets) at a time.
// They are read and written 16 bytes at a time wherever the row begins: BERT's 30522 classes put most rows off any grid, so
// that whole pieces begin behind the first few classes, and those at both ends are taken one by one. Classes that do not come
// last are one thread's: then neighbouring threads read neighbouring rows, which is where memory is
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

// ---- a row is whole pieces, n classes between multiples of 16 bytes, and at its two ends the classes that are left; where
// classes do not lie side by side, or the results on another grid, all of them are

template <int kTeam, class T>
constexpr int kPiece = kTeam == 1 ? 1 : kWidth<T>;

template <int n>
struct Pieces {
  int64_t begin, end;  // classes that whole pieces have; with n = 1 all, wherever they lie
  int64_t left;        // number of the others

  template <class T>
  __device__ Pieces(const T* row, const T* result, int64_t C, int64_t stride) : begin(0), end(C), left(0) {
    if (n == 1) return;
    const auto place = [](const T* at) { return int64_t(reinterpret_cast<uintptr_t>(at) / sizeof(T) % n); };
    begin = (n - place(row)) % n;
    end = begin + (C - begin) / n * n;
    if (stride != 1 || begin > C || (result && place(result) != place(row))) begin = end = 0;
    left = C - (end - begin);
  }
  __device__ int64_t class_left(int64_t i) const { return i < begin ? i : i - begin + end; }
};

template <int n, class T>
__device__ Vector<T, n> piece_of(const T* row, int64_t c, int64_t stride) {
  if constexpr (n == 1)
    return {{row[c * stride]}};
  else
    return *reinterpret_cast<const Vector<T, n>*>(row + c);
}

// Parameters are of T, or of float, which is told at run time: as a type it would make half as many kernels more.
template <class F, class T>
__device__ F get(const T* from, int64_t at, bool is_float) {
  return is_float ? F(reinterpret_cast<const float*>(from)[at]) : F(to_float(from[at]));
}
template <class F, class T>
__device__ void put(T* to, int64_t at, F value, bool is_float) {
  if (is_float)
    reinterpret_cast<float*>(to)[at] = float(value);
  else
    to[at] = from_float<T>(value);
}

template <template <class, class> class Args, class T>
struct Given : Args<T, T> {
  bool is_float;       // what stands as a W
  Compute<T> uniform;  // smoothing / C, of the host's division

  template <class W>
  explicit Given(const Args<T, W>& p)
      : Args<T, T>(bit_cast<Args<T, T>>(p)),
        is_float(std::is_same_v<W, float>),
        uniform(Compute<T>(p.smoothing / double(p.C))) {}
};

template <class F, class Args>
__device__ F weight_of(const Args& p, int64_t c) {
  return p.w ? get<F>(p.w, c, p.is_float) : F(1);
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

// k
template <class F, class Args>
__device__ F soft_target(const Args& p, int64_t at, int64_t c) {
  const F q = p.q ? get<F>(p.q, at + c * p.S, p.is_float) : F(0);
  return (p.uniform + F(1 - p.smoothing) * q) * weight_of<F>(p, c);
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

template <int kTeam, bool kSoft, class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) forward_kernel(Given<CrossEntropyForward, T> p) {
  using F = Compute<T>;
  const Place<kTeam, CrossEntropyForward<T, T>> place(p);
  const int64_t rows = p.N * p.S, row = place.row;
  if (row >= rows) return;  // a whole team

  constexpr int n = kPiece<kTeam, T>, kPieces = kBlock<kSoft> / n;
  const T* const x = p.x + place.at;
  const Pieces<n> whole(x, static_cast<const T*>(nullptr), p.C, p.S);
  Online<kSoft, F> online;
  for (int64_t c = whole.begin + int64_t(place.lane) * n; c < whole.end; c += kPieces * kTeam * n) {
    F values[kPieces][n], top = online.max;
    Vector<T, n> pieces[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      if (c + i * kTeam * n < whole.end) pieces[i] = piece_of<n>(x, c + i * kTeam * n, p.S);
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
#pragma unroll
      for (int e = 0; e < n; ++e) {
        values[i][e] = c + i * kTeam * n < whole.end ? F(to_float(pieces[i].v[e])) : F(-HUGE_VAL);
        top = values[i][e] > top ? values[i][e] : top;
      }
    online.raise(top);
    F sum = 0, dot = 0, mass = 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
#pragma unroll
      for (int e = 0; e < n; ++e) {
        const F below = values[i][e] - top;
        sum += exp(below);
        if (kSoft && c + i * kTeam * n < whole.end) {
          const F k = soft_target<F>(p, place.at, c + i * kTeam * n + e);
          dot += k * below, mass += k;
        }
      }
    online.sum += sum, online.dot += dot, online.mass += mass;
  }
  if constexpr (n > 1) {
    for (int64_t i = place.lane; i < whole.left; i += kTeam) {
      const int64_t c = whole.class_left(i);
      const F value = to_float(x[c * p.S]);
      online.raise(value > online.max ? value : online.max);
      online.sum += exp(value - online.max);
      if (kSoft) {
        const F k = soft_target<F>(p, place.at, c);
        online.dot += k * (value - online.max), online.mass += k;
      }
    }
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
    put(p.loss, row, loss, p.is_float);
  else
    p.row_loss[row] = loss;
  if (!p.stats) return;
  p.stats[row] = online.max;
  p.stats[rows + row] = log_sum;
  if (kSoft) p.stats[2 * rows + row] = online.mass;
}

template <class T>
__global__ void __launch_bounds__(kThreads) reduce_kernel(Given<CrossEntropyForward, T> p) {
  double loss = 0, weight = 0;
  for (int64_t row = threadIdx.x; row < p.N * p.S; row += kThreads) {
    loss += double(p.row_loss[row]);
    weight += double(target_of<Compute<T>>(p, row).weight);
  }
  loss = block_reduce<kThreads>(loss, Sum());
  weight = block_reduce<kThreads>(weight, Sum());
  if (threadIdx.x != 0) return;
  put(p.loss, 0, Compute<T>(p.reduction == kMean ? loss / weight : loss), p.is_float);
  if (p.divisor) *p.divisor = Compute<T>(weight);
}

template <bool kSoft, class T>
constexpr int kBackwardBlocks = sizeof(T) == 8 ? 1
                                : kSoft        ? 2
                                               : 3;  // with three, soft targets would spill on sm_120

template <int kTeam, bool kSoft, class T>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<kSoft, T>)
    backward_kernel(Given<CrossEntropyBackward, T> p) {
  using F = Compute<T>;
  const Place<kTeam, CrossEntropyBackward<T, T>> place(p);
  const int64_t rows = p.N * p.S, row = place.row;
  if (row >= rows) return;
  const Target<F> t = target_of<F>(p, row);
  const F max = p.stats[row], log_sum = p.stats[rows + row];
  F grad = get<F>(p.dy, p.reduction == kNone ? row : 0, p.is_float);
  if (p.reduction == kMean) grad /= *p.divisor;
  const F hard = grad * t.hard, softmax = (kSoft ? hard + grad * p.stats[2 * rows + row] : hard) * exp(-log_sum);
  constexpr int n = kPiece<kTeam, T>, kPieces = n > 1 && !kSoft ? 2 : 1;
  const T* const x = p.x + place.at;
  T* const dx = p.dx ? p.dx + place.at : nullptr;
  const auto gradient = [&](T logit, int64_t c) {  // of class c; and of its probability
    const F below = F(to_float(logit)) - max;
    F dx = exp(below) * softmax;
    if (kSoft) dx -= grad * soft_target<F>(p, place.at, c);
    if (c == t.index) dx -= hard;
    if (kSoft && p.dq)
      put(p.dq, place.at + c * p.S, grad * F(1 - p.smoothing) * weight_of<F>(p, c) * (log_sum - below), p.is_float);
    return from_float<T>(t.ignored ? F(0) : dx);
  };
  const Pieces<n> whole(x, dx, p.C, p.S);
  for (int64_t from = whole.begin + int64_t(place.lane) * n; from < whole.end; from += kPieces * kTeam * n) {
    Vector<T, n> pieces[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      if (from + i * kTeam * n < whole.end) pieces[i] = piece_of<n>(x, from + i * kTeam * n, p.S);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int64_t c = from + i * kTeam * n;
      if (c >= whole.end) break;
#pragma unroll
      for (int e = 0; e < n; ++e) pieces[i].v[e] = gradient(pieces[i].v[e], c + e);
      if (!dx) continue;
      if constexpr (n == 1)
        dx[c * p.S] = pieces[i].v[0];
      else
        *reinterpret_cast<Vector<T, n>*>(dx + c) = pieces[i];
    }
  }
  if constexpr (n > 1) {
    for (int64_t i = place.lane; i < whole.left; i += kTeam) {
      const int64_t c = whole.class_left(i);
      const T result = gradient(x[c * p.S], c);
      if (dx) dx[c * p.S] = result;
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

template <class T>
void forward(const Given<CrossEntropyForward, T>& p, Stream stream) {
  with_team<T>(p, [&](auto team, auto soft, dim3 grid) {
    launch(forward_kernel<team.value, soft.value, T>, grid, kThreads, 0, stream, p);
  });
  if (p.reduction != kNone) launch(reduce_kernel<T>, dim3(1), kThreads, 0, stream, p);
}

template <class T>
void backward(const Given<CrossEntropyBackward, T>& p, Stream stream) {
  with_team<T>(p, [&](auto team, auto soft, dim3 grid) {
    launch(backward_kernel<team.value, soft.value, T>, grid, kThreads, 0, stream, p);
  });
}

}  // namespace

template <class T, class W>
void cross_entropy_forward(const CrossEntropyForward<T, W>& p, Stream stream) {
  forward(Given<CrossEntropyForward, T>(p), stream);
}
template <class T, class W>
void cross_entropy_backward(const CrossEntropyBackward<T, W>& p, Stream stream) {
  backward(Given<CrossEntropyBackward, T>(p), stream);
}

#define FASTFT_X(suffix, T, W)                                                         \
  template void cross_entropy_forward<T, W>(const CrossEntropyForward<T, W>&, Stream); \
  template void cross_entropy_backward<T, W>(const CrossEntropyBackward<T, W>&, Stream);
FASTFT_CUDA_DTYPES(FASTFT_X)
#undef FASTFT_X

}  // namespace fastft::cuda
