// Attention of bf16 and f16 on tensor cores (mma.sync, sm_80 and later), heads of at most 128 elements; formulas and what
// is summed where are in cpu/attention.cpp. Never a matrix of scores in memory.
//   forward: an online softmax over tiles of keys (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao 2023,
//     arXiv:2307.08691). A block has 64 queries, a warp 16 of them, whose scores become the operand of the second product
//     in the registers they are in.
//   dq: the same over keys, twice: the sum of p dp over a row first, then ds = p (dp - it).
//   dk and dv: a block has 64 keys and goes over the queries; scores are made transposed, so that both gradients stay in
//     registers. No atomics: the same bits every time.
// Work: 4 S D FLOPs a query forward, 20 S D backward (5 products of two kernels would be 14 if the output were at hand,
// 10 with atomics). BERT-base at (32, 128): 1.6 GFLOP a layer forward and 25 MB, 8 us at 3 TB/s: memory's floor.
// Shared memory at D <= 64 (128): forward 63 (69) KB, dq 72 (86), dk and dv 74 (87): it fits the 99 KB of sm_86 and 89.
//
// Dropout: one call gives the numbers of keys 16 apart in a group of 128 (philox.h). In the forward and for dq a thread
// holds two rows and the keys 2t, 2t + 1, 2t + 8, 2t + 9 modulo 16, so that its 8 calls serve 128 keys; for dk and dv the
// block draws for 64 queries and shares the bits. 1/4 (1/2) call an element. Not yet run on a GPU.
#include <cassert>

#include "attention.cuh"
#include "philox.h"
#include "tile_sm80.cuh"

namespace fastft::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;  // of queries per block, and of the keys that pass; the other way round for dk and dv
template <int kHead>
constexpr int kStages = kHead <= 64 ? 2 : 1;  // tiles of keys and values that are there or on their way
template <int kHead>
constexpr int kQueriesOf = kHead <= 64 ? 64 : 32;  // of a tile for dk and dv; more would not fit the registers
constexpr float kInfinity = HUGE_VALF;

// Which tensors are read and written 16 bytes at a time.
struct InChunks {
  bool q, k, v, o, dy, dq, dk, dv;

  template <class Args>
  explicit InChunks(const Args& p) : q(), k(), v(), o(), dy(), dq(), dk(), dv() {
    q = in_chunks(p.q, p.D, p.q_batch, p.q_head, p.q_token);
    k = in_chunks(p.k, p.D, p.k_batch, p.k_head, p.k_token);
    v = in_chunks(p.v, p.D, p.v_batch, p.v_head, p.v_token);
  }
};

// Starts to bring a tile of keys and one of values, from row j on.
template <int kHead, class T, class Args>
__device__ void load_keys(T* of_k, T* of_v, const Args& p, const Sequence& at, int64_t j, InChunks chunks) {
  load_tile<kRows, kHead, kThreads>(of_k, at.key(p, p.k, p.k_batch, p.k_head, p.k_token, j), p.k_token, at.keys - j,
                                    p.D, chunks.k);
  load_tile<kRows, kHead, kThreads>(of_v, at.key(p, p.v, p.v_batch, p.v_head, p.v_token, j), p.v_token, at.keys - j,
                                    p.D, chunks.v);
}

// exp(x) for x <= 0, or hardly above: good to what T keeps of it
template <class T>
__device__ float exp_of_score(float x) {
  const float y = exp_times<std::is_same_v<T, bf16>>(x < -86.f ? -86.f : x, 1.f);
  return x < -86.f ? 0.f : y;
}

// Whether masking a tile of keys up to `key_end` does nothing.
template <class Args>
__device__ bool is_plain(const Args& p, const Sequence& at, int64_t key_end) {
  return !p.keep && !p.bias && !p.causal && key_end <= at.keys;
}

constexpr int kMaskPitch = kRows + 8;  // of the tile below; quarters of a warp read from different banks
constexpr int kMaskTile = kRows * kMaskPitch;

