// Table of contents: every kernel of fastft, for the CPU and for CUDA. Includes neither torch nor CUDA.
//
// A kernel is a template over T, the dtype of activations, and W, the dtype of parameters, and takes one struct: outputs, saved statistics, inputs,
// sizes, scalars. A null pointer means "not wanted" or "not given". Sizes are elements; all tensors are dense and row-major.
// To add an op: its structs below and one line for each direction in FASTFT_COMMON_KERNELS.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastft {

struct bf16 {
  uint16_t bits;
};  // storage only; conversions are in common/numeric.h
struct f16 {
  uint16_t bits;
};  // CUDA only

// What a CPU kernel may ask of its host: threads and scratch memory. The host frees the scratch when the kernel has returned.
struct Host {
  int threads;  // workers of one parallel_for
  void (*parallel_for)(int64_t tasks, void (*body)(void* context, int64_t begin, int64_t end), void* context);
  void* scratch_owner;
  void* (*scratch)(void* owner,
                   size_t bytes);  // 64-byte aligned, uninitialised, never null: out of memory is the host's exception
  size_t (*in_small_pages)(const void* data, size_t bytes);  // how many of these are not known to lie in pages of 2 MB
};

using Stream = void*;  // cudaStream_t

// Whether linear_act's CPU kernels of these dtypes take the input in fp32, too, as autocast has it.
template <class T, class W>
inline constexpr bool kTakesFloat = false;
template <>
inline constexpr bool kTakesFloat<bf16, float> = true;

// y = act(x w^T + b); z = x w^T + b is kept for the backward where the activation needs it.
template <class T, class W>
struct LinearActForward {
  T* y;        // (M, N)
  T* z;        // (M, N) or null
  const T* x;  // (M, K)
  const W* w;  // (N, K)
  const W* b;  // (N) or null
  int64_t M, N, K;
  int activation;              // index in common/activation.h
  const float* x32 = nullptr;  // in place of x where kTakesFloat: fp32 that is rounded on its way in; CPU only
  const T* w_low = nullptr;    // (N, K) w as T where W is another type; CUDA only
  // Elements from one row to the next where they are not K of x, and N of y and z; CPU only. Rows that lie a multiple of
  // 4096 bytes apart share their place in L1.
  int64_t x_stride = 0, y_stride = 0;
};

// dz = dy act'(z), dx = dz w + add, dw = dz^T x, db = column sums of dz; each of the three outputs may be null.
template <class T, class W>
struct LinearActBackward {
  T* dx;        // (M, K) or null
  W* dw;        // (N, K) or null
  W* db;        // (N) or null
  const T* dy;  // (M, N)
  const T* z;   // (M, N), null for identity
  const T* x;   // (M, K), may be null without dw
  const W* w;   // (N, K), may be null without dx
  int64_t M, N, K;
  int activation;
  const T* add = nullptr;      // (M, K) or null: a gradient that comes to x another way
  T* y = nullptr;              // (M, N) or null: act(z) once more, for whom it was an input
  const float* x32 = nullptr;  // in place of x, as in the forward; of its gradient; and of add
  float* dx32 = nullptr;
  const float* add32 = nullptr;
  // CUDA only. dz is wanted where it is given; the other gradients ask for it where there is a z, tensor cores for w as
  // above. Where they sum dw over `splits` parts of the rows, those partial sums and db's are made in a workspace.
  const T* w_low = nullptr;  // (N, K)
  T* dz = nullptr;           // (M, N)
  float* partial = nullptr;  // (splits, N K + N)
  int64_t splits = 1;
  // Where x is act(x_preact): dx is the gradient of x_preact (without add), and x is made once more, perhaps in its place.
  const T* x_preact = nullptr;  // (M, K) or null
  T* x_again = nullptr;         // (M, K) or null
  int x_activation = 0;
  int64_t x_stride = 0, y_stride = 0;  // as in the forward: of x, its gradient, add, x_preact, x_again; of dy, z, y
};

// Rows of a partial sum over rows: fixed, so that the sum's order is.
constexpr int64_t kSumRows = 64;

// What statistics of T are kept in.
template <class T>
struct StatisticOf {
  using type = float;
};
template <>
struct StatisticOf<double> {
  using type = double;
};
template <class T>
using Statistic = typename StatisticOf<T>::type;

enum Reduction { kNone, kMean, kSum };

