// torch.ops.fastft.attention_forward / _backward; kernels.h has the shapes. Tensors of queries are (B, N, Sq, D) or, with
// cu_q, (T, N, D), in any layout whose last dimension is contiguous; likewise keys. mask is (B, N, Sq, Sk), expanded.
#include "torch.h"

namespace fastft::binding {
namespace {

struct Sizes {
  int64_t B, N, Sq, Sk, D, q_tokens, k_tokens, rows, key_rows;  // tokens: of a packed tensor
  const int32_t *cu_q, *cu_k;

  Sizes(const Tensor& query, const Tensor& key, const std::optional<Tensor>& cu_q, const std::optional<Tensor>& cu_k,
        int64_t max_q, int64_t max_k) {
    if (query.dim() != (cu_q ? 3 : 4)) refuse("query", "has the wrong number of dimensions");
    if (key.dim() != (cu_k ? 3 : 4)) refuse("key", "has the wrong number of dimensions");
    B = cu_q ? cu_q->numel() - 1 : query.size(0), N = query.size(1), D = query.size(cu_q ? 2 : 3);
    Sq = cu_q ? max_q : query.size(2), Sk = cu_k ? max_k : key.size(2);
    q_tokens = cu_q ? query.size(0) : 0, k_tokens = cu_k ? key.size(0) : 0;
    rows = cu_q ? N * q_tokens : B * N * Sq, key_rows = cu_k ? N * k_tokens : B * N * Sk;
    this->cu_q = starts(cu_q, "cu_q", Sq, q_tokens);
    this->cu_k = starts(cu_k, "cu_k", Sk, k_tokens);
  }

  const int32_t* starts(const std::optional<Tensor>& cu, const char* name, int64_t most, int64_t tokens) const {
    if (!cu) return nullptr;
    if (B < 0) refuse(name, "is empty");
    const int32_t* const data = pointer<const int32_t>(*cu, name, {B + 1});
    if (cu->is_cuda()) return data;  // checked where they are read
    bool right = data[0] == 0 && data[B] == tokens;
    for (int64_t b = 0; b < B; ++b) right &= data[b + 1] >= data[b] && data[b + 1] - data[b] <= most;
    if (!right) refuse(name, "does not cut the tokens into sequences of at most the given length");
    return data;
  }
};

// A tensor of heads as the kernels know it.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;

  Rows(const std::optional<Tensor>& tensor, const char* name, const Sizes& s, bool of_queries) {
    if (!tensor) return;
    data = data_of<T>(*tensor, name);
    const bool packed = of_queries ? s.cu_q : s.cu_k;
    const int64_t tokens = of_queries ? s.q_tokens : s.k_tokens, S = of_queries ? s.Sq : s.Sk;
    const bool fits =
        packed ? tensor->dim() == 3 && tensor->size(0) == tokens && tensor->size(1) == s.N && tensor->size(2) == s.D
               : tensor->dim() == 4 && tensor->size(0) == s.B && tensor->size(1) == s.N && tensor->size(2) == S &&
                     tensor->size(3) == s.D;
    if (!fits) refuse(name, "has the wrong shape");
    if (s.D > 1 && tensor->numel() > 0 && tensor->stride(packed ? 2 : 3) != 1)
      refuse(name, "is not contiguous in its last dimension");
    batch = packed ? 0 : tensor->stride(0), head = tensor->stride(1), token = tensor->stride(packed ? 0 : 2);
  }
};

template <class W>
struct Mask {
  const uint8_t* keep = nullptr;
  const W* bias = nullptr;
  int64_t batch = 0, head = 0, query = 0, key = 0;

