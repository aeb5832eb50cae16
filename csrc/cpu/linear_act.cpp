// Fused linear layer and activation:  z = x w^T + b,  y = act(z);   backward: dz = dy act'(z),  dx = dz w,  dw = dz^T x,  db = sum over rows of dz
//   x (M, K) T    w (N, K), b (N) W    y, z, dy (M, N) T.   z is stored for the backward, nothing else.
// Floor: 2 M N K FLOPs at the FMA peak, for each of the three products; what is added to them is under 2 % at K >= 384:
//   forward   bias and activation on each tile while it is in L1; y and z are written once.
//   backward  one pass makes dz and the sums of its columns (reads dy and z, streams dz: 3 M N sizeof(T)), by and by beside
//             the tiles of dx where there is one; identity needs no dz.
//             Where x = act(x_preact), the gradient of x_preact is made of each tile of dx, and no dz by the layer before.
// Tried: the registers that a tile streams written one in each step of the next tile, 0.97 to 1 of the speed; dz and its
//   columns' sums made while dz is packed for dw, 0.87 to 1.005 (a pass of its own hides act' behind memory); it made beside the tiles of dw,
//   each as soon as its rows are there, 0.97 to 1.01; db by the
//   tasks of dw, 1 in fp32 and 0.98 in bf16; x of a bf16 dw from where it lies, its rows interleaved in registers by each
//   tile, 0.98 to 1.02; sums of 256 units of depth in place of 192, 1; dy and z asked for ahead in the pass that makes dz, 12 %
//   of it and 0.1 of the product.
// Products accumulate in fp32 (fp64 for fp64) and are rounded once, at the store; dz is rounded to T, as PyTorch's is.
#include <type_traits>

#include "activation.h"
#include "column_sums.h"
#include "gelu_lookup.h"
#include "gemm.h"

namespace FASTFT_NAMESPACE {
namespace {

// Rows that an epilogue reads, or writes and does not stream.
template <class T>
Touched touched(T* data, int64_t stride) {
  return {const_cast<std::remove_const_t<T>*>(data), stride * int64_t(sizeof(T)), int(sizeof(T))};
}
template <class T>
Touched written(T* data, int64_t stride, bool past_caches) {
  return touched(past_caches ? nullptr : data, stride);
}

// What is there for each activation is functions of rows and tiles; the code that calls them is there once.

template <class T>
struct ForwardEpilogue {
  using Acc = Compute<T>;
  T* const y;
  T* const z;             // or null
  const Acc* const bias;  // (N + kTileCols): tiles are whole; zeros where there is none
  const int64_t stride;
  const bool past_caches;

  template <class Fn>
  static void run(const void* context, const Acc* tile, int64_t row, int64_t col, int rows, int cols) {
    const auto& p = *static_cast<const ForwardEpilogue*>(context);
    constexpr int kCols = kTileCols<typename TileFor<T>::type>;
    constexpr int L = kLanes<Acc>;
    const bool whole = cols == kCols;  // else through a buffer, so that there is one copy of the activation
    const bool past_caches = p.past_caches && whole && col * int64_t(sizeof(T)) % kVectorBytes == 0;
    T y_buffer[kCols], z_buffer[kCols];
    for (int i = 0; i < rows; ++i) {
      const int64_t at = (row + i) * p.stride + col;
      Vec<Acc> v[kTileVecs];
#pragma GCC unroll 2
      for (int j = 0; j < kTileVecs; ++j) v[j] = load(tile + i * kCols + j * L) + load(p.bias + col + j * L);
      if (p.z) put(whole ? p.z + at : z_buffer, v, past_caches);
#pragma GCC unroll 2
      for (int j = 0; j < kTileVecs; ++j) v[j] = Fn::template f<kRough<T>>(v[j]);
      put(whole ? p.y + at : y_buffer, v, past_caches);
      if (whole) continue;
      std::memcpy(p.y + at, y_buffer, size_t(cols) * sizeof(T));
      if (p.z) std::memcpy(p.z + at, z_buffer, size_t(cols) * sizeof(T));
    }
  }
};

template <class T, class Out>
struct StoreEpilogue {  // rounds the tile, or its sum with `add`, to the output
  using Acc = Compute<T>;
  Out* out;
  const Out* add;  // or null
  int64_t stride;
  bool past_caches;