// Cross-entropy of the N * S rows x[n, :, s] against class indices or probabilities (one of the two pointers is null).
// stats holds each row's maximum and log of its sum of exp(x - maximum); with q or smoothing its soft weights' sum too.
// A class index out of range fails a device-side assertion on CUDA; the CPU reports it in `invalid`.
template <class T, class W>
struct CrossEntropyForward {
  W* loss;                 // (N, S) for kNone, else (1)
  Statistic<T>* stats;     // (2, N, S), (3, N, S) with q or smoothing, or null
  Statistic<T>* divisor;   // (1) or null: what kMean divided by
  Statistic<T>* row_loss;  // (N, S), CUDA's workspace where there is a reduction
  int64_t* invalid;        // (1) the first row whose class index is out of range, or -1; CPU only
  const T* x;              // (N, C, S)
  const int64_t* target;   // (N, S) or null
  const W* q;              // (N, C, S) or null
  const W* w;              // (C) or null: ones
  int64_t N, C, S;
  int64_t ignore_index;
  double smoothing;
  int reduction;
};

// Gradients of the logits and of the probabilities.
template <class T, class W>
struct CrossEntropyBackward {
  T* dx;                        // (N, C, S) or null
  W* dq;                        // (N, C, S) or null
  const W* dy;                  // (N, S) for kNone, else (1)
  const Statistic<T>* stats;    // as the forward left them
  const Statistic<T>* divisor;  // (1) for kMean
  const T* x;                   // (N, C, S)
  const int64_t* target;        // (N, S) or null
  const W* q;                   // (N, C, S) or null
  const W* w;                   // (C) or null
  int64_t N, C, S;
  int64_t ignore_index;
  double smoothing;
  int reduction;
};

// Forward and backward in one, against class indices, for a gradient of the loss that is known before.
template <class T, class W>
struct CrossEntropyWithGrad {
  W* loss;                // (1)
  Statistic<T>* stats;    // (2, N)
  Statistic<T>* divisor;  // (1) or null
  T* dx;                  // (N, C)
  int64_t* invalid;       // (1) as in CrossEntropyForward
  double dy;              // of the loss
  const T* x;             // (N, C)
  const int64_t* target;  // (N)
  const W* w;             // (C) or null
  int64_t N, C;
  int64_t ignore_index;
  int reduction;  // kMean or kSum
};

// Classes up to which CUDA has these.
constexpr int64_t kHeadClasses = 1024;

// A classifier's end: logits = dropout(x) w^T + b, and the mean of their softmax cross-entropy against class indices, as in
// CrossEntropyForward; a null seed is no dropout.
template <class T, class W>
struct HeadForward {
  W* loss;                 // (1)
  T* logits;               // (B, C)
  Statistic<T>* stats;     // (2, B) as in CrossEntropyForward, or null
  Statistic<T>* divisor;   // (1) or null
  Statistic<T>* row_loss;  // (B) workspace; CUDA only
  int32_t* blocks_done;    // (1) zero, which it is again afterwards; CUDA only
  int64_t* invalid;        // (1) as in CrossEntropyForward; CPU only
  const T* x;              // (B, H)
  const W* w;              // (C, H)
  const W* b;              // (C) or null
  const int64_t* target;   // (B)
  int64_t B, C, H;
  int64_t ignore_index;
  const int64_t* seed;  // (1) or null
  int64_t threshold, use;
};

// Gradients of x (of dropout's input), w and b; each may be null.
template <class T, class W>
struct HeadBackward {
  T* dx;                        // (B, H) or null
  W* dw;                        // (C, H) or null
  W* db;                        // (C) or null
  Statistic<T>* dz;             // (B, C) gradient of the logits, both ways; CUDA's workspace
  const W* dloss;               // (1) or null
  const T* dlogits;             // (B, C) or null
  const T* logits;              // (B, C) as the forward left them
  const Statistic<T>* stats;    // (2, B)
  const Statistic<T>* divisor;  // (1)
  const T* x;                   // (B, H)
  const W* w;                   // (C, H)
  const int64_t* target;        // (B)
  int64_t B, C, H;
  int64_t ignore_index;
  const int64_t* seed;
  int64_t threshold, use;
};

