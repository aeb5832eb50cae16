// torch.ops.fastft.embedding_forward / _backward / _scatter; kernels.h has the shapes.
#include "torch.h"

namespace fastft::binding {
namespace {

using Maybe = std::optional<Tensor>;

// Rows of a table that are taken. On the CPU an id out of range would be foreign memory.
const int64_t* indices(const Maybe& ids, const char* name, int64_t M, int64_t rows) {
  const int64_t* const data = pointer<const int64_t>(ids, name, {M});
  if (!data || !ids->is_cpu()) return data;
  bool wrong = false;
  for (int64_t m = 0; m < M; ++m) wrong |= uint64_t(data[m]) >= uint64_t(rows);
  if (wrong) refuse(name, "has an index out of range");
  return data;
}

int64_t rows_of(const Maybe& table) { return table ? table->size(0) : 0; }

template <class T, class W>
EmbeddingForward<T, W> forward_args(const Tensor& output, const Maybe& mean, const Maybe& rstd, const Tensor& ids,
                                    const Tensor& position_ids, const Maybe& type_ids, const Tensor& word,
                                    const Tensor& position, const Maybe& type, const Tensor& weight, const Tensor& bias,
                                    double eps, const Maybe& seed, int64_t threshold, int64_t use) {
  const int64_t M = output.size(0), H = output.size(1), V = rows_of(word), P = rows_of(position), C = rows_of(type);
  if (type_ids && !type) refuse("type", "is missing");
  return {fresh<T>(output, "output", {M, H}),
          pointer<Statistic<W>>(mean, "mean", {M}),
          pointer<Statistic<W>>(rstd, "rstd", {M}),
          indices(ids, "ids", M, V),
          indices(position_ids, "position_ids", M, P),
          indices(type_ids, "type_ids", M, C),
          pointer<const W>(word, "word", {V, H}),
          pointer<const W>(position, "position", {P, H}),
          pointer<const W>(type, "type", {C, H}),
          pointer<const W>(weight, "weight", {H}),
          pointer<const W>(bias, "bias", {H}),
          M,
          H,
          V,
          P,
          C,
          eps,
          pointer<const int64_t>(seed, "seed", {1}),
          threshold,
          use};
}

template <class T, class W>
EmbeddingBackward<T, W> backward_args(const Maybe& grad_sum, const Maybe& grad_weight, const Maybe& grad_bias,
                                      const Maybe& partial, const Tensor& grad_output, const Tensor& mean,
                                      const Tensor& rstd, const Tensor& ids, const Tensor& position_ids,
                                      const Maybe& type_ids, const Tensor& word, const Tensor& position,
                                      const Maybe& type, const Tensor& weight, const Maybe& seed, int64_t threshold,
                                      int64_t use) {
  const int64_t M = grad_output.size(0), H = grad_output.size(1);
  const int64_t V = rows_of(word), P = rows_of(position), C = rows_of(type);
  if (type_ids && !type) refuse("type", "is missing");
  return {fresh<T>(grad_sum, "grad_sum", {M, H}),
          pointer<W>(grad_weight, "grad_weight", {H}),
          pointer<W>(grad_bias, "grad_bias", {H}),
          pointer<Statistic<W>>(partial, "partial", {(M + kSumRows - 1) / kSumRows, 2, H}),
          pointer<const T>(grad_output, "grad_output", {M, H}),
          pointer<const Statistic<W>>(mean, "mean", {M}),
          pointer<const Statistic<W>>(rstd, "rstd", {M}),
          indices(ids, "ids", M, V),
          indices(position_ids, "position_ids", M, P),
          indices(type_ids, "type_ids", M, C),
          pointer<const W>(word, "word", {V, H}),
          pointer<const W>(position, "position", {P, H}),
          pointer<const W>(type, "type", {C, H}),
          pointer<const W>(weight, "weight", {H}),
          M,
          H,
          V,
          P,
          C,
          pointer<const int64_t>(seed, "seed", {1}),
          threshold,
          use};
}

template <class T, class W>
EmbeddingScatter<T, W> scatter_args(const Tensor& grad_table, const Tensor& ids, const Maybe& order,
                                    const Tensor& grad_sum, int64_t padding, const Maybe& partial) {
  const int64_t M = grad_sum.size(0), H = grad_sum.size(1), V = grad_table.size(0);
  return {fresh<W>(grad_table, "grad_table", {V, H}),
          indices(ids, "ids", M, V),
          pointer<const int64_t>(order, "order", {M}),
          pointer<const T>(grad_sum, "grad_sum", {M, H}),
          M,
          H,
          V,
          padding,
          pointer<Statistic<W>>(partial, "partial", {(M + kScatterRows - 1) / kScatterRows, 2, H})};
}

void forward_cpu(Tensor output, Maybe mean, Maybe rstd, Tensor ids, Tensor position_ids, Maybe type_ids, Tensor word,
                 Tensor position, Maybe type, Tensor weight, Tensor bias, double eps, Maybe seed, int64_t threshold,
                 int64_t use) {
  with_dtypes<false>(output.scalar_type(), word.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    HostLease host;
    cpu::kernels().embedding_forward(
        forward_args<typename Y::T, typename Y::W>(output, mean, rstd, ids, position_ids, type_ids, word, position,
                                                   type, weight, bias, eps, seed, threshold, use),
        host);
  });
}

void backward_cpu(Maybe grad_sum, Maybe grad_weight, Maybe grad_bias, Maybe partial, Tensor grad_output, Tensor mean,
                  Tensor rstd, Tensor ids, Tensor position_ids, Maybe type_ids, Tensor word, Tensor position,
                  Maybe type, Tensor weight, Maybe seed, int64_t threshold, int64_t use) {
  with_dtypes<false>(grad_output.scalar_type(), word.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    HostLease host;
    cpu::kernels().embedding_backward(backward_args<typename Y::T, typename Y::W>(
                                          grad_sum, grad_weight, grad_bias, partial, grad_output, mean, rstd, ids,
                                          position_ids, type_ids, word, position, type, weight, seed, threshold, use),
                                      host);
  });
}

