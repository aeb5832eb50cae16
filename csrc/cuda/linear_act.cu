// Fused linear layer and activation:  z = x w^T + b,  y = act(z);
// backward:  dz = dy act'(z),  dx = dz w,  dw = dz^T x,  db = sum over rows of dz
//   x (M, K) T    w (N, K), b (N) W    y, z, dy (M, N) T.   z is stored for the backward, nothing else.
// The products of bf16 and f16 are gemm_sm80.cu's; this is fp32, whose numbers tf32 would change, and fp64.
// Floor: 2 M N K FLOPs for each product, on the FMA units. dz is made once, in a pass that moves 3 M N elements, 4 where y is
// made again with it, 16 bytes at a time; or by the product before, whose epilogue knows that its x was an activation's.
// One kernel makes all three products. It reads its operands through accessors and stores through an epilogue. Sums are fp32
// (fp64 for fp64), in an order that depends on sizes only, rounded once, at the store. Not yet run on a GPU.
#include "activation.cuh"
#include "gemm_sm80.cuh"

namespace fastft::cuda {
namespace {

constexpr int kTile = 64;   // rows and columns of the result per block
constexpr int kDepth = 16;  // of a step: 2 operands x 16 x 68 x 8 bytes = 17 kB of shared memory in fp64
constexpr int kThreads = 256;
constexpr int kMicro = 4;  // rows and columns of the result per thread: 16 x 16 threads; an activation's call takes 4
constexpr int kPitch = kTile + 4;   // rows stay 16-byte aligned; 4 banks apart, so that stores along the depth spread
constexpr int kPartialDepth = 128;  // products in a partial sum: a single sum over K = 3072 has 4x the error

// ---- operands: element (i, d) of a (rows, depth) matrix that is stored row-major, or as its transpose

template <class T, bool kTransposed>
struct Matrix {
  static constexpr bool kDepthContiguous = !kTransposed;
  const T* data;
  int64_t stride;  // elements from one stored row to the next

  __device__ Compute<T> operator()(int64_t i, int64_t d) const {
    return to_float(data[kTransposed ? d * stride + i : i * stride + d]);
  }
};

// ---- epilogues: what becomes of elements (i, j) to (i, j + live - 1) of a product

template <class F>
using Four = Values<F, kMicro>;

template <class T, class W>
struct BiasActivation {
  static constexpr int kBlocks = 3;
  LinearActForward<T, W> p;

  __device__ void operator()(int64_t i, int64_t j, Four<Compute<T>> z, int live) const {
    const int64_t at = i * p.N + j;
#pragma unroll
    for (int e = 0; e < kMicro; ++e)
      if (e < live) {
        if (p.b) z.v[e] += Compute<T>(to_float(p.b[j + e]));
        if (p.z) p.z[at + e] = from_float<T>(z.v[e]);
      }
    if (p.activation != kIdentity) z = activation_of(p.activation, z);
#pragma unroll
    for (int e = 0; e < kMicro; ++e)
      if (e < live) p.y[at + e] = from_float<T>(z.v[e]);
  }
};

template <class Out>
struct Store {
  static constexpr int kBlocks = 3;
  Out* out;
  int64_t stride;

  template <class F>
  __device__ void operator()(int64_t i, int64_t j, const Four<F>& values, int live) const {
#pragma unroll
    for (int e = 0; e < kMicro; ++e)
      if (e < live) out[i * stride + j + e] = from_float<Out>(values.v[e]);
  }
};

template <class T, class W>
struct GradInput {
  static constexpr int kBlocks = 2;  // with three, sm_120 has too few registers for the activations
  LinearActBackward<T, W> p;