// What is added to the scores of a tile (kRows, kColumns) that begins with query i and key j, -infinity where they are
// masked. By way of shared memory: the code for each of a thread's scores would be most of a kernel.
// kKeysDown: rows are keys, columns queries.
template <bool kKeysDown, int kColumns, class Args>
__device__ void write_mask(float* tile, const Args& p, const Sequence& at, int64_t i, int64_t j, bool float_bias) {
#pragma unroll 1
  for (int n = threadIdx.x; n < kRows * kColumns; n += kThreads) {
    const int row = n / kColumns, column = n % kColumns;
    const int64_t query = i + (kKeysDown ? column : row), key = j + (kKeysDown ? row : column);
    const int64_t place = at.b * p.mask_batch + at.h * p.mask_head + query * p.mask_query + key * p.mask_key;
    const bool seen = query < at.queries && key < at.keys && !(p.causal && key > query) && (!p.keep || p.keep[place]);
    float add = seen ? 0.f : -kInfinity;
    if (seen && p.bias) add = bias_at<float>(p.bias, place, float_bias);
    tile[row * kMaskPitch + column] = add;
  }
}

// Products q k^T of a warp, from `row` of the tile on, become scores.
template <int kTiles>
__device__ void finish_scores(float (&s)[kTiles][4], float scale, bool plain, const float* mask, int row) {
  const int lane = threadIdx.x % kWarp;
  const float* const from = mask + (row + lane / 4) * kMaskPitch + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[j][e] *= scale;
      if (plain) continue;
      const float add = from[e / 2 * 8 * kMaskPitch + 8 * j + e % 2];
      s[j][e] = add == -kInfinity ? add : s[j][e] + add;
    }
}

// Of the keys k + 16 s for s = 0..7, where k = group * 128 + lane: bit s tells whether it is kept.
template <class Args>
__device__ uint32_t kept_keys(const Args& p, int64_t row, int64_t group, int lane) {
  const int64_t first = row * dropout_pitch(p.Sk) + group * kDropoutGroup;
  const DropoutCall call(*p.seed, p.use, dropout_call(first) + lane);
  uint32_t bits = 0;
#pragma unroll
  for (int slot = 0; slot < 8; ++slot) bits |= uint32_t(int64_t(call.number(slot)) >= p.threshold) << slot;
  return bits >> dropout_slot(first);
}

// Those of one row for the keys 2t, 2t + 1, 2t + 8, 2t + 9 modulo 16: a byte each.
template <class Args>
__device__ uint32_t kept_of_row(const Args& p, int64_t row, int64_t group) {
  const int lane = threadIdx.x % 4 * 2;
  uint32_t bytes = 0;
#pragma unroll 1  // ten rounds are code enough
  for (int e = 0; e < 4; ++e) bytes |= kept_keys(p, row, group, lane + e % 2 + e / 2 * 8) << 8 * e;
  return bytes;
}
// Whether column 8 tile + 2t + odd of 64 keys is kept; `half`: of the group they are in.
__device__ inline bool is_kept(uint32_t bytes, int tile, int odd, int half) {
  return bytes >> (8 * (tile % 2 * 2 + odd) + half * 4 + tile / 2) & 1;
}

// sums (16, 8 kTiles) += a b^T over a depth of D <= kHead; rows of both lie along the depth.
template <class T, int kHead, int kTiles>
__device__ void multiply(float (&sums)[kTiles][4], const T* a, const T* b, int row, int64_t D) {
#pragma unroll
  for (int d = 0; d < kHead; d += 16) {
    if (d >= D) break;
    uint32_t of_a[4];
    load_a<tile_pitch(kHead), false>(of_a, a, row, d);
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      uint32_t of_b[4];
      load_b<tile_pitch(kHead), false>(of_b, b, 8 * j, d);
      mma_pair<T>(sums[j], sums[j + 1], of_a, of_b);
    }
  }
}