// y = LayerNorm(h) w + b over rows of h = dropout(x) + residual; a null residual is zeros, a null seed no dropout (common/philox.h).
template <class T, class W>
struct LayerNormForward {
  W* y;  // (M, H)
  W* h;  // (M, H) or null; kept for the backward, which takes x for it where there is neither dropout nor residual
  Statistic<W>* mean;  // (M) or null
  Statistic<W>* rstd;  // (M) or null
  const T* x;          // (M, H)
  const W* residual;   // (M, H) or null
  const W* w;          // (H) or null: ones
  const W* b;          // (H) or null: zeros
  int64_t M, H;
  double eps;
  const int64_t* seed;  // (1) or null
  int64_t threshold, use;
};

// Gradients of x (of dropout's input), residual, w and b; each may be null.
template <class T, class W>
struct LayerNormBackward {
  T* dx;                  // (M, H) or null
  W* dresidual;           // (M, H) or null
  W* dw;                  // (H) or null
  W* db;                  // (H) or null
  Statistic<W>* partial;  // (ceil(M / kSumRows), 2, H) workspace; CUDA only
  const W* dy;            // (M, H)
  const W* h;             // (M, H)
  const Statistic<W>* mean;
  const Statistic<W>* rstd;
  const W* w;  // (H) or null
  int64_t M, H;
  const int64_t* seed;
  int64_t threshold, use;
};

// y = dropout(LayerNorm(h) w + b) over rows of h = word[ids] + type[type_ids] + position[position_ids]; a null seed is no dropout. On CUDA an id out of
// range fails a device-side assertion; the CPU's host has looked before.
template <class T, class W>
struct EmbeddingForward {
  T* y;                         // (M, H)
  Statistic<W>* mean;           // (M) or null
  Statistic<W>* rstd;           // (M) or null
  const int64_t* ids;           // (M)
  const int64_t* position_ids;  // (M)
  const int64_t* type_ids;      // (M) or null: there are no types
  const W* word;                // (V, H)
  const W* position;            // (P, H)
  const W* type;                // (C, H) or null
  const W* w;                   // (H)
  const W* b;                   // (H)
  int64_t M, H, V, P, C;
  double eps;
  const int64_t* seed;  // (1) or null
  int64_t threshold, use;
};

// Gradients of h, w and b; each may be null.
template <class T, class W>
struct EmbeddingBackward {
  T* dh;                  // (M, H) or null
  W* dw;                  // (H) or null
  W* db;                  // (H) or null
  Statistic<W>* partial;  // (ceil(M / kSumRows), 2, H) workspace; CUDA only
  const T* dy;            // (M, H)
  const Statistic<W>* mean;
  const Statistic<W>* rstd;
  const int64_t* ids;
  const int64_t* position_ids;
  const int64_t* type_ids;
  const W* word;
  const W* position;
  const W* type;
  const W* w;
  int64_t M, H, V, P, C;
  const int64_t* seed;
  int64_t threshold, use;
};

// Sorted rows that one warp adds up on CUDA.
constexpr int64_t kScatterRows = 16;

// Gradient of a table (V, H) of which row ids[m] was taken as row m: each of its rows is the sum of its dh, in their order; row `padding` gets none.
template <class T, class W>
struct EmbeddingScatter {
  W* dtable;             // (V, H); on CUDA it holds zeros
  const int64_t* ids;    // (M); on CUDA sorted
  const int64_t* order;  // (M) the row of dh that each of the sorted ids is of; CUDA only
  const T* dh;           // (M, H)
  int64_t M, H, V;
  int64_t padding;                  // or -1
  Statistic<W>* partial = nullptr;  // (ceil(M / kScatterRows), 2, H) workspace; CUDA only
};

// Scaled dot-product attention of N heads: o = dropout(softmax(scale q k^T + mask)) v for each sequence b < B and head.
// Strides are in elements, the last dimension of q, k, v, o and their gradients is contiguous. Without cu_q the queries of
// sequence b are the Sq rows from b q_batch on, with it rows cu_q[b] to cu_q[b + 1] of a packed (rows / N, N, D), at most
// Sq; likewise keys and values with cu_k and Sk. W is the dtype of an additive mask.
// Query i of a head is number (b N + head) Sq + i among all rows, packed head rows / N + cu_q[b] + i: in `stats`, and in
// dropout's (rows, Sk) matrix. key_rows counts likewise the keys. stats (2, rows) holds each row's maximum and one over its sum of exp(x - maximum).
template <class T, class W>
struct AttentionForward {
  T* o;                 // (B, N, Sq, D)
  Statistic<T>* stats;  // (2, rows) or null
  const T* q;           // (B, N, Sq, D)
  const T* k;           // (B, N, Sk, D)
  const T* v;           // (B, N, Sk, D)
  const uint8_t* keep;  // (B, N, Sq, Sk) or null: 0 masks
  const W* bias;        // (B, N, Sq, Sk) or null: is added
  const int32_t* cu_q;  // (B + 1) or null
  const int32_t* cu_k;  // (B + 1) or null
  const int64_t* seed;  // (1) or null: no dropout
  int64_t B, N, Sq, Sk, D, rows, key_rows;
  int64_t o_batch, o_head, o_token, q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token;
  int64_t mask_batch, mask_head, mask_query, mask_key;  // of keep or bias
  double scale;
  int causal;  // query i sees keys 0 to i
  int64_t threshold, use;
};