  __device__ void operator()(int64_t i, int64_t j, Four<Compute<T>> dx, int live) const {
    const int64_t at = i * p.K + j;
#pragma unroll
    for (int e = 0; e < kMicro; ++e)
      if (p.add && e < live) dx.v[e] += Compute<T>(to_float(p.add[at + e]));
    if (p.x_preact) {
      Four<Compute<T>> z = {};
#pragma unroll
      for (int e = 0; e < kMicro; ++e)
        if (e < live) z.v[e] = to_float(p.x_preact[at + e]);
      const Four<Compute<T>> factor = derivative_of(p.x_activation, z);
#pragma unroll
      for (int e = 0; e < kMicro; ++e) dx.v[e] *= factor.v[e];
      if (p.x_again) {
        z = activation_of(p.x_activation, z);
#pragma unroll
        for (int e = 0; e < kMicro; ++e)
          if (e < live) p.x_again[at + e] = from_float<T>(z.v[e]);
      }
    }
#pragma unroll
    for (int e = 0; e < kMicro; ++e)
      if (e < live) p.dx[at + e] = from_float<T>(dx.v[e]);
  }
};

// ---- kernels

// dz = dy act'(z) and y = act(z), each of which may be null; a thread takes n elements, 16 bytes where all may be vectors.
template <class T>
__global__ void __launch_bounds__(kThreads)
    grad_preact_kernel(T* dz, T* y, const T* dy, const T* z, int64_t size, int activation, bool vectors) {
  using F = Compute<T>;
  constexpr int n = kWidth<T>, kPart = n < kMicro ? n : kMicro;
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * n;
  if (at >= size) return;
  const int live = size - at < n ? int(size - at) : n;
  vectors = vectors && live == n;
  const auto read = [&](const T* from) {
    if (vectors) return *reinterpret_cast<const Vector<T, n>*>(from + at);
    Vector<T, n> x = {};
#pragma unroll
    for (int e = 0; e < n; ++e)
      if (e < live) x.v[e] = from[at + e];
    return x;
  };
  const auto write = [&](T* to, const Vector<T, n>& x) {
    if (vectors) {
      *reinterpret_cast<Vector<T, n>*>(to + at) = x;
      return;
    }
#pragma unroll
    for (int e = 0; e < n; ++e)
      if (e < live) to[at + e] = x.v[e];
  };
  const Vector<T, n> of_z = read(z);
  Vector<T, n> of_dy = {}, of_y;
  if (dz) of_dy = read(dy);
#pragma unroll
  for (int part = 0; part < n; part += kPart) {
    Values<F, kPart> values;
#pragma unroll
    for (int e = 0; e < kPart; ++e) values.v[e] = to_float(of_z.v[part + e]);
    if (dz) {
      const Values<F, kPart> factor = derivative_of(activation, values);
#pragma unroll
      for (int e = 0; e < kPart; ++e) of_dy.v[part + e] = from_float<T>(F(to_float(of_dy.v[part + e])) * factor.v[e]);
    }
    if (y) {
      values = activation_of(activation, values);
#pragma unroll
      for (int e = 0; e < kPart; ++e) of_y.v[part + e] = from_float<T>(values.v[e]);
    }
  }
  if (dz) write(dz, of_dy);
  if (y) write(y, of_y);
}

// Neighbouring threads read neighbouring elements, whichever way the operand is stored.
template <class F, class Operand>
__device__ void load_tile(F (&tile)[kDepth][kPitch], const Operand& x, int64_t row, int64_t rows, int64_t from,
                          int64_t depth) {
  for (int e = threadIdx.x; e < kTile * kDepth; e += kThreads) {
    const int i = Operand::kDepthContiguous ? e / kDepth : e % kTile;
    const int d = Operand::kDepthContiguous ? e % kDepth : e / kTile;
    tile[d][i] = row + i < rows && from + d < depth ? x(row + i, from + d) : F(0);
  }
}

// epilogue(i, j, sum over d < depth of a(i, d) b(j, d)) for i < rows, j < cols; an SM is to hold the epilogue's kBlocks.
template <class F, class A, class B, class Epilogue>
__global__ void __launch_bounds__(kThreads, sizeof(F) == 8 ? 1 : Epilogue::kBlocks)
    product_kernel(A a, B b, Epilogue epilogue, int64_t rows, int64_t cols, int64_t depth) {
  alignas(16) __shared__ F tile_a[kDepth][kPitch];
  alignas(16) __shared__ F tile_b[kDepth][kPitch];
  const int64_t tiles = ceil_div(cols, kTile);
  const int64_t row = blockIdx.x / tiles * kTile, col = blockIdx.x % tiles * kTile;
  const int i0 = threadIdx.x / (kTile / kMicro) * kMicro, j0 = threadIdx.x % (kTile / kMicro) * kMicro;

  F sum[kMicro][kMicro] = {};
  for (int64_t outer = 0; outer < depth; outer += kPartialDepth) {
    F partial[kMicro][kMicro] = {};
    for (int64_t d = outer; d < depth && d < outer + kPartialDepth; d += kDepth) {
      load_tile(tile_a, a, row, rows, d, depth);
      load_tile(tile_b, b, col, cols, d, depth);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kDepth; ++k)
        for (int i = 0; i < kMicro; ++i)
          for (int j = 0; j < kMicro; ++j) partial[i][j] += tile_a[k][i0 + i] * tile_b[k][j0 + j];
      __syncthreads();  // before the next step overwrites the tiles
    }
#pragma unroll
    for (int i = 0; i < kMicro; ++i)
      for (int j = 0; j < kMicro; ++j) sum[i][j] += partial[i][j];
  }
  const int64_t live = cols - col - j0;
  if (live <= 0) return;
#pragma unroll  // or sum would have to live in memory
  for (int i = 0; i < kMicro; ++i) {
    if (row + i0 + i >= rows) break;
    Four<F> values;
#pragma unroll
    for (int j = 0; j < kMicro; ++j) values.v[j] = sum[i][j];
    epilogue(row + i0 + i, col + j0, values, live < kMicro ? int(live) : kMicro);
  }
}

constexpr int kSumCols = 32, kSumRows = kThreads / kSumCols;  // of a block; a warp reads 32 neighbouring columns
constexpr int kSumChunk = 16;                                 // values summed before they are added to the result

// out(j) = sum over i < rows of x(i, j)
template <class F, class Out>
__global__ void __launch_bounds__(kThreads) column_sums_kernel(Out* out, const F* x, int64_t rows, int64_t cols) {
  __shared__ F sums[kSumRows][kSumCols];
  const int lane = threadIdx.x % kSumCols, first = threadIdx.x / kSumCols;
  const int64_t j = int64_t(blockIdx.x) * kSumCols + lane;
  F sum = 0;
  for (int64_t outer = first; j < cols && outer < rows; outer += kSumChunk * kSumRows) {
    F partial = 0;
    for (int64_t i = outer; i < rows && i < outer + kSumChunk * kSumRows; i += kSumRows) partial += x[i * cols + j];
    sum += partial;
  }
  sums[first][lane] = sum;
  __syncthreads();
  if (first != 0 || j >= cols) return;
  for (int i = 1; i < kSumRows; ++i) sum += sums[i][lane];
  out[j] = from_float<Out>(sum);
}

// ---- launchers

template <class F, class A, class B, class Epilogue>
void product(const A& a, const B& b, const Epilogue& epilogue, int64_t rows, int64_t cols, int64_t depth,
             Stream stream) {
  const dim3 grid = grid_of(ceil_div(rows, kTile) * ceil_div(cols, kTile));
  launch(product_kernel<F, A, B, Epilogue>, grid, kThreads, 0, stream, a, b, epilogue, rows, cols, depth);
}

}  // namespace

