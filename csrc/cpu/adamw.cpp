// The optimizer's passes over all tensors at once: AdamW, the gradients' norm, their scaling.
//   g' = factor g      m += (1 - beta1) (g' - m)      v = beta2 v + (1 - beta2) g'^2
//   p -= lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps) + lr weight_decay p       Loshchilov & Hutter 2019, arXiv:1711.05101
//   p, m, v W   g T: computed in fp32 (fp64 for fp64), rounded once each. The change of p is summed before p is: factors 1 - lr weight_decay near 1
//   would round the decay itself away.
// Moves 3 sizeof(T or W) + 4 more bytes a parameter and pass: in fp32 AdamW 28, the norm 4, scaling 8; BERT-base at 44 GB/s 70, 10 and 20 ms.
// A chunk of a tensor is a task. The norm's partial sums are a chunk's, so threads do not change its bits.
#include "isa.h"

namespace FASTFT_NAMESPACE {
namespace {

// All tensors, cut into chunks: chunk c is elements begin to begin + size of one tensor.
class Chunks {
 public:
  struct Chunk {
    int64_t tensor, begin, size;
  };

  Chunks(const int64_t* sizes, int64_t tensors, const Host& host) {
    for (int64_t i = 0; i < tensors; ++i) count_ += ceil_div(sizes[i], kOptimizerChunk);
    chunks_ = scratch<Chunk>(host, count_);
    Chunk* next = chunks_;
    for (int64_t i = 0; i < tensors; ++i)
      for (int64_t begin = 0; begin < sizes[i]; begin += kOptimizerChunk) {
        const int64_t rest = sizes[i] - begin;
        *next++ = {i, begin, rest < kOptimizerChunk ? rest : kOptimizerChunk};
      }
  }
  int64_t count() const { return count_; }

  template <class Body>
  void for_each(const Host& host, const Body& body) const {
    parallel_for(host, count_, [&](int64_t task, int) { body(task, chunks_[task]); });
  }

 private:
  int64_t count_ = 0;
  Chunk* chunks_;
};

template <class T>
T* at(const int64_t* addresses, const Chunks::Chunk& chunk) {
  return reinterpret_cast<T*>(addresses[chunk.tensor]) + chunk.begin;
}

constexpr int64_t kSquares =
    4096;  // summed in fp32; sums of them in fp64, so that the norm of 10^8 elements is as good as that of 4096

template <class T>
double sum_of_squares(const T* g, int64_t n) {
  using Acc = Compute<T>;
  constexpr int L = kLanes<Acc>, kSums = 4;  // additions take 3 or 4 cycles
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kSquares) {
    const int64_t end = begin + kSquares < n ? begin + kSquares : n;
    Vec<Acc> sums[kSums] = {};
    int64_t j = begin;
    for (; j + kSums * L <= end; j += kSums * L)
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) {
        const Vec<Acc> x = load(g + j + i * L);
        sums[i] += x * x;
      }
    for_lanes<Acc>(end - j, [&](int64_t k, auto load, auto store) {
      (void)store;
      const Vec<Acc> x = load(g + j + k);
      sums[0] += x * x;
    });
    total += double(sum_lanes<Acc>((sums[0] + sums[1]) + (sums[2] + sums[3]))[0]);
  }
  return total;
}

}  // namespace

template <class T, class W>
void adamw(const AdamW<T, W>& a, const Host& host) {
  using Acc = Compute<W>;
  const Acc factor = (a.factor ? *a.factor : Acc(1)) * (a.maximize ? Acc(-1) : Acc(1));
  const Acc beta1 = Acc(a.beta1), beta2 = Acc(a.beta2), rest1 = Acc(1 - a.beta1), rest2 = Acc(1 - a.beta2),
            eps = Acc(a.eps), decay = Acc(a.lr * a.weight_decay);
  const bool near_m = a.beta1 > 0.5;  // else m + (g' - m) would lose a g' far smaller than m
  Chunks(a.sizes, a.tensors, host).for_each(host, [&](int64_t, const Chunks::Chunk& chunk) {
    const double t = a.steps[chunk.tensor];
    const Acc rate = Acc(a.lr / (1 - ::pow(a.beta1, t))), unbias = Acc(1 / __builtin_sqrt(1 - ::pow(a.beta2, t)));
    const T* const g = at<const T>(a.g, chunk);
    W *const p = at<W>(a.p, chunk), *const m = at<W>(a.m, chunk), *const v = at<W>(a.v, chunk);
    for_lanes<Acc>(chunk.size, [&](int64_t j, auto load, auto store) {
      const Vec<Acc> gj = load(g + j) * factor, pj = load(p + j);
      Vec<Acc> mj = load(m + j), vj = load(v + j);
      mj = near_m ? mj + rest1 * (gj - mj) : gj + beta1 * (mj - gj);
      vj = beta2 * vj + rest2 * (gj * gj);
      Vec<Acc> change = rate * mj / (sqrt(vj) * unbias + eps);
      if (decay != 0) change += decay * pj;
      store(m + j, mj);
      store(v + j, vj);
      store(p + j, pj - change);
    });
  });
}

template <class T, class W>
void grad_norm(const GradNorm<T, W>& a, const Host& host) {
  const Chunks chunks(a.sizes, a.tensors, host);
  double* const partial = scratch<double>(host, chunks.count());
  chunks.for_each(host, [&](int64_t task, const Chunks::Chunk& chunk) {
    partial[task] = sum_of_squares(at<const T>(a.g, chunk), chunk.size);
  });
  double total = 0;
  for (int64_t i = 0; i < chunks.count(); ++i) total += partial[i];
  *a.norm = from_float<W>(Compute<W>(__builtin_sqrt(total)));
}

template <class T, class W>
void scale_grads(const ScaleGrads<T, W>& a, const Host& host) {
  using Acc = Compute<T>;
  const Acc factor = Acc(to_float(*a.factor));
  if (factor == 1) return;
  Chunks(a.sizes, a.tensors, host).for_each(host, [&](int64_t, const Chunks::Chunk& chunk) {
    T* const g = at<T>(a.g, chunk);
    for_lanes<Acc>(chunk.size, [&](int64_t j, auto load, auto store) { store(g + j, load(g + j) * factor); });
  });
}

FASTFT_INSTANTIATE(adamw, AdamW)
FASTFT_INSTANTIATE(grad_norm, GradNorm)
FASTFT_INSTANTIATE(scale_grads, ScaleGrads)

}  // namespace FASTFT_NAMESPACE
