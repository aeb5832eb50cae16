// Fused linear layer and activation:  z = x w^T + b,  y = act(z);   backward: dz = dy act'(z),  dx = dz w,  dw = dz^T x,  db = sum over rows of dz
//   x (M, K) T    w (N, K), b (N) W    y, z, dy (M, N) T.   z is stored for the backward, nothing else.
// Floor: 2 M N K FLOPs at the FMA peak, for each of the three products; what is added to them is under 2 % at K >= 384:
//   forward   bias and activation on each tile while it is in L1; y and z are written once.
//   backward  one pass makes dz and the sums of its columns (reads dy and z, writes dz: 3 M N sizeof(T)); identity needs no dz.
// Products accumulate in fp32 (fp64 for fp64) and are rounded once, at the store; dz is rounded to T, as PyTorch's is.
#include "activation.h"
#include "gemm.h"

namespace FASTFT_NAMESPACE {
namespace {

template <class T, int kActivation>
struct ForwardEpilogue {
  using Acc = Compute<T>;
  T* const y;
  T* const z;             // or null
  const Acc* const bias;  // zeros where there is none
  const int64_t N;

  static void run(const void* context, const Acc* tile, int64_t row, int64_t col, int rows, int cols) {
    const auto& p = *static_cast<const ForwardEpilogue*>(context);
    constexpr int kCols = kTileCols<typename TileFor<T>::type>;
    for (int i = 0; i < rows; ++i) {
      const int64_t at = (row + i) * p.N + col;
      for_registers<Acc>(cols, [&](int64_t j, auto load_some, auto store_some) {
        const Vec<Acc> v = load(tile + i * kCols + j) + load_some(p.bias + col + j);
        if (p.z) store_some(p.z + at + j, v);
        store_some(p.y + at + j, Act<kActivation>::f(v));
      });
    }
  }
};

template <class T, class Out>
struct StoreEpilogue {  // rounds the tile to the output
  using Acc = Compute<T>;
  Out* out;
  int64_t stride;

  static void run(const void* context, const Acc* tile, int64_t row, int64_t col, int rows, int cols) {
    const auto& p = *static_cast<const StoreEpilogue*>(context);
    for (int i = 0; i < rows; ++i)
      for_lanes<Acc>(cols, [&](int64_t j, auto load_some, auto store_some) {
        (void)load_some;
        store_some(p.out + (row + i) * p.stride + col + j, load(tile + i * kTileCols<typename TileFor<T>::type> + j));
      });
  }
};

constexpr int64_t kSumRows = 64;  // rows of one partial sum of db: fixed, so that the sum's order is

// dz = dy act'(z) and the sums of its columns over each kSumRows rows, in one pass. dz is null for the identity, sums where nobody wants them.
template <int kActivation, class T>
void grad_preact(T* dz, Compute<T>* sums, const T* dy, const T* z, int64_t M, int64_t N, const Host& host) {
  using Acc = Compute<T>;
  parallel_for(host, ceil_div(M, kSumRows), [&](int64_t chunk, int) {
    const int64_t begin = chunk * kSumRows, end = begin + kSumRows < M ? begin + kSumRows : M;
    Acc* const sum = sums ? sums + chunk * N : nullptr;
    for (int64_t i = begin; i < end; ++i)
      for_registers<Acc>(N, [&](int64_t j, auto load, auto store) {
        Vec<Acc> v = load(dy + i * N + j);
        if constexpr (kActivation != kIdentity) v *= Act<kActivation>::df(load(z + i * N + j));
        if (dz) store(dz + i * N + j, v);
        if (sum) store(sum + j, i == begin ? v : load(sum + j) + v);
      });
  });
}

template <class Acc, class W>
void add_up(W* db, const Acc* sums, int64_t chunks, int64_t N, const Host& host) {
  constexpr int64_t kCols = 256;
  parallel_for(host, ceil_div(N, kCols), [&](int64_t task, int) {
    const int64_t from = task * kCols, count = N - from < kCols ? N - from : kCols;
    for_lanes<Acc>(count, [&](int64_t j, auto load, auto store) {
      Vec<Acc> sum = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += load(sums + chunk * N + from + j);
      store(db + from + j, sum);
    });
  });
}

}  // namespace

template <class T, class W>
void linear_act_forward(const LinearActForward<T, W>& p, const Host& host) {
  using Acc = Compute<T>;
  Acc* const bias = scratch<Acc>(host, p.N);
  for (int64_t j = 0; j < p.N; ++j) bias[j] = p.b ? to_float(p.b[j]) : Acc(0);
  dispatch_activation(p.activation, [&](auto activation) {
    constexpr int size = sizeof(T);
    const ForwardEpilogue<T, activation.value> epilogue{p.y, p.z, bias, p.N};
    gemm<T>(p.M, p.N, p.K, Operand<T>{p.x, p.K, false}, Operand<W>{p.w, p.K, false},
            {&epilogue.run, &epilogue, {{p.y, p.N * size, size}, {p.z, p.N * size, size}}}, host);
  });
}

template <class T, class W>
void linear_act_backward(const LinearActBackward<T, W>& p, const Host& host) {
  using Acc = Compute<T>;
  const int64_t chunks = ceil_div(p.M, kSumRows);
  Acc* const sums = p.db ? scratch<Acc>(host, chunks * p.N) : nullptr;
  T* const made = p.activation == kIdentity ? nullptr : scratch<T>(host, p.M * p.N);
  const T* const dz = made ? made : p.dy;
  if (made || sums)
    dispatch_activation(p.activation, [&](auto activation) {
      grad_preact<activation.value, T>(made, sums, p.dy, p.z, p.M, p.N, host);
    });
  if (p.db) add_up(p.db, sums, chunks, p.N, host);
  if (p.dx) {
    const StoreEpilogue<T, T> epilogue{p.dx, p.K};
    gemm<T>(p.M, p.K, p.N, Operand<T>{dz, p.N, false}, Operand<W>{p.w, p.K, true},
            {&epilogue.run, &epilogue, {{p.dx, p.K * int64_t(sizeof(T)), sizeof(T)}, {}}}, host);
  }
  if (p.dw) {
    const StoreEpilogue<T, W> epilogue{p.dw, p.K};
    gemm<T>(p.N, p.K, p.M, Operand<T>{dz, p.N, true}, Operand<T>{p.x, p.K, true},
            {&epilogue.run, &epilogue, {{p.dw, p.K * int64_t(sizeof(W)), sizeof(W)}, {}}}, host);
  }
}

FASTFT_INSTANTIATE(linear_act_forward, LinearActForward)
FASTFT_INSTANTIATE(linear_act_backward, LinearActBackward)

}  // namespace FASTFT_NAMESPACE