  Mask(const std::optional<Tensor>& mask, const Sizes& s) {
    if (!mask) return;
    const Tensor& m = *mask;
    need_on(device_of_op, m, "mask");
    if (m.dim() != 4 || m.size(0) != s.B || m.size(1) != s.N || m.size(2) != s.Sq || m.size(3) != s.Sk)
      refuse("mask", "has the wrong shape");
    batch = m.stride(0), head = m.stride(1), query = m.stride(2), key = m.stride(3);
    if (m.scalar_type() == ScalarType::Bool)
      keep = static_cast<const uint8_t*>(m.const_data_ptr());
    else if (m.scalar_type() == DtypeOf<W>::value)
      bias = static_cast<const W*>(m.const_data_ptr());
    else
      refuse("mask", "has the wrong dtype");
  }
};

ScalarType mask_dtype(const Tensor& query, const std::optional<Tensor>& mask) {
  return mask && mask->scalar_type() != ScalarType::Bool ? mask->scalar_type() : query.scalar_type();
}

template <class T, class W>
AttentionForward<T, W> forward_args(const Tensor& output, const std::optional<Tensor>& stats, const Tensor& query,
                                    const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                                    const std::optional<Tensor>& cu_q, const std::optional<Tensor>& cu_k, int64_t max_q,
                                    int64_t max_k, double scale, bool causal, const std::optional<Tensor>& seed,
                                    int64_t threshold, int64_t use) {
  const Sizes s(query, key, cu_q, cu_k, max_q, max_k);
  const Rows<T> o(output, "output", s, true);
  const Rows<const T> q(query, "query", s, true), k(key, "key", s, false), v(value, "value", s, false);
  const Mask<W> m(mask, s);
  return {o.data,     pointer<Statistic<T>>(stats, "stats", {2, s.rows}),
          q.data,     k.data,
          v.data,     m.keep,
          m.bias,     s.cu_q,
          s.cu_k,     pointer<const int64_t>(seed, "seed", {1}),
          s.B,        s.N,
          s.Sq,       s.Sk,
          s.D,        s.rows,
          s.key_rows, o.batch,
          o.head,     o.token,
          q.batch,    q.head,
          q.token,    k.batch,
          k.head,     k.token,
          v.batch,    v.head,
          v.token,    m.batch,
          m.head,     m.query,
          m.key,      scale,
          causal,     threshold,
          use};
}

template <class T, class W>
AttentionBackward<T, W> backward_args(const std::optional<Tensor>& grad_query, const std::optional<Tensor>& grad_key,
                                      const std::optional<Tensor>& grad_value, const std::optional<Tensor>& delta,
                                      const Tensor& grad_output, const Tensor& stats, const Tensor& query,
                                      const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                                      const std::optional<Tensor>& cu_q, const std::optional<Tensor>& cu_k,
                                      int64_t max_q, int64_t max_k, double scale, bool causal,
                                      const std::optional<Tensor>& seed, int64_t threshold, int64_t use) {
  const Sizes s(query, key, cu_q, cu_k, max_q, max_k);
  const Rows<T> dq(grad_query, "grad_query", s, true), dk(grad_key, "grad_key", s, false),
      dv(grad_value, "grad_value", s, false);
  const Rows<const T> dy(grad_output, "grad_output", s, true), q(query, "query", s, true), k(key, "key", s, false),
      v(value, "value", s, false);
  const Mask<W> m(mask, s);
  return {dq.data,    dk.data,
          dv.data,    pointer<Statistic<T>>(delta, "delta", {s.rows}),
          dy.data,    pointer<const Statistic<T>>(stats, "stats", {2, s.rows}),
          q.data,     k.data,
          v.data,     m.keep,
          m.bias,     s.cu_q,
          s.cu_k,     pointer<const int64_t>(seed, "seed", {1}),
          s.B,        s.N,
          s.Sq,       s.Sk,
          s.D,        s.rows,
          s.key_rows, dq.batch,
          dq.head,    dq.token,
          dk.batch,   dk.head,
          dk.token,   dv.batch,
          dv.head,    dv.token,
          dy.batch,   dy.head,
          dy.token,   q.batch,
          q.head,     q.token,
          k.batch,    k.head,
          k.token,    v.batch,
          v.head,     v.token,
          m.batch,    m.head,
          m.query,    m.key,
          scale,      causal,
          threshold,  use};
}

void forward_cpu(Tensor output, std::optional<Tensor> stats, Tensor query, Tensor key, Tensor value,
                 std::optional<Tensor> mask, std::optional<Tensor> cu_q, std::optional<Tensor> cu_k, int64_t max_q,
                 int64_t max_k, double scale, bool causal, std::optional<Tensor> seed, int64_t threshold, int64_t use) {
  with_dtypes<false>(query.scalar_type(), mask_dtype(query, mask), [&](auto types) {
    using Y = decltype(types);
    HostLease host;
    cpu::kernels().attention_forward(
        forward_args<typename Y::T, typename Y::W>(output, stats, query, key, value, mask, cu_q, cu_k, max_q, max_k,
                                                   scale, causal, seed, threshold, use),
        host);
  });
}

void backward_cpu(std::optional<Tensor> grad_query, std::optional<Tensor> grad_key, std::optional<Tensor> grad_value,
                  std::optional<Tensor> delta, Tensor grad_output, Tensor stats, Tensor query, Tensor key, Tensor value,
                  std::optional<Tensor> mask, std::optional<Tensor> cu_q, std::optional<Tensor> cu_k, int64_t max_q,
                  int64_t max_k, double scale, bool causal, std::optional<Tensor> seed, int64_t threshold,
                  int64_t use) {
  with_dtypes<false>(query.scalar_type(), mask_dtype(query, mask), [&](auto types) {
    using Y = decltype(types);
    HostLease host;
    cpu::kernels().attention_backward(backward_args<typename Y::T, typename Y::W>(
                                          grad_query, grad_key, grad_value, delta, grad_output, stats, query, key,
                                          value, mask, cu_q, cu_k, max_q, max_k, scale, causal, seed, threshold, use),
                                      host);
  });
}

#ifdef FASTFT_WITH_CUDA
void forward_cuda(Tensor output, std::optional<Tensor> stats, Tensor query, Tensor key, Tensor value,
                  std::optional<Tensor> mask, std::optional<Tensor> cu_q, std::optional<Tensor> cu_k, int64_t max_q,
                  int64_t max_k, double scale, bool causal, std::optional<Tensor> seed, int64_t threshold,
                  int64_t use) {
  with_dtypes<true>(query.scalar_type(), mask_dtype(query, mask), [&](auto types) {
    using Y = decltype(types);
    StreamLease stream(query);
    cuda::attention_forward(
        forward_args<typename Y::T, typename Y::W>(output, stats, query, key, value, mask, cu_q, cu_k, max_q, max_k,
                                                   scale, causal, seed, threshold, use),
        stream);
  });
}

void backward_cuda(std::optional<Tensor> grad_query, std::optional<Tensor> grad_key, std::optional<Tensor> grad_value,
                   std::optional<Tensor> delta, Tensor grad_output, Tensor stats, Tensor query, Tensor key,
                   Tensor value, std::optional<Tensor> mask, std::optional<Tensor> cu_q, std::optional<Tensor> cu_k,
                   int64_t max_q, int64_t max_k, double scale, bool causal, std::optional<Tensor> seed,
                   int64_t threshold, int64_t use) {
  with_dtypes<true>(query.scalar_type(), mask_dtype(query, mask), [&](auto types) {
    using Y = decltype(types);
    StreamLease stream(query);
    cuda::attention_backward(backward_args<typename Y::T, typename Y::W>(
                                 grad_query, grad_key, grad_value, delta, grad_output, stats, query, key, value, mask,
                                 cu_q, cu_k, max_q, max_k, scale, causal, seed, threshold, use),
                             stream);
  });
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastft, m) {
  m.def(
      "attention_forward(Tensor(a!) output, Tensor(b!)? stats, Tensor query, Tensor key, Tensor value, Tensor? mask, "
      "Tensor? cu_q, Tensor? cu_k, int max_q, int max_k, float scale, bool causal, Tensor? seed, int threshold, int "
      "use) -> ()");
  m.def(
      "attention_backward(Tensor(a!)? grad_query, Tensor(b!)? grad_key, Tensor(c!)? grad_value, Tensor(d!)? delta, "
      "Tensor grad_output, "
      "Tensor stats, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? cu_q, Tensor? cu_k, "
      "int max_q, int max_k, float scale, bool causal, Tensor? seed, int threshold, int use) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastft, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&forward_cpu));
  m.impl("attention_backward", TORCH_BOX(&backward_cpu));
}
#ifdef FASTFT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastft, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&forward_cuda));
  m.impl("attention_backward", TORCH_BOX(&backward_cuda));
}
#endif

}  // namespace fastft::binding
