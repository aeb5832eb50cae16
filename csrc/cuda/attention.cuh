// What both kernels of attention share: where the rows of a sequence and head lie. Kernels include <cassert> before this.
#pragma once
#include <type_traits>

#include "device.cuh"

namespace fastft::cuda {

// One head of one sequence.
struct Sequence {
  int64_t b, h;
  int64_t queries, keys;      // rows of it
  int64_t q_row, k_row, row;  // as in cpu/attention.cpp

  template <class Args>
  __device__ Sequence(const Args& p, int64_t b, int64_t h)
      : b(b), h(h), queries(p.Sq), keys(p.Sk), q_row(0), k_row(0), row((b * p.N + h) * p.Sq) {
    if (p.cu_q) {
      q_row = p.cu_q[b], queries = p.cu_q[b + 1] - q_row;
      assert(q_row >= 0 && queries >= 0 && queries <= p.Sq && q_row + queries <= p.rows / p.N &&
             "attention: cu_seqlens do not cut the tokens into sequences of at most max_seqlen");
      row = h * (p.rows / p.N) + q_row;
    }
    if (p.cu_k) {
      k_row = p.cu_k[b], keys = p.cu_k[b + 1] - k_row;
      assert(k_row >= 0 && keys >= 0 && keys <= p.Sk && k_row + keys <= p.key_rows / p.N &&
             "attention: cu_seqlens do not cut the tokens into sequences of at most max_seqlen");
    }
  }

  template <class Args, class E>
  __device__ E* query(const Args& p, E* data, int64_t batch, int64_t head, int64_t token, int64_t i) const {
    return data + (p.cu_q ? 0 : b * batch) + h * head + (q_row + i) * token;
  }
  template <class Args, class E>
  __device__ E* key(const Args& p, E* data, int64_t batch, int64_t head, int64_t token, int64_t j) const {
    return data + (p.cu_k ? 0 : b * batch) + h * head + (k_row + j) * token;
  }
};

// The arguments with a mask as if of T; whether it is of float is told at run time, as its type would double the kernels.
template <class T, class W>
AttentionForward<T, T> erased(const AttentionForward<T, W>& p) {
  return bit_cast<AttentionForward<T, T>>(p);
}
template <class T, class W>
AttentionBackward<T, T> erased(const AttentionBackward<T, W>& p) {
  return bit_cast<AttentionBackward<T, T>>(p);
}
template <class F, class T>
__device__ F bias_at(const T* bias, int64_t place, bool float_bias) {
  return float_bias ? F(reinterpret_cast<const float*>(bias)[place]) : F(to_float(bias[place]));
}

// For heads of at most 128 elements of bf16 or f16, on tensor cores: attention_sm80.cu.
constexpr int kLargestTensorHead = 128;
template <class T>
constexpr bool kTensorAttention = std::is_same_v<T, bf16> || std::is_same_v<T, f16>;
template <class T, class W>
void tensor_attention_forward(const AttentionForward<T, W>&, Stream);
template <class T, class W>
void tensor_attention_backward(const AttentionBackward<T, W>&, Stream);

}  // namespace fastft::cuda