template <class T, class W>
struct AttentionBackward {
  T* dq;                      // like q, or null
  T* dk;                      // like k, or null
  T* dv;                      // like v, or null
  Statistic<T>* delta;        // (rows), CUDA's workspace: sums of p dp
  const T* dy;                // like o
  const Statistic<T>* stats;  // as the forward left them
  const T* q;
  const T* k;
  const T* v;
  const uint8_t* keep;
  const W* bias;
  const int32_t* cu_q;
  const int32_t* cu_k;
  const int64_t* seed;
  int64_t B, N, Sq, Sk, D, rows, key_rows;
  int64_t dq_batch, dq_head, dq_token, dk_batch, dk_head, dk_token, dv_batch, dv_head, dv_token;
  int64_t dy_batch, dy_head, dy_token, q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token;
  int64_t mask_batch, mask_head, mask_query, mask_key;
  double scale;
  int causal;
  int64_t threshold, use;
};

// Elements that one task of the kernels below takes of one tensor: fixed, so that a norm's order of summing is.
constexpr int64_t kOptimizerChunk = int64_t(1) << 16;

// Many tensors at once: arrays of their addresses and numbers of elements lie in the host's memory, on CUDA too.
// One step of AdamW on parameters p with gradients g and their moments m and v, in place.
template <class T, class W>
struct AdamW {
  const int64_t* p;      // (tensors) addresses of W, like m and v
  const int64_t* g;      // (tensors) addresses of T
  const int64_t* m;      // (tensors)
  const int64_t* v;      // (tensors)
  const int64_t* sizes;  // (tensors)
  const double* steps;   // (tensors) the number of each one's step, from 1 on
  int64_t tensors;
  const Statistic<W>* factor;  // (1) or null: what gradients are multiplied with, in the device's memory
  double lr, beta1, beta2, eps, weight_decay;
  int maximize;
  // CUDA only: addresses of rounded copies of p, which is fp32, 0 where there is none; of f16, else of bf16.
  const int64_t* low = nullptr;  // (tensors) or null: there are none
  int low_is_f16 = 0;
};

// Square root of the sum of squares over all gradients.
template <class T, class W>
struct GradNorm {
  W* norm;               // (1)
  double* partial;       // (chunks of all tensors) workspace; CUDA only
  const int64_t* g;      // (tensors) addresses of T
  const int64_t* sizes;  // (tensors)
  int64_t tensors;
};

// g *= factor
template <class T, class W>
struct ScaleGrads {
  const int64_t* g;      // (tensors) addresses of T
  const int64_t* sizes;  // (tensors)
  int64_t tensors;
  const W* factor;  // (1) in the device's memory
};

// Padded sequences and their rows one after the other: row s of sequence b is row cu_seqlens[b] + s of the packed ones, if it
// is one of the sequence's. CUDA only; rows are copied as they are, and W does not matter. On CUDA a mask that is not that
// of the sequences fails a device-side assertion.
template <class T, class W>
struct PackRows {
  T* packed;                  // (tokens, H)
  const T* padded;            // (B, S, H)
  const uint8_t* present;     // (B, S) or null: 0 at padding
  const int32_t* cu_seqlens;  // (B + 1)
  int64_t tokens, B, S, H;
};

// Zeros are written where there is padding.
template <class T, class W>
struct UnpackRows {
  T* padded;                  // (B, S, H)
  const T* packed;            // (tokens, H)
  const int32_t* cu_seqlens;  // (B + 1)
  int64_t tokens, B, S, H;
};

