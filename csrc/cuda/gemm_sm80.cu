// linear_act of bf16 and f16 on tensor cores (mma.sync, sm_80 and later):  z = x w^T + b,  y = act(z);
// backward:  dz = dy act'(z),  dx = dz w + add,  dw = dz^T x,  db = sum over rows of dz
//   x, dx (M, K)    w, dw (N, K)    b, db (N)    y, z, dy, dz (M, N)
// One kernel makes each of the three as c(i, j) = sum over d of a(i, d) b(j, d), for operands whose rows lie along d or
// across it. Sums are fp32, in an order that depends on sizes only, rounded once, at the store.
//
// Work: 2 M N K FLOPs each; bytes: both operands once if L2 holds them (FFN1 of BERT-base at 4096 rows: 19.3 GFLOP and
// 36 MB, 24 us at 800 TFLOP/s and 12 us at 3 TB/s). dz is made in the epilogue of the product before, where this layer's y is
// the x of a linear layer: dx, times act'(z), and y again, for the gradient of that layer's weight; elsewhere by a pass of its
// own (linear_act.cu). db costs no pass: the blocks of dw's first column of tiles multiply the tiles of dz that they hold by
// ones, too.
//
// Tile 128 x 128 x 32, four warps of 64 x 64: a warp reads 4 KB of fragments for 32 products of 16 x 8 x 16, i.e. 32
// cycles of shared memory (128 bytes each) for 64 cycles of an A100's tensor cores; 64 x 32 would make them 24 for 32.
// 128 accumulators a thread fit 255 registers without spills. A stage takes 20 KB; four of them, 80 KB, let two blocks
// run on an SM (164 KB on sm_80, 228 on sm_90; one block where there are 100), so that one's epilogue runs during the
// other's products. Rows of tiles are padded by 16 bytes, so that the eight rows of an ldmatrix lie in different banks.
// Waves at T = 4096, two blocks on each of 132 SMs (108): out-projection 192 tiles 73 % (89), QKV 576 73 % (89),
// FFN1 768 97 % (89), FFN2 192 73 % (89), dw 768 x 768 36 tiles 14 % (17), 3072 x 768 144 55 % (67). So dw is split along
// the rows where that pays for the partial sums' way through memory: linear_act.py counts both.
//
// Any size: an operand whose rows do not start at multiples of 16 bytes is read element by element into the same tiles.
// fp32 stays on the kernel of linear_act.cu, since tf32 would change numbers. Not yet run on a GPU.

#include "activation.cuh"
#include "gemm_sm80.cuh"
#include "tile_sm80.cuh"

namespace fastft::cuda {
namespace {

constexpr int kTile = 128;                          // rows and columns of c per block
constexpr int kDepth = 32;                          // of a step
constexpr int kStages = 4;                          // steps that are in shared memory or on their way
constexpr int kWarpTile = 64;                       // rows and columns per warp
constexpr int kThreads = 128;                       // 2 x 2 warps
constexpr int kPitchAlong = tile_pitch(kDepth);     // of a tile (kTile, kDepth), elements
constexpr int kPitchAcross = tile_pitch(kTile);     // of a tile (kDepth, kTile)
constexpr int kTileElements = kTile * kPitchAlong;  // the larger of the two
constexpr int kPitchSums = kTile + 8;               // of c in fp32; quarters of a warp store to different banks
constexpr size_t kShared = kStages * 2 * kTileElements * 2;  // bytes
static_assert(kTile * kPitchSums * sizeof(float) <= kShared, "c takes the place of the stages");

// ---- operands

// The matrix (rows, depth) that is an operand; kAcross: stored as (depth, rows).
template <class T, bool kAcross>
struct Operand {
  const T* data;
  int64_t rows, depth;
  int64_t stride;  // elements from one stored row to the next
  bool chunks;     // whether the rows that are stored start at multiples of 16 bytes

