// The optimizer's passes over all tensors at once: AdamW, the gradients' norm, their scaling; cpu/adamw.cpp has the formulas.
//   p, m, v W   g T   partial sums of the norm in fp64, one a chunk, added up in their order: the same bits in every run
// Moves in fp32 28 bytes a parameter for AdamW, 4 for the norm, 8 for scaling: at 3 TB/s 1.03, 0.15 and 0.29 ms for the 110 M of BERT-base.
// One block per chunk of a tensor. Addresses are arguments of the launch, kTensors at a time: nothing is copied to the device and nobody waits for it.
#include "device.cuh"

namespace fastft::cuda {
namespace {

constexpr int kTensors = 48;  // of one launch, whose arguments may take 4 KB
constexpr int kThreads = 512;

struct Tensors {
  int64_t p[kTensors], g[kTensors], m[kTensors], v[kTensors], sizes[kTensors];
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

template <class T, class W>
__global__ void adamw_kernel(Tensors tensors, const Statistic<W>* scale, double beta1, double beta2, double eps,
                             double weight_decay, int maximize) {
  using Acc = Compute<W>;
  const Chunk chunk = chunk_of_block(tensors);
  W* const p = reinterpret_cast<W*>(tensors.p[chunk.tensor]);
  const T* const g = reinterpret_cast<const T*>(tensors.g[chunk.tensor]);
  W* const m = reinterpret_cast<W*>(tensors.m[chunk.tensor]);
  W* const v = reinterpret_cast<W*>(tensors.v[chunk.tensor]);
  const Acc factor = (scale ? Acc(*scale) : Acc(1)) * (maximize ? Acc(-1) : Acc(1));
  const Acc rate = Acc(tensors.rate[chunk.tensor]), unbias = Acc(tensors.unbias[chunk.tensor]);
  const Acc decay = Acc(weight_decay), b1 = Acc(beta1), b2 = Acc(beta2), rest1 = Acc(1 - beta1), rest2 = Acc(1 - beta2),
            e = Acc(eps);
#pragma unroll 4
  for (int64_t j = chunk.begin + threadIdx.x; j < chunk.end; j += kThreads) {
    const Acc gj = Acc(to_float(g[j])) * factor, pj = Acc(to_float(p[j]));
    Acc mj = Acc(to_float(m[j])), vj = Acc(to_float(v[j]));
    mj = beta1 > 0.5 ? mj + rest1 * (gj - mj) : gj + b1 * (mj - gj);  // from the nearer end, as in cpu/adamw.cpp
    vj = b2 * vj + rest2 * (gj * gj);
    Acc change = rate * mj / (sqrt(vj) * unbias + e);
    if (decay != 0) change += decay * pj;
    m[j] = from_float<W>(mj);
    v[j] = from_float<W>(vj);
    p[j] = from_float<W>(pj - change);
  }
}

template <class T>
__global__ void squares_kernel(double* partial, Tensors tensors) {
  using Acc = Compute<T>;
  const Chunk chunk = chunk_of_block(tensors);
  const T* const g = reinterpret_cast<const T*>(tensors.g[chunk.tensor]);
  Acc sum = 0;
#pragma unroll 4
  for (int64_t j = chunk.begin + threadIdx.x; j < chunk.end; j += kThreads) {
    const Acc x = Acc(to_float(g[j]));
    sum += x * x;
  }
  const double total = block_reduce<kThreads>(double(sum), Sum());
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

template <class W>
__global__ void norm_kernel(W* norm, const double* partial, int64_t chunks) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sum += partial[i];
  const double total = block_reduce<kThreads>(sum, Sum());
  if (threadIdx.x == 0) *norm = from_float<W>(Compute<W>(sqrt(total)));
}

template <class T, class W>
__global__ void scale_kernel(Tensors tensors, const W* scale) {
  using Acc = Compute<T>;
  const Acc factor = Acc(to_float(*scale));
  if (factor == 1) return;
  const Chunk chunk = chunk_of_block(tensors);
  T* const g = reinterpret_cast<T*>(tensors.g[chunk.tensor]);
#pragma unroll 4
  for (int64_t j = chunk.begin + threadIdx.x; j < chunk.end; j += kThreads)
    g[j] = from_float<T>(Acc(to_float(g[j])) * factor);
}

}  // namespace

// ---- launchers
template <class T, class W>
void adamw(const AdamW<T, W>& a, Stream stream) {
  const auto add = [&](Tensors& tensors, int at, int64_t i) {
    tensors.p[at] = a.p[i];
    tensors.g[at] = a.g[i];
    tensors.m[at] = a.m[i];
    tensors.v[at] = a.v[i];
    tensors.rate[at] = a.lr / (1 - ::pow(a.beta1, a.steps[i]));
    tensors.unbias[at] = 1 / ::sqrt(1 - ::pow(a.beta2, a.steps[i]));
  };
  for_tensors(a.sizes, a.tensors, add, [&](const Tensors& tensors, int64_t chunks, int64_t) {
    launch(&adamw_kernel<T, W>, grid_of(chunks), dim3(kThreads), 0, stream, tensors, a.factor, a.beta1, a.beta2, a.eps,
           a.lr * a.weight_decay, a.maximize);
  });
}

template <class T, class W>
void grad_norm(const GradNorm<T, W>& a, Stream stream) {
  int64_t count = 0;
  const auto add = [&](Tensors& tensors, int at, int64_t i) { tensors.g[at] = a.g[i]; };
  for_tensors(a.sizes, a.tensors, add, [&](const Tensors& tensors, int64_t chunks, int64_t before) {
    launch(&squares_kernel<T>, grid_of(chunks), dim3(kThreads), 0, stream, a.partial + before, tensors);
    count = before + chunks;
  });
  launch(&norm_kernel<W>, dim3(1), dim3(kThreads), 0, stream, a.norm, a.partial, count);
}

template <class T, class W>
void scale_grads(const ScaleGrads<T, W>& a, Stream stream) {
  const auto add = [&](Tensors& tensors, int at, int64_t i) { tensors.g[at] = a.g[i]; };
  for_tensors(a.sizes, a.tensors, add, [&](const Tensors& tensors, int64_t chunks, int64_t) {
    launch(&scale_kernel<T, W>, grid_of(chunks), dim3(kThreads), 0, stream, tensors, a.factor);
  });
}

#define FASTFT_X(suffix, T, W)                            \
  template void adamw(const AdamW<T, W>&, Stream);        \
  template void grad_norm(const GradNorm<T, W>&, Stream); \
  template void scale_grads(const ScaleGrads<T, W>&, Stream);
FASTFT_CUDA_DTYPES(FASTFT_X)
#undef FASTFT_X

}  // namespace fastft::cuda