  static void run(const void* context, const Acc* tile, int64_t row, int64_t col, int rows, int cols) {
    const auto& p = *static_cast<const StoreEpilogue*>(context);
    constexpr int kCols = kTileCols<typename TileFor<T>::type>;
    Out* out = p.out + row * p.stride + col;
    const Out* add = p.add ? p.add + row * p.stride + col : nullptr;
    // One loop for each of them: with branches inside, a bf16 weight gradient of 64 rows takes 4 % longer.
    const auto whole_rows = [&](auto adds, auto past_caches) {
#pragma GCC unroll 2
      for (int i = 0; i < rows; ++i, tile += kCols, out += p.stride) {
        Vec<Acc> v[kTileVecs];
#pragma GCC unroll 2
        for (int j = 0; j < kTileVecs; ++j) {
          v[j] = load(tile + j * kLanes<Acc>);
          if constexpr (adds) v[j] += load(add + i * p.stride + j * kLanes<Acc>);
        }
        put(out, v, past_caches);
      }
    };
    const bool past_caches = p.past_caches && col * int64_t(sizeof(Out)) % kVectorBytes == 0;
    const auto rows_that_add = [&](auto adds) {
      past_caches ? whole_rows(adds, std::true_type{}) : whole_rows(adds, std::false_type{});
    };
    if (cols == kCols) return add ? rows_that_add(std::true_type{}) : rows_that_add(std::false_type{});
    for (int i = 0; i < rows; ++i)
      for_lanes<Acc>(cols, [&](int64_t j, auto load_some, auto store_some) {
        Vec<Acc> value = load(tile + i * kCols + j);
        if (add) value += load_some(add + i * p.stride + j);
        store_some(out + i * p.stride + j, value);
      });
  }
};

// dx = tile act'(z) and y = act(z) once more, where the product's other factor was y.
template <class T>
struct ThroughEpilogue {
  using Acc = Compute<T>;
  T* const dx;
  T* const y;  // or null; may be z
  const T* const z;
  const int64_t stride;
  const bool past_caches;

  template <class Fn>
  static void run(const void* context, const Acc* tile, int64_t row, int64_t col, int rows, int cols) {
    const auto& p = *static_cast<const ThroughEpilogue*>(context);
    constexpr int kCols = kTileCols<typename TileFor<T>::type>;
    constexpr int L = kLanes<Acc>;
    const bool whole = cols == kCols;
    const bool past_caches = p.past_caches && whole && col * int64_t(sizeof(T)) % kVectorBytes == 0;
    T dx_buffer[kCols], y_buffer[kCols], z_buffer[kCols] = {};
    for (int i = 0; i < rows; ++i) {
      const int64_t at = (row + i) * p.stride + col;
      const T* z = p.z + at;
      if (!whole) z = static_cast<const T*>(std::memcpy(z_buffer, z, size_t(cols) * sizeof(T)));
      Vec<Acc> v[kTileVecs], f[kTileVecs];
#pragma GCC unroll 2
      for (int j = 0; j < kTileVecs; ++j) {
        const Vec<Acc> x = load(z + j * L);
        f[j] = Fn::template f<kRough<T>>(x);
        v[j] = load(tile + i * kCols + j * L) * Fn::template df<kRough<T>>(x);
      }
      put(whole ? p.dx + at : dx_buffer, v, past_caches);
      if (p.y) put(whole ? p.y + at : y_buffer, f, past_caches);
      if (whole) continue;
      std::memcpy(p.dx + at, dx_buffer, size_t(cols) * sizeof(T));
      if (p.y) std::memcpy(p.y + at, y_buffer, size_t(cols) * sizeof(T));
    }
  }
};

template <class T>
struct RowFunctions {
  // A row of dz = dy act'(z), whole registers, and its sum onto the rows before it. dz may be null, and sum.
  void (*grad_preact)(T* dz, Compute<T>* sum, const T* dy, const T* z, int64_t N, bool first, bool past_caches);
  // A row of y = act(z), whole registers.
  void (*act)(T* y, const T* z, int64_t N);
};

template <class Fn, class T>
void grad_preact_row(T* dz, Compute<T>* sum, const T* dy, const T* z, int64_t N, bool first, bool past_caches) {
  using Acc = Compute<T>;
  constexpr int L = kLanes<Acc>, kAtOnce = sizeof(T) == 2 ? 2 : 1;  // registers of Acc in one of T
  const auto step = [&](int64_t j) {
    Vec<Acc> v = load(dy + j);
    if constexpr (Fn::value != kIdentity) v *= Fn::template df<kRough<T>>(load(z + j));
    if (sum) store(sum + j, first ? v : load(sum + j) + v);
    return v;
  };
  int64_t j = 0;
  if (past_caches)
    for (; j < N; j += kAtOnce * L) {
      Vec<Acc> v[kAtOnce];
      for (int k = 0; k < kAtOnce; ++k) v[k] = step(j + k * L);
      put(dz + j, v, true);
    }
  for (; j < N; j += L) {
    const Vec<Acc> v = step(j);
    if (dz) store(dz + j, v);
  }
}

template <class Fn, class T>
void activation_row(T* y, const T* z, int64_t N) {
  using Acc = Compute<T>;
  for (int64_t j = 0; j < N; j += kLanes<Acc>) store(y + j, Fn::template f<kRough<T>>(load(z + j)));
}

// Matrices whose rows lie further apart than their elements take.
struct Strides {
  int64_t dz, y;  // y: of y, dy and z
};

// dz and the sums of its columns over each kSumRows rows (chunks, N), in one pass, and y = act(z) again. dz is null for
// the identity, sums and y where nobody wants them.
template <class T>
class GradPreact {
  using Acc = Compute<T>;