void scatter_cpu(Tensor grad_table, Tensor ids, Maybe order, Tensor grad_sum, int64_t padding, Maybe partial) {
  with_dtypes<false>(grad_sum.scalar_type(), grad_table.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    HostLease host;
    cpu::kernels().embedding_scatter(
        scatter_args<typename Y::T, typename Y::W>(grad_table, ids, order, grad_sum, padding, partial), host);
  });
}

#ifdef FASTFT_WITH_CUDA
void forward_cuda(Tensor output, Maybe mean, Maybe rstd, Tensor ids, Tensor position_ids, Maybe type_ids, Tensor word,
                  Tensor position, Maybe type, Tensor weight, Tensor bias, double eps, Maybe seed, int64_t threshold,
                  int64_t use) {
  with_dtypes<true>(output.scalar_type(), word.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    StreamLease stream(output);
    cuda::embedding_forward(
        forward_args<typename Y::T, typename Y::W>(output, mean, rstd, ids, position_ids, type_ids, word, position,
                                                   type, weight, bias, eps, seed, threshold, use),
        stream);
  });
}

void backward_cuda(Maybe grad_sum, Maybe grad_weight, Maybe grad_bias, Maybe partial, Tensor grad_output, Tensor mean,
                   Tensor rstd, Tensor ids, Tensor position_ids, Maybe type_ids, Tensor word, Tensor position,
                   Maybe type, Tensor weight, Maybe seed, int64_t threshold, int64_t use) {
  if ((grad_weight || grad_bias) && !partial) refuse("partial", "is missing");
  with_dtypes<true>(grad_output.scalar_type(), word.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    StreamLease stream(grad_output);
    cuda::embedding_backward(backward_args<typename Y::T, typename Y::W>(
                                 grad_sum, grad_weight, grad_bias, partial, grad_output, mean, rstd, ids, position_ids,
                                 type_ids, word, position, type, weight, seed, threshold, use),
                             stream);
  });
}

void scatter_cuda(Tensor grad_table, Tensor ids, Maybe order, Tensor grad_sum, int64_t padding, Maybe partial) {
  if (!order) refuse("order", "is missing");
  if (!partial) refuse("partial", "is missing");
  with_dtypes<true>(grad_sum.scalar_type(), grad_table.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    StreamLease stream(grad_sum);
    cuda::embedding_scatter(
        scatter_args<typename Y::T, typename Y::W>(grad_table, ids, order, grad_sum, padding, partial), stream);
  });
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastft, m) {
  m.def(
      "embedding_forward(Tensor(a!) output, Tensor(b!)? mean, Tensor(c!)? rstd, Tensor ids, Tensor position_ids, "
      "Tensor? type_ids, Tensor word, Tensor position, Tensor? type, Tensor weight, Tensor bias, float eps, Tensor? "
      "seed, int threshold, int use) -> ()");
  m.def(
      "embedding_backward(Tensor(a!)? grad_sum, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, Tensor(d!)? partial, "
      "Tensor grad_output, Tensor mean, Tensor rstd, Tensor ids, Tensor position_ids, Tensor? type_ids, Tensor word, "
      "Tensor position, Tensor? type, Tensor weight, Tensor? seed, int threshold, int use) -> ()");
  m.def(
      "embedding_scatter(Tensor(a!) grad_table, Tensor ids, Tensor? order, Tensor grad_sum, int padding, Tensor(b!)? "
      "partial=None) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastft, CPU, m) {
  m.impl("embedding_forward", TORCH_BOX(&forward_cpu));
  m.impl("embedding_backward", TORCH_BOX(&backward_cpu));
  m.impl("embedding_scatter", TORCH_BOX(&scatter_cpu));
}
#ifdef FASTFT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastft, CUDA, m) {
  m.impl("embedding_forward", TORCH_BOX(&forward_cuda));
  m.impl("embedding_backward", TORCH_BOX(&backward_cuda));
  m.impl("embedding_scatter", TORCH_BOX(&scatter_cuda));
}
#endif

}  // namespace fastft::binding
