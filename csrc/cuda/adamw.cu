// The optimizer's passes over all tensors at once: AdamW, the gradients' norm, their scaling; cpu/adamw.cpp has the formulas.
//   p, m, v W   g T   partial sums of the norm in fp64, one a chunk, added up in their order: the same bits in every run
//   low: rounded copies of p, which is fp32 then, in bf16 or f16: a conversion would read 4 more bytes for each
// Moves in fp32 28 bytes a parameter for AdamW, 2 more for a copy, 4 for the norm, 8 for scaling: at 3 TB/s 1.03, 0.07, 0.15
// and 0.29 ms for the 110 M of BERT-base.
// One block per chunk of a tensor, 16 bytes at a time where all of its arrays begin at multiples of that. Addresses are arguments of
// the launch, kTensors at a time: nothing is copied to the device and nobody waits for it. What elements are stored as is told
// at run time (row.cuh). Not yet run on a GPU.
#include "row.cuh"

namespace fastft::cuda {
namespace {

constexpr int kTensors = 48;  // of one launch, whose arguments may take 4 KB
constexpr int kThreads = 256;

struct Tensors {
  int64_t p[kTensors], g[kTensors], m[kTensors], v[kTensors], low[kTensors], sizes[kTensors];
  int64_t first[kTensors];  // chunk of each
  double rate[kTensors], unbias[kTensors];
  int count;
};

struct Chunk {
  int tensor;
  int64_t begin, end;
};

__device__ inline Chunk chunk_of_block(const Tensors& tensors) {
  int tensor = 0;
  while (tensor + 1 < tensors.count && tensors.first[tensor + 1] <= int64_t(blockIdx.x)) ++tensor;
  const int64_t begin = (blockIdx.x - tensors.first[tensor]) * kOptimizerChunk, end = begin + kOptimizerChunk;
  return {tensor, begin, end < tensors.sizes[tensor] ? end : tensors.sizes[tensor]};
}

// Calls run(tensors, chunks of them, chunks before them) for kTensors tensors after the other; add(tensors, at, from) takes one.
template <class Add, class Run>
void for_tensors(const int64_t* sizes, int64_t tensors, const Add& add, const Run& run) {
  int64_t before = 0;
  for (int64_t i = 0; i < tensors;) {
    Tensors some;
    int64_t chunks = 0;
    for (some.count = 0; i < tensors && some.count < kTensors; ++i) {
      if (sizes[i] == 0) continue;  // its chunk number would be the next one's
      some.sizes[some.count] = sizes[i];
      some.first[some.count] = chunks;
      chunks += ceil_div(sizes[i], kOptimizerChunk);
      add(some, some.count++, i);
    }
    run(some, chunks, before);
    before += chunks;
  }
}

// ---- a chunk four neighbours at a time, or element by element; F is what is computed in

// body(first, n as a type) for places of a chunk, n neighbours each; chunks begin at multiples of any n.
template <int n, class Body>
__device__ void for_vectors(int64_t begin, int64_t end, const Body& body) {
  for (int64_t j = begin + threadIdx.x * n; j + n <= end; j += kThreads * n) body(j, std::integral_constant<int, n>());
}
template <class F, class Body>
__device__ void for_chunk(const Chunk& chunk, bool vectors, const Body& body) {
  constexpr int n = sizeof(F) == 8 ? 1 : 4;
  const int64_t whole = vectors ? chunk.begin + (chunk.end - chunk.begin) / n * n : chunk.begin;
  if (n > 1) for_vectors<n>(chunk.begin, whole, body);
  for_vectors<1>(whole, chunk.end, body);
}

// A tensor, of its address.
template <class F>
__device__ Row<Any<F>> tensor_at(int64_t address, Type type) {
  return {reinterpret_cast<Any<F>*>(address), type};
}

template <class F>
__global__ void __launch_bounds__(kThreads, sizeof(F) == 8 ? 1 : 3)
    adamw_kernel(Tensors tensors, Types types, Type of_low, const F* scale, double beta1, double beta2, double eps,
                 double weight_decay, int maximize) {
  const Chunk chunk = chunk_of_block(tensors);
  const auto g = tensor_at<F>(tensors.g[chunk.tensor], types.t), p = tensor_at<F>(tensors.p[chunk.tensor], types.w);
  const auto m = tensor_at<F>(tensors.m[chunk.tensor], types.w), v = tensor_at<F>(tensors.v[chunk.tensor], types.w);
  const auto low = tensor_at<F>(tensors.low[chunk.tensor], of_low);
  const F factor = (scale ? *scale : F(1)) * (maximize ? F(-1) : F(1));
  const F rate = F(tensors.rate[chunk.tensor]), unbias = F(tensors.unbias[chunk.tensor]);
  const F decay = F(weight_decay), b1 = F(beta1), b2 = F(beta2), rest1 = F(1 - beta1), rest2 = F(1 - beta2), e = F(eps);
  const bool near_m = beta1 > 0.5;  // from the nearer end, as in cpu/adamw.cpp
  for_chunk<F>(chunk, aligned(p.data, g.data, m.data, v.data, low.data), [&](int64_t j, auto neighbours) {
    constexpr int n = neighbours.value;
    F of_g[n], of_p[n], of_m[n], of_v[n];
    read(of_g, g, j);
    read(of_p, p, j);
    read(of_m, m, j);
    read(of_v, v, j);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const F gi = of_g[i] * factor, mi = of_m[i];
      of_m[i] = near_m ? mi + rest1 * (gi - mi) : gi + b1 * (mi - gi);
      of_v[i] = b2 * of_v[i] + rest2 * (gi * gi);
      F change = rate * of_m[i] / (sqrt(of_v[i]) * unbias + e);
      if (decay != 0) change += decay * of_p[i];
      of_p[i] -= change;
    }
    write(m, j, of_m);
    write(v, j, of_v);
    write(p, j, of_p);
    if (low.data) write(low, j, of_p);
  });
}

template <class F>
__global__ void __launch_bounds__(kThreads, 4) squares_kernel(double* partial, Tensors tensors, Type type) {
  const Chunk chunk = chunk_of_block(tensors);
  const auto g = tensor_at<F>(tensors.g[chunk.tensor], type);
  F sum = 0;
  for_chunk<F>(chunk, aligned(g.data), [&](int64_t j, auto neighbours) {
    F x[neighbours.value];
    read(x, g, j);
#pragma unroll
    for (int i = 0; i < neighbours.value; ++i) sum += x[i] * x[i];
  });
  const double total = block_reduce<kThreads>(double(sum), Sum());
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

template <class F>
__global__ void norm_kernel(Any<F>* norm, Type type, const double* partial, int64_t chunks) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sum += partial[i];
  const double total = block_reduce<kThreads>(sum, Sum());
  if (threadIdx.x == 0) put(Row<Any<F>>{norm, type}, 0, F(sqrt(total)));
}

template <class F>
__global__ void __launch_bounds__(kThreads, 4) scale_kernel(Tensors tensors, Types types, const Any<F>* scale) {
  const F factor = get(Row<const Any<F>>(scale, types.w), 0);
  if (factor == 1) return;
  const Chunk chunk = chunk_of_block(tensors);
  const auto g = tensor_at<F>(tensors.g[chunk.tensor], types.t);
  for_chunk<F>(chunk, aligned(g.data), [&](int64_t j, auto neighbours) {
    F x[neighbours.value];
    read(x, g, j);
#pragma unroll
    for (int i = 0; i < neighbours.value; ++i) x[i] *= factor;
    write(g, j, x);
  });
}

// ---- launchers, of erased arguments

template <class F>
void step(const AdamW<Any<F>, Any<F>>& a, Types types, Stream stream) {
  const auto add = [&](Tensors& tensors, int at, int64_t i) {
    tensors.p[at] = a.p[i];
    tensors.g[at] = a.g[i];
    tensors.m[at] = a.m[i];
    tensors.v[at] = a.v[i];
    tensors.low[at] = a.low ? a.low[i] : 0;
    tensors.rate[at] = a.lr / (1 - ::pow(a.beta1, a.steps[i]));
    tensors.unbias[at] = 1 / ::sqrt(1 - ::pow(a.beta2, a.steps[i]));
  };
  for_tensors(a.sizes, a.tensors, add, [&](const Tensors& tensors, int64_t chunks, int64_t) {
    launch(&adamw_kernel<F>, grid_of(chunks), dim3(kThreads), 0, stream, tensors, types, a.low_is_f16 ? kF16 : kBf16,
           a.factor, a.beta1, a.beta2, a.eps, a.lr * a.weight_decay, a.maximize);
  });
}

template <class F>
void norm(const GradNorm<Any<F>, Any<F>>& a, Types types, Stream stream) {
  int64_t count = 0;
  const auto add = [&](Tensors& tensors, int at, int64_t i) { tensors.g[at] = a.g[i]; };
  for_tensors(a.sizes, a.tensors, add, [&](const Tensors& tensors, int64_t chunks, int64_t before) {
    launch(&squares_kernel<F>, grid_of(chunks), dim3(kThreads), 0, stream, a.partial + before, tensors, types.t);
    count = before + chunks;
  });
  launch(&norm_kernel<F>, dim3(1), dim3(kThreads), 0, stream, a.norm, types.w, a.partial, count);
}

template <class F>
void scale(const ScaleGrads<Any<F>, Any<F>>& a, Types types, Stream stream) {
  const auto add = [&](Tensors& tensors, int at, int64_t i) { tensors.g[at] = a.g[i]; };
  for_tensors(a.sizes, a.tensors, add, [&](const Tensors& tensors, int64_t chunks, int64_t) {
    launch(&scale_kernel<F>, grid_of(chunks), dim3(kThreads), 0, stream, tensors, types, a.factor);
  });
}

}  // namespace

template <class T, class W>
void adamw(const AdamW<T, W>& a, Stream stream) {
  step<Compute<W>>(erased(a), types_of(a), stream);
}
template <class T, class W>
void grad_norm(const GradNorm<T, W>& a, Stream stream) {
  norm<Compute<W>>(erased(a), types_of(a), stream);
}
template <class T, class W>
void scale_grads(const ScaleGrads<T, W>& a, Stream stream) {
  scale<Compute<W>>(erased(a), types_of(a), stream);
}

#define FASTFT_X(suffix, T, W)                            \
  template void adamw(const AdamW<T, W>&, Stream);        \
  template void grad_norm(const GradNorm<T, W>&, Stream); \
  template void scale_grads(const ScaleGrads<T, W>&, Stream);
FASTFT_CUDA_DTYPES(FASTFT_X)
#undef FASTFT_X

}  // namespace fastft::cuda