 public:
  GradPreact(int activation, T* dz, Acc* sums, T* y, const T* dy, const T* z, int64_t M, int64_t N, Strides stride)
      : dz(dz), sums(sums), y(y), dy(dy), z(z), M(M), N(N), stride(stride) {
    dispatch_activation(
        activation, [&](auto act) { row = {&grad_preact_row<decltype(act), T>, &activation_row<decltype(act), T>}; });
  }

  int64_t chunks() const { return dz || sums ? ceil_div(M, kSumRows) : 0; }
  RowMaker maker() const {
    return {[](const void* self, int64_t chunk) { static_cast<const GradPreact*>(self)->make(chunk); }, this, kSumRows};
  }

  void make(int64_t chunk) const {
    constexpr int L = kLanes<Acc>;
    const int64_t whole = N / L * L, rest = N - whole;
    const int64_t begin = chunk * kSumRows, end = begin + kSumRows < M ? begin + kSumRows : M;
    Acc* const sum = sums ? sums + chunk * N : nullptr;
    T dz_rest[L], y_rest[L], dy_rest[L] = {}, z_rest[L] = {};  // the last columns, padded to a register
    Acc sum_rest[L];
    for (int64_t i = begin; i < end; ++i) {
      T* const dz_row = dz ? dz + i * stride.dz : nullptr;
      T* const y_row = y ? y + i * stride.y : nullptr;
      const T *const dy_row = dy + i * stride.y, *const z_row = z ? z + i * stride.y : nullptr;
      row.grad_preact(dz_row, sum, dy_row, z_row, whole, i == begin, past_caches);
      if (y) row.act(y_row, z_row, whole);
      if (!rest) continue;
      std::memcpy(dy_rest, dy_row + whole, size_t(rest) * sizeof(T));
      if (z) std::memcpy(z_rest, z_row + whole, size_t(rest) * sizeof(T));
      row.grad_preact(dz_rest, sum_rest, dy_rest, z_rest, L, i == begin, false);
      if (dz) std::memcpy(dz_row + whole, dz_rest, size_t(rest) * sizeof(T));
      if (!y) continue;
      row.act(y_rest, z_rest, L);
      std::memcpy(y_row + whole, y_rest, size_t(rest) * sizeof(T));
    }
    if (past_caches) streamed();
    if (rest && sum) std::memcpy(sum + whole, sum_rest, size_t(rest) * sizeof(Acc));
  }