// sums (16, kHead) += w x, with w (16, 8 kTiles) in the registers that products left it in, and x (8 kTiles, kHead).
template <class T, int kHead, int kTiles>
__device__ void add_rows(float (&sums)[kHead / 8][4], const float (&w)[kTiles][4], const T* x, int64_t D) {
#pragma unroll
  for (int k = 0; k < kTiles; k += 2) {
    const uint32_t of_w[4] = {pack<T>(w[k][0], w[k][1]), pack<T>(w[k][2], w[k][3]), pack<T>(w[k + 1][0], w[k + 1][1]),
                              pack<T>(w[k + 1][2], w[k + 1][3])};
#pragma unroll
    for (int d = 0; d < kHead; d += 16) {
      if (d >= D) break;
      uint32_t of_x[4];
      load_b<tile_pitch(kHead), true>(of_x, x, d, 8 * k);
      mma_pair<T>(sums[d / 8], sums[d / 8 + 1], of_w, of_x);
    }
  }
}

// Stores a warp's 16 rows, each times a factor, by way of 16 rows of a tile that no other warp looks at.
template <class T, int kHead>
__device__ void store_rows(T* tile, const float (&sums)[kHead / 8][4], float upper, float lower, T* out, int64_t stride,
                           int64_t rows, int64_t D, bool chunks) {
  constexpr int kPitch = tile_pitch(kHead), kAcross = kHead / kChunk;
  const int lane = threadIdx.x % kWarp;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kHead / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      tile[(lane / 4 + e / 2 * 8) * kPitch + 8 * j + lane % 4 * 2 + e % 2] =
          from_float<T>(sums[j][e] * (e / 2 ? lower : upper));
  __syncwarp();
  const int column = lane % kAcross * kChunk;
#pragma unroll
  for (int row = lane / kAcross; row < 16; row += kWarp / kAcross)
    if (row < rows && column < D)
      write(out + row * stride + column, *reinterpret_cast<const Chunk<T>*>(tile + row * kPitch + column),
            D - column < kChunk ? int(D - column) : kChunk, chunks);
}

// The block's head, and the first of its rows among `most`.
struct Part {
  int64_t b, h, first;