template <class T, class W>
void linear_act_forward(const LinearActForward<T, W>& p, Stream stream) {
  if constexpr (kTensorCores<T>)
    gemm_forward(p, stream);
  else
    product<T>(Matrix<T, false>{p.x, p.K}, Matrix<W, false>{p.w, p.K}, BiasActivation<T, W>{p}, p.M, p.N, p.K, stream);
}

template <class T, class W>
void linear_act_backward(const LinearActBackward<T, W>& p, Stream stream) {
  if (p.z && (p.y || p.dz))
    launch(grad_preact_kernel<T>, grid_of(ceil_div(p.M * p.N, kThreads * kWidth<T>)), kThreads, 0, stream, p.dz, p.y,
           p.dy, p.z, p.M * p.N, p.activation, aligned(p.dz, p.y, p.dy, p.z));
  if constexpr (kTensorCores<T>) {
    gemm_backward(p, stream);
  } else {
    const T* const dz = p.z ? p.dz : p.dy;
    if (p.dx)
      product<T>(Matrix<T, false>{dz, p.N}, Matrix<W, true>{p.w, p.K}, GradInput<T, W>{p}, p.M, p.K, p.N, stream);
    if (p.dw)
      product<T>(Matrix<T, true>{dz, p.N}, Matrix<T, true>{p.x, p.K}, Store<W>{p.dw, p.K}, p.N, p.K, p.M, stream);
    if (p.db)
      launch(column_sums_kernel<T, W>, grid_of(ceil_div(p.N, kSumCols)), kThreads, 0, stream, p.db, dz, p.M, p.N);
  }
}

#define FASTFT_X(suffix, T, W)                                                   \
  template void linear_act_forward<T, W>(const LinearActForward<T, W>&, Stream); \
  template void linear_act_backward<T, W>(const LinearActBackward<T, W>&, Stream);
FASTFT_CUDA_DTYPES(FASTFT_X)
#undef FASTFT_X

}  // namespace fastft::cuda