  Operand(const T* data, int64_t rows, int64_t depth)
      : data(data), rows(rows), depth(depth), stride(kAcross ? rows : depth) {
    chunks = in_chunks(data, stride);
  }
};

// Starts to bring the tile of rows from `row` and of depth from `from`, zeros from depth `end` on.
template <class T, bool kAcross>
__device__ void load(T* tile, const Operand<T, kAcross>& x, int64_t row, int64_t from, int64_t end) {
  if constexpr (kAcross)
    load_tile<kDepth, kTile, kThreads>(tile, x.data + from * x.stride + row, x.stride, end - from, x.rows - row,
                                       x.chunks);
  else
    load_tile<kTile, kDepth, kThreads>(tile, x.data + row * x.stride + from, x.stride, x.rows - row, end - from,
                                       x.chunks);
}

template <bool kAcross>
constexpr int kPitch = kAcross ? kPitchAcross : kPitchAlong;

// The pointer, if it is one to a To; else null.
template <class To, class From>
To* as(From* pointer) {
  if constexpr (std::is_same_v<To, From>)
    return pointer;
  else
    return nullptr;
}

// ---- the activation table, which takes half a chunk a call

constexpr int kHalf = kChunk / 2;
template <class Function>
__device__ void by_halves(float (&values)[kChunk], const Function& function) {
#pragma unroll
  for (int half = 0; half < kChunk; half += kHalf) {
    Values<float, kHalf> part;
#pragma unroll
    for (int e = 0; e < kHalf; ++e) part.v[e] = values[half + e];
    part = function(part);
#pragma unroll
    for (int e = 0; e < kHalf; ++e) values[half + e] = part.v[e];
  }
}

// ---- epilogues: columns(split, j, live) gives what takes a row i of c, `live` neighbours of it from column j on.
// Parameters may be of T or of float: two pointers, as another type would double the kernels.

template <class T>
struct BiasActivation {
  static constexpr bool kRowSums = false;
  T* y;
  T* z;        // or null
  const T* b;  // this or the next, or none of both
  const float* b32;
  int64_t stride;
  int activation;
  bool chunks;

  template <class W>
  explicit BiasActivation(const LinearActForward<T, W>& p)
      : y(p.y),
        z(p.z),
        b(as<const T>(p.b)),
        b32(as<const float>(p.b)),
        stride(p.N),
        activation(p.activation),
        chunks(in_chunks(p.y, p.N) && in_chunks(p.z, p.N)) {}

  __device__ auto columns(int, int64_t j, int live) const {
    Values<float, kChunk> bias = {};
    if (b) read(bias.v, b + j, live, false);
    if (b32) read(bias.v, b32 + j, live, false);
    return [this, bias, j, live](int64_t i, float (&c)[kChunk]) {
#pragma unroll
      for (int e = 0; e < kChunk; ++e) c[e] += bias.v[e];
      if (z) write(z + i * stride + j, c, live, chunks);
      if (activation != kIdentity) by_halves(c, [&](auto part) { return activation_of(activation, part); });
      write(y + i * stride + j, c, live, chunks);
    };
  }
};

// dx, or where x was an activation's the gradient of what that was made of.
template <class T>
struct GradInput {
  static constexpr bool kRowSums = false;
  T* dx;
  const T* add;  // or null
  const T* z;    // x_preact or null
  T* x;          // or null
  int64_t stride;
  int activation;
  bool chunks;

  template <class W>
  explicit GradInput(const LinearActBackward<T, W>& p)
      : dx(p.dx),
        add(p.add),
        z(p.x_preact),
        x(p.x_again),
        stride(p.K),
        activation(p.x_activation),
        chunks(in_chunks(dx, stride) && in_chunks(add, stride) && in_chunks(z, stride) && in_chunks(x, stride)) {}

  __device__ auto columns(int, int64_t j, int live) const {
    return [this, j, live](int64_t i, float (&c)[kChunk]) {
      const int64_t at = i * stride + j;
      if (add) {
        float more[kChunk];
        read(more, add + at, live, chunks);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) c[e] += more[e];
      }
      if (z) {
        float of_z[kChunk], factor[kChunk];
        read(of_z, z + at, live, chunks);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) factor[e] = of_z[e];
        by_halves(factor, [&](auto part) { return derivative_of(activation, part); });
#pragma unroll
        for (int e = 0; e < kChunk; ++e) c[e] *= factor[e];
        if (x) {
          by_halves(of_z, [&](auto part) { return activation_of(activation, part); });
          write(x + at, of_z, live, chunks);
        }
      }
      write(dx + at, c, live, chunks);
    };
  }
};

// dw (N, K) and db (N), each may be null; or partial sums of split s in place of both: (N, K) and behind it (N).
template <class T>
struct GradWeight {
  static constexpr bool kRowSums = true;
  T* dw;
  float* dw32;
  T* db;
  float* db32;
  float* partial;
  int64_t N, K;
  bool chunks;