  template <class Args>
  __device__ Part(const Args& p, int64_t most) {
    const int64_t parts = ceil_div(most, kRows), head = blockIdx.x / parts;
    b = head / p.N, h = head % p.N, first = blockIdx.x % parts * kRows;
  }
};

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ inline float quad_max(float x) {
  x = Max()(x, __shfl_xor_sync(kAllLanes, x, 1));
  return Max()(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// ---- kernels

template <class T, int kHead>
__global__ void __launch_bounds__(kThreads, 2)
    tensor_forward_kernel(AttentionForward<T, T> p, bool float_bias, InChunks chunks) {
  constexpr int kTile = kRows * tile_pitch(kHead);
  const Part part(p, p.Sq);
  const Sequence at(p, part.b, part.h);
  const int64_t first = part.first;
  if (first >= at.queries) return;  // the whole block
  float* const mask = reinterpret_cast<float*>(dynamic_shared());
  T* const of_q = reinterpret_cast<T*>(mask + kMaskTile);
  T* const of_k = of_q + kTile;
  T* const of_v = of_k + kStages<kHead> * kTile;
  const auto start = [&](int64_t tile) {
    const int64_t j = tile * kRows;
    const int at_tile = int(tile % kStages<kHead>) * kTile;
    load_keys<kHead>(of_k + at_tile, of_v + at_tile, p, at, j, chunks);
    cp_async_commit();
  };
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t i0 = first + 16 * warp + lane / 4;  // and i0 + 8: this thread's queries
  const int64_t last = first + kRows, seen = p.causal && last < at.keys ? last : at.keys;
  const int64_t tiles = ceil_div(seen, kRows);
  load_tile<kRows, kHead, kThreads>(of_q, at.query(p, p.q, p.q_batch, p.q_head, p.q_token, first), p.q_token,
                                    at.queries - first, p.D, chunks.q);
  if (tiles)
    start(0);
  else
    cp_async_commit();

  float o[kHead / 8][4] = {}, max[2] = {-kInfinity, -kInfinity}, sum[2] = {};
  uint32_t kept[2] = {};
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const bool plain = is_plain(p, at, tile * kRows + kRows);
    cp_async_wait<0>();
    __syncthreads();  // this tile is there, and the last one has been read
    if (kStages<kHead> == 2 && tile + 1 < tiles) start(tile + 1);
    if (!plain) {
      write_mask<false, kRows>(mask, p, at, first, tile * kRows, float_bias);
      __syncthreads();
    }
    const T* const keys = of_k + tile % kStages<kHead> * kTile;
    const T* const values = of_v + tile % kStages<kHead> * kTile;
    float s[kRows / 8][4] = {};
    multiply<T, kHead>(s, of_q, keys, 16 * warp, p.D);
    finish_scores(s, float(p.scale), plain, mask, 16 * warp);
    float shrink[2], base[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = max[half];
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j) top = Max()(Max()(top, s[j][2 * half]), s[j][2 * half + 1]);
      top = quad_max(top);
      base[half] = top == -kInfinity ? 0.f : top;  // nothing but masked keys so far
      shrink[half] = exp_of_score<T>(max[half] - base[half]);
      max[half] = top;
      float more = 0;
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          float& x = s[j][2 * half + odd];
          x = exp_of_score<T>(x - base[half]);
          more += x;
        }
      sum[half] = sum[half] * shrink[half] + more;
    }
#pragma unroll
    for (int d = 0; d < kHead / 8; ++d)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[d][e] *= shrink[e / 2];
    if (p.seed) {
      const int odd_tile = int(tile % 2);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (!odd_tile) kept[half] = kept_of_row(p, at.row + i0 + 8 * half, tile / 2);
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (!is_kept(kept[e / 2], j, e % 2, odd_tile)) s[j][e] = 0;
    }
    add_rows<T, kHead>(o, s, values, p.D);
    if (kStages<kHead> == 1) {
      __syncthreads();  // before the next tile overwrites this one
      if (tile + 1 < tiles) start(tile + 1);
    }
  }

  cp_async_wait<0>();
  __syncthreads();  // without tiles: before of_q is overwritten
  const float scale = p.seed ? float(dropout_scale(p.threshold)) : 1.f;
  float over_sum[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = quad_sum(sum[half]);
    const bool nothing = max[half] == -kInfinity;
    over_sum[half] = nothing ? 0.f : 1.f / total;
    const int64_t i = i0 + 8 * half;
    if (p.stats && lane % 4 == 0 && i < at.queries) {
      p.stats[at.row + i] = nothing ? 0.f : total == total ? max[half] : total;  // NaN where the backward is to give it
      p.stats[p.rows + at.row + i] = nothing ? 1.f : over_sum[half];
    }
  }
  const int64_t row = first + 16 * warp;
  store_rows<T, kHead>(of_q + 16 * warp * tile_pitch(kHead), o, over_sum[0] * scale, over_sum[1] * scale,
                       at.query(p, p.o, p.o_batch, p.o_head, p.o_token, row), p.o_token, at.queries - row, p.D,
                       chunks.o);
}