// Name of the kernel, name of its arguments. Every line becomes, for each instruction set, an entry of the dispatch table of cpu/isa.cpp
// (with the pairs of dtypes of FASTFT_CPU_DTYPES), and a function of fastft::cuda.
#define FASTFT_COMMON_KERNELS(X)                  \
  X(linear_act_forward, LinearActForward)         \
  X(linear_act_backward, LinearActBackward)       \
  X(cross_entropy_forward, CrossEntropyForward)   \
  X(cross_entropy_backward, CrossEntropyBackward) \
  X(head_forward, HeadForward)                    \
  X(head_backward, HeadBackward)                  \
  X(layer_norm_forward, LayerNormForward)         \
  X(layer_norm_backward, LayerNormBackward)       \
  X(embedding_forward, EmbeddingForward)          \
  X(embedding_backward, EmbeddingBackward)        \
  X(embedding_scatter, EmbeddingScatter)          \
  X(attention_forward, AttentionForward)          \
  X(attention_backward, AttentionBackward)        \
  X(adamw, AdamW)                                 \
  X(grad_norm, GradNorm)                          \
  X(scale_grads, ScaleGrads)

// With those that are one device's alone.
#define FASTFT_KERNELS(X)  \
  FASTFT_COMMON_KERNELS(X) \
  X(cross_entropy_with_grad, CrossEntropyWithGrad)

#define FASTFT_CUDA_KERNELS(X) \
  FASTFT_COMMON_KERNELS(X)     \
  X(pack_rows, PackRows)       \
  X(unpack_rows, UnpackRows)

// Suffix, T, W.
#define FASTFT_CPU_DTYPES(X) X(f32, float, float) X(bf16, bf16, bf16) X(bf16_f32, bf16, float) X(f64, double, double)
#define FASTFT_CUDA_DTYPES(X) FASTFT_CPU_DTYPES(X) X(f16, f16, f16) X(f16_f32, f16, float)

namespace cpu {

// A product C (M, N) = A (M, K) B (K, N) and the threads that share it.
struct GemmQuery {
  int64_t M, N, K;
  bool is_bf16;        // else float
  bool a_depth_major;  // A lies in memory as (K, M), else as (M, K)
  bool b_depth_major;  // B lies in memory as (K, N), else as (N, K)
  int threads;
};

// One kernel in all its dtypes; the call selects by the dtypes of its arguments.
template <template <class, class> class Args>
struct ByDtype {
#define FASTFT_X(suffix, T, W) void (*run_##suffix)(const Args<T, W>&, const Host&);
  FASTFT_CPU_DTYPES(FASTFT_X)
#undef FASTFT_X
#define FASTFT_X(suffix, T, W) \
  void operator()(const Args<T, W>& args, const Host& host) const { run_##suffix(args, host); }
  FASTFT_CPU_DTYPES(FASTFT_X)
#undef FASTFT_X
};

struct Kernels {
#define FASTFT_X(name, Args) ByDtype<Args> name;
  FASTFT_KERNELS(FASTFT_X)
#undef FASTFT_X
  // FLOP/s of all threads, cpu/peak.cpp: of the FMA units, of VDPBF16PS (0 where it is not used), of the products' register tiles in L1
  double (*peak_f32)(double seconds, const Host&);
  double (*peak_bf16)(double seconds, const Host&);
  double (*tile_f32)(double seconds, const Host&);
  double (*tile_bf16)(double seconds, const Host&);
  int64_t (*gemm_tasks)(const GemmQuery&, int phase, double* work, int64_t capacity);  // cpu/gemm.h
};

const Kernels& kernels();        // of the instruction set in use
const char* isa();               // its name: baseline, avx2, avx512 or avx512_bf16
const char* isas();              // those that this CPU has and FASTFT_ISA allows, ascending, comma separated
bool set_isa(const char* name);  // false: not one of isas()

// How products of bf16 are made: "dot", by VDPBF16PS, or "widen", in fp32, as all instruction sets below avx512_bf16 do.
const char* bf16_products();
bool set_bf16_products(const char* how);  // false: neither of the two. Does nothing below avx512_bf16

}  // namespace cpu

namespace cuda {
#define FASTFT_X(name, Args)  \
  template <class T, class W> \
  void name(const Args<T, W>&, Stream);
FASTFT_CUDA_KERNELS(FASTFT_X)
#undef FASTFT_X
}  // namespace cuda
}  // namespace fastft