  template <class W>
  GradWeight(W* dw, W* db, float* partial, int64_t N, int64_t K)
      : dw(as<T>(dw)),
        dw32(as<float>(dw)),
        db(as<T>(db)),
        db32(as<float>(db)),
        partial(partial),
        N(N),
        K(K),
        chunks(in_chunks(dw, K)) {}

  __device__ bool sums_rows() const { return db || db32; }
  __device__ float* of_split(int split) const { return partial + split * (N * K + N); }

  __device__ auto columns(int split, int64_t j, int live) const {
    return [this, split, j, live](int64_t i, float (&c)[kChunk]) {
      const int64_t at = i * K + j;
      if (partial && (dw || dw32))
        write(of_split(split) + at, c, live, false);
      else if (dw)
        write(dw + at, c, live, chunks);
      else if (dw32)
        write(dw32 + at, c, live, chunks);
    };
  }
  __device__ void row_sum(int split, int64_t i, float sum) const {
    if (partial)
      of_split(split)[N * K + i] = sum;
    else if (db)
      db[i] = from_float<T>(sum);
    else
      db32[i] = sum;
  }
};

// ---- kernels

template <class T, bool kAcrossA, bool kAcrossB, class Epilogue>
__global__ void __launch_bounds__(kThreads, 2)
    product_kernel(Operand<T, kAcrossA> a, Operand<T, kAcrossB> b, Epilogue epilogue, int64_t split_depth) {
  const int64_t cols = ceil_div(b.rows, kTile), tiles = cols * ceil_div(a.rows, kTile);
  const int split = int(blockIdx.x / tiles);
  const int64_t tile = blockIdx.x % tiles, row = tile / cols * kTile, col = tile % cols * kTile;
  const int64_t begin = split * split_depth, end = begin + split_depth < a.depth ? begin + split_depth : a.depth;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int row0 = warp / 2 * kWarpTile, col0 = warp % 2 * kWarpTile;
  T* const shared = reinterpret_cast<T*>(dynamic_shared());
  const auto start = [&](int64_t step) {
    const int64_t from = begin + step * kDepth;
    T* const stage = shared + step % kStages * (2 * kTileElements);
    if (from < end) {
      load(stage, a, row, from, end);
      load(stage + kTileElements, b, col, from, end);
    }
    cp_async_commit();  // an empty group keeps the count
  };

  float c[kWarpTile / 16][kWarpTile / 8][4] = {};
  bool sums_rows = false;
  float row_sums[Epilogue::kRowSums ? kWarpTile / 16 : 1][4] = {};
  if constexpr (Epilogue::kRowSums) sums_rows = epilogue.sums_rows() && col == 0 && col0 == 0;

  for (int step = 0; step < kStages - 1; ++step) start(step);
  const int64_t steps = end > begin ? ceil_div(end - begin, kDepth) : 0;
  for (int64_t step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this step's tiles are there, and the last step's have been read
    start(step + kStages - 1);
    const T* const tile_a = shared + step % kStages * (2 * kTileElements);
    const T* const tile_b = tile_a + kTileElements;
#pragma unroll
    for (int d = 0; d < kDepth; d += 16) {
      uint32_t of_a[kWarpTile / 16][4], of_b[kWarpTile / 16][4];
#pragma unroll
      for (int i = 0; i < kWarpTile / 16; ++i) load_a<kPitch<kAcrossA>, kAcrossA>(of_a[i], tile_a, row0 + 16 * i, d);
#pragma unroll
      for (int j = 0; j < kWarpTile / 16; ++j) load_b<kPitch<kAcrossB>, kAcrossB>(of_b[j], tile_b, col0 + 16 * j, d);
#pragma unroll
      for (int i = 0; i < kWarpTile / 16; ++i)
#pragma unroll
        for (int j = 0; j < kWarpTile / 16; ++j) mma_pair<T>(c[i][2 * j], c[i][2 * j + 1], of_a[i], of_b[j]);
      if constexpr (Epilogue::kRowSums) {
        if (sums_rows) {
          const uint32_t one = from_float<T>(1.f).bits, ones = one | one << 16;
#pragma unroll
          for (int i = 0; i < kWarpTile / 16; ++i) mma_m16n8k16<T>(row_sums[i], of_a[i], {ones, ones});
        }
      }
    }
  }

  if constexpr (Epilogue::kRowSums) {
    if (sums_rows && lane % 4 == 0) {  // all columns of ones are the same
#pragma unroll
      for (int i = 0; i < kWarpTile / 16; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t at = row + row0 + 16 * i + 8 * half + lane / 4;
          if (at < a.rows) epilogue.row_sum(split, at, row_sums[i][2 * half]);
        }
    }
  }
  // Through shared memory, so that a row is stored in whole lines.
  cp_async_wait<0>();
  __syncthreads();
  float* const sums = reinterpret_cast<float*>(dynamic_shared());
#pragma unroll
  for (int i = 0; i < kWarpTile / 16; ++i)
#pragma unroll
    for (int j = 0; j < kWarpTile / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const to = sums + (row0 + 16 * i + 8 * half + lane / 4) * kPitchSums + col0 + 8 * j + lane % 4 * 2;
        to[0] = c[i][j][2 * half], to[1] = c[i][j][2 * half + 1];
      }
  __syncthreads();
  constexpr int kAcross = kTile / kChunk;
  const int64_t j = col + threadIdx.x % kAcross * kChunk;
  if (j >= b.rows) return;
  const int live = b.rows - j < kChunk ? int(b.rows - j) : kChunk;
  const auto store = epilogue.columns(split, j, live);
#pragma unroll 1
  for (int r = threadIdx.x / kAcross; r < kTile && row + r < a.rows; r += kThreads / kAcross) {
    float values[kChunk];
    read(values, sums + r * kPitchSums + threadIdx.x % kAcross * kChunk, kChunk, true);
    store(row + r, values);
  }
}