template <class T, int kHead>
__global__ void __launch_bounds__(kThreads, 2)
    tensor_grad_query_kernel(AttentionBackward<T, T> p, bool float_bias, InChunks chunks) {
  constexpr int kTile = kRows * tile_pitch(kHead);
  const Part part(p, p.Sq);
  const Sequence at(p, part.b, part.h);
  const int64_t first = part.first;
  if (first >= at.queries) return;
  float* const mask = reinterpret_cast<float*>(dynamic_shared());
  T* const of_q = reinterpret_cast<T*>(mask + kMaskTile);
  T* const of_dy = of_q + kTile;
  T* const of_k = of_dy + kTile;
  T* const of_v = of_k + kStages<kHead> * kTile;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t i0 = first + 16 * warp + lane / 4;
  const int64_t last = first + kRows, seen = p.causal && last < at.keys ? last : at.keys;
  const int64_t tiles = ceil_div(seen, kRows), steps = p.dq ? 2 * tiles : tiles;
  const auto start = [&](int64_t step) {
    const int64_t j = step % tiles * kRows;
    const int at_tile = int(step % kStages<kHead>) * kTile;
    load_keys<kHead>(of_k + at_tile, of_v + at_tile, p, at, j, chunks);
    cp_async_commit();
  };
  load_tile<kRows, kHead, kThreads>(of_q, at.query(p, p.q, p.q_batch, p.q_head, p.q_token, first), p.q_token,
                                    at.queries - first, p.D, chunks.q);
  load_tile<kRows, kHead, kThreads>(of_dy, at.query(p, p.dy, p.dy_batch, p.dy_head, p.dy_token, first), p.dy_token,
                                    at.queries - first, p.D, chunks.dy);
  if (steps)
    start(0);
  else
    cp_async_commit();
  float max[2] = {}, over_sum[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half)
    if (i0 + 8 * half < at.queries)
      max[half] = p.stats[at.row + i0 + 8 * half], over_sum[half] = p.stats[p.rows + at.row + i0 + 8 * half];

  const float scale = p.seed ? float(dropout_scale(p.threshold)) : 1.f;
  float dq[kHead / 8][4] = {}, delta[2] = {};
  uint32_t kept[2] = {};
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t tile = step % tiles;
    const bool plain = is_plain(p, at, tile * kRows + kRows);
    cp_async_wait<0>();
    __syncthreads();
    if (kStages<kHead> == 2 && step + 1 < steps) start(step + 1);
    if (!plain) {
      write_mask<false, kRows>(mask, p, at, first, tile * kRows, float_bias);
      __syncthreads();
    }
    const T* const keys = of_k + step % kStages<kHead> * kTile;
    const T* const values = of_v + step % kStages<kHead> * kTile;
    if (step == tiles) {
#pragma unroll
      for (int half = 0; half < 2; ++half) delta[half] = quad_sum(delta[half]);
    }
    float s[kRows / 8][4] = {}, dp[kRows / 8][4] = {};
    multiply<T, kHead>(s, of_q, keys, 16 * warp, p.D);
    finish_scores(s, float(p.scale), plain, mask, 16 * warp);
    multiply<T, kHead>(dp, of_dy, values, 16 * warp, p.D);
    const int odd_tile = int(tile % 2);
    if (p.seed && !odd_tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) kept[half] = kept_of_row(p, at.row + i0 + 8 * half, tile / 2);
    }
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int half = e / 2;
        const float weight = exp_of_score<T>(s[j][e] - max[half]) * over_sum[half];
        float of_weight = dp[j][e] * scale;
        if (p.seed && !is_kept(kept[half], j, e % 2, odd_tile)) of_weight = 0;
        if (step < tiles)
          delta[half] += weight * of_weight;
        else
          s[j][e] = weight * (of_weight - delta[half]);
      }
    if (step >= tiles) add_rows<T, kHead>(dq, s, keys, p.D);
    if (kStages<kHead> == 1) {
      __syncthreads();  // before the next tile overwrites this one
      if (step + 1 < steps) start(step + 1);
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  if (!p.dq) {
#pragma unroll
    for (int half = 0; half < 2; ++half) delta[half] = quad_sum(delta[half]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half)
    if (lane % 4 == 0 && i0 + 8 * half < at.queries) p.delta[at.row + i0 + 8 * half] = delta[half];
  if (!p.dq) return;
  const int64_t row = first + 16 * warp;
  store_rows<T, kHead>(of_q + 16 * warp * tile_pitch(kHead), dq, float(p.scale), float(p.scale),
                       at.query(p, p.dq, p.dq_batch, p.dq_head, p.dq_token, row), p.dq_token, at.queries - row, p.D,
                       chunks.dq);
}

template <class T, int kHead>
__global__ void __launch_bounds__(kThreads, 2)
    tensor_grad_key_kernel(AttentionBackward<T, T> p, bool float_bias, InChunks chunks) {
  constexpr int kTile = kRows * tile_pitch(kHead), kQueries = kQueriesOf<kHead>;
  constexpr int kQueryTile = kQueries * tile_pitch(kHead);
  __shared__ float max[kQueries], over_sum[kQueries], delta[kQueries];
  __shared__ uint8_t kept[kQueries][kDropoutLanes];  // bits of kept_keys
  const Part part(p, p.Sk);
  const Sequence at(p, part.b, part.h);
  const int64_t first = part.first;
  if (first >= at.keys) return;
  float* const mask = reinterpret_cast<float*>(dynamic_shared());
  T* const of_k = reinterpret_cast<T*>(mask + kMaskTile);
  T* const of_v = of_k + kTile;
  T* const of_q = of_v + kTile;  // two tiles of queries, two of dy
  T* const of_dy = of_q + 2 * kQueryTile;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t begin = p.causal ? first / kQueries : 0, end = ceil_div(at.queries, kQueries);
  const auto start = [&](int64_t tile) {
    const int64_t i = tile * kQueries;
    const int at_tile = int(tile % 2) * kQueryTile;
    load_tile<kQueries, kHead, kThreads>(of_q + at_tile, at.query(p, p.q, p.q_batch, p.q_head, p.q_token, i), p.q_token,
                                         at.queries - i, p.D, chunks.q);
    load_tile<kQueries, kHead, kThreads>(of_dy + at_tile, at.query(p, p.dy, p.dy_batch, p.dy_head, p.dy_token, i),
                                         p.dy_token, at.queries - i, p.D, chunks.dy);
    cp_async_commit();
  };
  load_keys<kHead>(of_k, of_v, p, at, first, chunks);
  if (begin < end)
    start(begin);
  else
    cp_async_commit();

  const float scale = p.seed ? float(dropout_scale(p.threshold)) : 1.f;
  const int slot = int(first % kDropoutGroup) / kDropoutLanes + warp;  // of this warp's keys
  float dk[kHead / 8][4] = {}, dv[kHead / 8][4] = {};
  for (int64_t tile = begin; tile < end; ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is there, and what is shared of the last one has been read
    if (tile + 1 < end) start(tile + 1);
    const int64_t i_tile = tile * kQueries;
    for (int i = threadIdx.x; i < kQueries; i += kThreads) {
      const bool live = i_tile + i < at.queries;
      const int64_t row = at.row + i_tile + i;
      max[i] = live ? p.stats[row] : 0.f;
      over_sum[i] = live ? p.stats[p.rows + row] : 0.f;
      delta[i] = live && p.dk ? p.delta[row] : 0.f;
    }
    if (p.seed)
      for (int call = threadIdx.x; call < kQueries * kDropoutLanes; call += kThreads)
        kept[call / kDropoutLanes][call % kDropoutLanes] =
            uint8_t(kept_keys(p, at.row + i_tile + call / kDropoutLanes, first / kDropoutGroup, call % kDropoutLanes));
    const bool plain = is_plain(p, at, first + kRows);
    if (!plain) write_mask<true, kQueries>(mask, p, at, i_tile, first, float_bias);
    __syncthreads();
    const T* const queries = of_q + tile % 2 * kQueryTile;
    const T* const grads = of_dy + tile % 2 * kQueryTile;
    float s[kQueries / 8][4] = {}, dp[kQueries / 8][4] = {};
    multiply<T, kHead>(s, of_k, queries, 16 * warp, p.D);
    finish_scores(s, float(p.scale), plain, mask, 16 * warp);
    multiply<T, kHead>(dp, of_v, grads, 16 * warp, p.D);
#pragma unroll
    for (int i = 0; i < kQueries / 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = 8 * i + lane % 4 * 2 + e % 2;
        const float weight = exp_of_score<T>(s[i][e] - max[column]) * over_sum[column];
        float factor = scale;
        if (p.seed && !(kept[column][lane / 4 + e / 2 * 8] >> slot & 1)) factor = 0;
        s[i][e] = weight * factor;
        dp[i][e] = weight * (dp[i][e] * factor - delta[column]);
      }
    if (p.dv) add_rows<T, kHead>(dv, s, grads, p.D);
    if (p.dk) add_rows<T, kHead>(dk, dp, queries, p.D);
  }
  cp_async_wait<0>();
  __syncthreads();
  const int64_t row = first + 16 * warp;
  const int own = 16 * warp * tile_pitch(kHead);
  if (p.dk)
    store_rows<T, kHead>(of_k + own, dk, float(p.scale), float(p.scale),
                         at.key(p, p.dk, p.dk_batch, p.dk_head, p.dk_token, row), p.dk_token, at.keys - row, p.D,
                         chunks.dk);
  if (p.dv)
    store_rows<T, kHead>(of_v + own, dv, 1.f, 1.f, at.key(p, p.dv, p.dv_batch, p.dv_head, p.dv_token, row), p.dv_token,
                         at.keys - row, p.D, chunks.dv);
}

// ---- launchers

template <class Args>
dim3 blocks_for(const Args& p, int64_t most) {
  return grid_of(p.B * p.N * ceil_div(most, kRows));
}

// Bytes of shared memory for the mask's tile and tiles of `rows` rows in all.
constexpr size_t shared_bytes(int rows, int head) {
  return kMaskTile * sizeof(float) + size_t(rows) * tile_pitch(head) * 2;
}

template <int kHead, class T>
void forward(const AttentionForward<T, T>& p, bool float_bias, InChunks chunks, Stream stream) {
  launch(tensor_forward_kernel<T, kHead>, blocks_for(p, p.Sq), kThreads,
         shared_bytes((1 + 2 * kStages<kHead>)*kRows, kHead), stream, p, float_bias, chunks);
}

template <int kHead, class T>
void backward(const AttentionBackward<T, T>& p, bool float_bias, InChunks chunks, Stream stream) {
  if (p.dq || p.dk)
    launch(tensor_grad_query_kernel<T, kHead>, blocks_for(p, p.Sq), kThreads,
           shared_bytes((2 + 2 * kStages<kHead>)*kRows, kHead), stream, p, float_bias, chunks);
  if (p.dk || p.dv)
    launch(tensor_grad_key_kernel<T, kHead>, blocks_for(p, p.Sk), kThreads,
           shared_bytes(2 * kRows + 4 * kQueriesOf<kHead>, kHead), stream, p, float_bias, chunks);
}

}  // namespace