 private:
  T* const dz;
  Acc* const sums;
  T* const y;
  const T *const dy, *const z;
  const int64_t M, N;
  const Strides stride;
  const bool past_caches = streams(dz, M, stride.dz) && streams(dz, M, N);
  RowFunctions<T> row = {};
};

template <class T>
Operand<T> operand(const T* data, int64_t stride, bool depth_major) {
  return {data, stride, depth_major};
}

// Calls body with the input in the dtype that the caller has it in.
template <class T, class W, class Args, class Body>
void with_input(const Args& p, const Body& body) {
  if constexpr (kTakesFloat<T, W>)
    if (p.x32) return body(p.x32);
  body(p.x);
}

}  // namespace

template <class T, class W>
void linear_act_forward(const LinearActForward<T, W>& p, const Host& host) {
  using Acc = Compute<T>;
  constexpr int kCols = kTileCols<typename TileFor<T>::type>;
  const int64_t x_stride = p.x_stride ? p.x_stride : p.K, y_stride = p.y_stride ? p.y_stride : p.N;
  const int64_t padded = p.N + kCols;  // to whole tiles, wherever they begin
  Acc* const bias = scratch<Acc>(host, padded);
  for (int64_t j = 0; j < padded; ++j) bias[j] = p.b && j < p.N ? to_float(p.b[j]) : Acc(0);
  const bool past_caches = streams(p.y, p.M, y_stride) && (!p.z || streams(p.z, p.M, y_stride));
  const ForwardEpilogue<T> epilogue{p.y, p.z, bias, y_stride, past_caches};
  Epilogue<Acc> then = {nullptr, &epilogue, {written(p.y, y_stride, past_caches), written(p.z, y_stride, past_caches)}};
  dispatch_activation(p.activation, [&](auto act) { then.run = &epilogue.template run<decltype(act)>; });
  with_input<T, W>(p, [&](const auto* x) {
    gemm<T>(p.M, p.N, p.K, operand(x, x_stride, false), Operand<W>{p.w, p.K, false}, then, host);
  });
}

template <class T, class W>
void linear_act_backward(const LinearActBackward<T, W>& p, const Host& host) {
  using Acc = Compute<T>;
  const int64_t chunks = ceil_div(p.M, kSumRows);
  const int64_t x_stride = p.x_stride ? p.x_stride : p.K, y_stride = p.y_stride ? p.y_stride : p.N;
  const bool makes = p.activation != kIdentity;
  const int64_t dz_stride = !makes                                      ? y_stride
                            : rows_share_sets(p.N * int64_t(sizeof(T))) ? p.N + 64 / int64_t(sizeof(T))
                                                                        : p.N;
  Acc* const sums = p.db ? scratch<Acc>(host, chunks * p.N) : nullptr;
  T* const made = makes ? scratch<T>(host, p.M * dz_stride) : nullptr;
  const T* const dz = made ? made : p.dy;
  const GradPreact<T> pass(p.activation, made, sums, made ? p.y : nullptr, p.dy, p.z, p.M, p.N, {dz_stride, y_stride});
  // With enough of it the product for dx makes dz, so that not all threads wait for memory at once: it gains 1 to 2 %, with
  // sums 0.5. Sums alone are better made before: they bring dy into L3.
  const bool with_dx = made && pass.chunks() > host.threads && (p.dx || p.dx32) && p.K > 0;
  const RowMaker maker = with_dx ? pass.maker() : RowMaker{};
  if (!with_dx) parallel_for(host, pass.chunks(), [&](int64_t chunk, int) { pass.make(chunk); });
  const auto grad_input = [&](auto* dx, const auto* add) {
    using Out = std::remove_pointer_t<decltype(dx)>;
    const StoreEpilogue<T, Out> epilogue{dx, add, x_stride, streams(dx, p.M, x_stride)};
    gemm<T>(p.M, p.K, p.N, Operand<T>{dz, dz_stride, false}, Operand<W>{p.w, p.K, true},
            {&epilogue.run, &epilogue, {written(dx, x_stride, epilogue.past_caches), {}}}, host, maker);
  };
  if (p.x_preact) {
    const bool past_caches = streams(p.dx, p.M, x_stride) && (!p.x_again || streams(p.x_again, p.M, x_stride));
    const ThroughEpilogue<T> epilogue{p.dx, p.x_again, p.x_preact, x_stride, past_caches};
    Epilogue<Acc> then = {nullptr, &epilogue, {written(p.dx, x_stride, past_caches), touched(p.x_preact, x_stride)}};
    dispatch_activation(p.x_activation, [&](auto act) { then.run = &epilogue.template run<decltype(act)>; });
    gemm<T>(p.M, p.K, p.N, Operand<T>{dz, dz_stride, false}, Operand<W>{p.w, p.K, true}, then, host, maker);
  } else if (p.dx) {
    grad_input(p.dx, p.add);
  }
  if constexpr (kTakesFloat<T, W>)
    if (p.dx32) grad_input(p.dx32, p.add32);
  if (p.db) add_up(p.db, sums, chunks, p.N, p.N, host);
  if (p.dw) {
    const StoreEpilogue<T, W> epilogue{p.dw, nullptr, p.K, streams(p.dw, p.N, p.K)};
    with_input<T, W>(p, [&](const auto* x) {
      gemm<T>(p.N, p.K, p.M, Operand<T>{dz, dz_stride, true}, operand(x, x_stride, true),
              {&epilogue.run, &epilogue, {written(p.dw, p.K, epilogue.past_caches), {}}}, host);
    });
  }
}

FASTFT_INSTANTIATE(linear_act_forward, LinearActForward)
FASTFT_INSTANTIATE(linear_act_backward, LinearActBackward)

}  // namespace FASTFT_NAMESPACE