// out[i] = sum over the splits of partial[split * stride + i], in their order
template <class W>
__global__ void __launch_bounds__(kThreads)
    add_splits_kernel(W* out, const float* partial, int64_t n, int64_t stride, int splits) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  float sum = 0;
  for (int split = 0; split < splits; ++split) sum += partial[split * stride + i];
  out[i] = from_float<W>(sum);
}

// ---- launchers

template <class T, bool kAcrossA, bool kAcrossB, class Epilogue>
void product(const Operand<T, kAcrossA>& a, const Operand<T, kAcrossB>& b, const Epilogue& epilogue, int64_t splits,
             Stream stream) {
  const int64_t split_depth = ceil_div(ceil_div(a.depth, splits), kDepth) * kDepth;
  const dim3 grid = grid_of(ceil_div(a.rows, kTile) * ceil_div(b.rows, kTile) * splits);
  launch(product_kernel<T, kAcrossA, kAcrossB, Epilogue>, grid, kThreads, kShared, stream, a, b, epilogue, split_depth);
}

}  // namespace

template <class T, class W>
void gemm_forward(const LinearActForward<T, W>& p, Stream stream) {
  product(Operand<T, false>(p.x, p.M, p.K), Operand<T, false>(p.w_low ? p.w_low : as<const T>(p.w), p.N, p.K),
          BiasActivation<T>(p), 1, stream);
}

template <class T, class W>
void gemm_backward(const LinearActBackward<T, W>& p, Stream stream) {
  const T* const dz = p.z ? p.dz : p.dy;
  if (p.dx)
    product(Operand<T, false>(dz, p.M, p.N), Operand<T, true>(p.w_low ? p.w_low : as<const T>(p.w), p.K, p.N),
            GradInput<T>(p), 1, stream);
  if (!p.dw && !p.db) return;
  W* const dw = p.K ? p.dw : nullptr;
  // Without dw the first column of tiles is enough, of which only the sums count.
  product(Operand<T, true>(dz, p.N, p.M), Operand<T, true>(dw ? p.x : dz, dw ? p.K : 1, p.M),
          GradWeight<T>(dw, p.db, p.partial, p.N, p.K), p.splits, stream);
  if (!p.partial) return;
  const int64_t stride = p.N * p.K + p.N;
  if (dw)
    launch(add_splits_kernel<W>, grid_of(ceil_div(p.N * p.K, kThreads)), kThreads, 0, stream, dw, p.partial, p.N * p.K,
           stride, int(p.splits));
  if (p.db)
    launch(add_splits_kernel<W>, grid_of(ceil_div(p.N, kThreads)), kThreads, 0, stream, p.db, p.partial + p.N * p.K,
           p.N, stride, int(p.splits));
}

#define FASTFT_X(T, W)                                                     \
  template void gemm_forward<T, W>(const LinearActForward<T, W>&, Stream); \
  template void gemm_backward<T, W>(const LinearActBackward<T, W>&, Stream);
FASTFT_X(bf16, bf16) FASTFT_X(bf16, float) FASTFT_X(f16, f16) FASTFT_X(f16, float)
#undef FASTFT_X

}  // namespace fastft::cuda