template <class T, class W>
void tensor_attention_forward(const AttentionForward<T, W>& given, Stream stream) {
  const AttentionForward<T, T> p = erased(given);
  InChunks chunks(p);
  chunks.o = in_chunks(p.o, p.D, p.o_batch, p.o_head, p.o_token);
  constexpr bool kFloatBias = !std::is_same_v<T, W>;
  p.D <= 64 ? forward<64>(p, kFloatBias, chunks, stream) : forward<128>(p, kFloatBias, chunks, stream);
}

template <class T, class W>
void tensor_attention_backward(const AttentionBackward<T, W>& given, Stream stream) {
  const AttentionBackward<T, T> p = erased(given);
  InChunks chunks(p);
  chunks.dy = in_chunks(p.dy, p.D, p.dy_batch, p.dy_head, p.dy_token);
  chunks.dq = in_chunks(p.dq, p.D, p.dq_batch, p.dq_head, p.dq_token);
  chunks.dk = in_chunks(p.dk, p.D, p.dk_batch, p.dk_head, p.dk_token);
  chunks.dv = in_chunks(p.dv, p.D, p.dv_batch, p.dv_head, p.dv_token);
  constexpr bool kFloatBias = !std::is_same_v<T, W>;
  p.D <= 64 ? backward<64>(p, kFloatBias, chunks, stream) : backward<128>(p, kFloatBias, chunks, stream);
}

#define FASTFT_X(T, W)                                                                 \
  template void tensor_attention_forward<T, W>(const AttentionForward<T, W>&, Stream); \
  template void tensor_attention_backward<T, W>(const AttentionBackward<T, W>&, Stream);
FASTFT_X(bf16, bf16) FASTFT_X(bf16, float) FASTFT_X(f16, f16) FASTFT_X(f16, float)
#undef FASTFT_X

}  // namespace fastft::cuda
