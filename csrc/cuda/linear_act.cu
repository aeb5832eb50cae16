// Fused linear layer and activation:  z = x w^T + b,  y = act(z);
// backward:  dz = dy act'(z),  dx = dz w,  dw = dz^T x,  db = sum over rows of dz
//   x (M, K) T    w (N, K), b (N) W    y, z, dy (M, N) T.   z is stored for the backward, nothing else.
// bf16 and f16 are gemm_sm80.cu's; this is fp32, whose numbers tf32 would change, and fp64.
// Floor: 2 M N K FLOPs for each product, on the FMA units.
// One kernel makes all three products. It reads its operands through accessors, one of which computes dz as it is read
// (ceil(K / 64) times each element for dx and again for dw), so that no workspace is needed; it stores through an
// epilogue. Sums are fp32 (fp64 for fp64), in an order that depends on sizes only, rounded once, at the store.
#include "activation.cuh"
#include "gemm_sm80.cuh"

namespace fastft::cuda {
namespace {

constexpr int kTile = 64;   // rows and columns of the result per block
constexpr int kDepth = 16;  // of a step: 2 operands x 16 x 68 x 8 bytes = 17 kB of shared memory in fp64
constexpr int kThreads = 256;
constexpr int kMicro = 4;           // rows and columns of the result per thread: 16 x 16 threads
constexpr int kPitch = kTile + 4;   // rows stay 16-byte aligned; 4 banks apart, so that stores along the depth spread
constexpr int kPartialDepth = 128;  // products in a partial sum: a single sum over K = 3072 has 4x the error

// One value of the table.
template <class F>
__device__ F activation_of(int activation, F z) {
  return activation_of(activation, Values<F, 1>{{z}}).v[0];
}
template <class F>
__device__ F derivative_of(int activation, F z) {
  return derivative_of(activation, Values<F, 1>{{z}}).v[0];
}

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

template <class T, bool kTransposed>
struct GradPreact {  // dz = dy act'(z)
  static constexpr bool kDepthContiguous = !kTransposed;
  const T* dy;
  const T* z;  // null: identity
  int64_t stride;
  int activation;

  __device__ Compute<T> operator()(int64_t i, int64_t d) const {
    const int64_t at = kTransposed ? d * stride + i : i * stride + d;
    return z ? to_float(dy[at]) * derivative_of(activation, to_float(z[at])) : to_float(dy[at]);
  }
};

// ---- epilogues: what becomes of element (i, j) of a product

template <class T, class W>
struct BiasActivation {
  LinearActForward<T, W> p;

  __device__ void operator()(int64_t i, int64_t j, Compute<T> z) const {
    if (p.b) z += Compute<T>(to_float(p.b[j]));
    if (p.z) p.z[i * p.N + j] = from_float<T>(z);
    p.y[i * p.N + j] = from_float<T>(p.activation == kIdentity ? z : activation_of(p.activation, z));
  }
};

template <class Out>
struct Store {
  Out* out;
  const Out* add;  // or null
  int64_t stride;

  template <class F>
  __device__ void operator()(int64_t i, int64_t j, F value) const {
    const int64_t at = i * stride + j;
    out[at] = from_float<Out>(add ? value + F(to_float(add[at])) : value);
  }
};

// dz = dy act'(z) and y = act(z), each of which may be null
template <class T>
__global__ void grad_preact_kernel(T* dz, T* y, const T* dy, const T* z, int64_t n, int activation) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  if (dz) dz[i] = dy[i] * derivative_of(activation, z[i]);
  if (y) y[i] = activation_of(activation, z[i]);
}

// ---- kernels

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

// epilogue(i, j, sum over d < depth of a(i, d) b(j, d)) for i < rows, j < cols.
template <class F, class A, class B, class Epilogue>
__global__ void __launch_bounds__(kThreads)
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
#pragma unroll  // or sum would have to live in memory
  for (int i = 0; i < kMicro; ++i)
#pragma unroll
    for (int j = 0; j < kMicro; ++j)
      if (row + i0 + i < rows && col + j0 + j < cols) epilogue(row + i0 + i, col + j0 + j, sum[i][j]);
}

constexpr int kSumCols = 32, kSumRows = kThreads / kSumCols;  // of a block; a warp reads 32 neighbouring columns
constexpr int kSumChunk = 16;                                 // values summed before they are added to the result

// out(j) = sum over i < rows of x(i, j)
template <class F, class X, class Out>
__global__ void __launch_bounds__(kThreads) column_sums_kernel(Out* out, X x, int64_t rows, int64_t cols) {
  __shared__ F sums[kSumRows][kSumCols];
  const int lane = threadIdx.x % kSumCols, first = threadIdx.x / kSumCols;
  const int64_t j = int64_t(blockIdx.x) * kSumCols + lane;
  F sum = 0;
  for (int64_t outer = first; j < cols && outer < rows; outer += kSumChunk * kSumRows) {
    F partial = 0;
    for (int64_t i = outer; i < rows && i < outer + kSumChunk * kSumRows; i += kSumRows) partial += x(i, j);
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
  if constexpr (kTensorCores<T>) {
    gemm_backward(p, stream);
  } else {
    const GradPreact<T, false> dz{p.dy, p.z, p.N, p.activation};
    const GradPreact<T, true> dz_transposed{p.dy, p.z, p.N, p.activation};
    if (p.dx) product<T>(dz, Matrix<W, true>{p.w, p.K}, Store<T>{p.dx, p.add, p.K}, p.M, p.K, p.N, stream);
    if (p.dw) product<T>(dz_transposed, Matrix<T, true>{p.x, p.K}, Store<W>{p.dw, nullptr, p.K}, p.N, p.K, p.M, stream);
    if (p.z && (p.y || p.dz))
      launch(grad_preact_kernel<T>, grid_of(ceil_div(p.M * p.N, kThreads)), kThreads, 0, stream, p.dz, p.y, p.dy, p.z,
             p.M * p.N, p.activation);
    if (p.db) {
      const dim3 grid = grid_of(ceil_div(p.N, kSumCols));
      launch(column_sums_kernel<T, GradPreact<T, false>, W>, grid, kThreads, 0, stream, p.db, dz, p.M, p.N);
    }
  }
}

#define FASTFT_X(suffix, T, W)                                                   \
  template void linear_act_forward<T, W>(const LinearActForward<T, W>&, Stream); \
  template void linear_act_backward<T, W>(const LinearActBackward<T, W>&, Stream);
FASTFT_CUDA_DTYPES(FASTFT_X)
#undef FASTFT_X

}  // namespace fastft::cuda
