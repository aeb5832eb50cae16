// torch.ops.fastft.layer_norm_forward / _backward; kernels.h has the shapes.
#include "torch.h"

namespace fastft::binding {
namespace {

template <class T, class W>
LayerNormForward<T, W> forward_args(const Tensor& output, const std::optional<Tensor>& sum,
                                    const std::optional<Tensor>& mean, const std::optional<Tensor>& rstd,
                                    const Tensor& input, const std::optional<Tensor>& residual,
                                    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                                    const std::optional<Tensor>& seed, int64_t threshold, int64_t use) {
  const int64_t M = input.size(0), H = input.size(1);
  return {fresh<W>(output, "output", {M, H}),
          fresh<W>(sum, "sum", {M, H}),
          pointer<Statistic<W>>(mean, "mean", {M}),
          pointer<Statistic<W>>(rstd, "rstd", {M}),
          pointer<const T>(input, "input", {M, H}),
          pointer<const W>(residual, "residual", {M, H}),
          pointer<const W>(weight, "weight", {H}),
          pointer<const W>(bias, "bias", {H}),
          M,
          H,
          eps,
          pointer<const int64_t>(seed, "seed", {1}),
          threshold,
          use};
}

template <class T, class W>
LayerNormBackward<T, W> backward_args(const std::optional<Tensor>& grad_input,
                                      const std::optional<Tensor>& grad_residual,
                                      const std::optional<Tensor>& grad_weight, const std::optional<Tensor>& grad_bias,
                                      const std::optional<Tensor>& partial, const Tensor& grad_output,
                                      const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                                      const std::optional<Tensor>& weight, const std::optional<Tensor>& seed,
                                      int64_t threshold, int64_t use) {
  const int64_t M = grad_output.size(0), H = grad_output.size(1);
  return {fresh<T>(grad_input, "grad_input", {M, H}),
          fresh<W>(grad_residual, "grad_residual", {M, H}),
          pointer<W>(grad_weight, "grad_weight", {H}),
          pointer<W>(grad_bias, "grad_bias", {H}),
          pointer<Statistic<W>>(partial, "partial", {(M + kSumRows - 1) / kSumRows, 2, H}),
          pointer<const W>(grad_output, "grad_output", {M, H}),
          pointer<const W>(sum, "sum", {M, H}),
          pointer<const Statistic<W>>(mean, "mean", {M}),
          pointer<const Statistic<W>>(rstd, "rstd", {M}),
          pointer<const W>(weight, "weight", {H}),
          M,
          H,
          pointer<const int64_t>(seed, "seed", {1}),
          threshold,
          use};
}

void forward_cpu(Tensor output, std::optional<Tensor> sum, std::optional<Tensor> mean, std::optional<Tensor> rstd,
                 Tensor input, std::optional<Tensor> residual, std::optional<Tensor> weight, std::optional<Tensor> bias,
                 double eps, std::optional<Tensor> seed, int64_t threshold, int64_t use) {
  with_dtypes<false>(input.scalar_type(), output.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    HostLease host;
    cpu::kernels().layer_norm_forward(
        forward_args<typename Y::T, typename Y::W>(output, sum, mean, rstd, input, residual, weight, bias, eps, seed,
                                                   threshold, use),
        host);
  });
}

void backward_cpu(std::optional<Tensor> grad_input, std::optional<Tensor> grad_residual,
                  std::optional<Tensor> grad_weight, std::optional<Tensor> grad_bias, std::optional<Tensor> partial,
                  Tensor grad_output, Tensor sum, Tensor mean, Tensor rstd, std::optional<Tensor> weight,
                  std::optional<Tensor> seed, int64_t threshold, int64_t use) {
  const ScalarType W = grad_output.scalar_type();
  with_dtypes<false>(grad_input ? grad_input->scalar_type() : W, W, [&](auto types) {
    using Y = decltype(types);
    HostLease host;
    cpu::kernels().layer_norm_backward(
        backward_args<typename Y::T, typename Y::W>(grad_input, grad_residual, grad_weight, grad_bias, partial,
                                                    grad_output, sum, mean, rstd, weight, seed, threshold, use),
        host);
  });
}

#ifdef FASTFT_WITH_CUDA
void forward_cuda(Tensor output, std::optional<Tensor> sum, std::optional<Tensor> mean, std::optional<Tensor> rstd,
                  Tensor input, std::optional<Tensor> residual, std::optional<Tensor> weight,
                  std::optional<Tensor> bias, double eps, std::optional<Tensor> seed, int64_t threshold, int64_t use) {
  with_dtypes<true>(input.scalar_type(), output.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    StreamLease stream(input);
    cuda::layer_norm_forward(forward_args<typename Y::T, typename Y::W>(output, sum, mean, rstd, input, residual,
                                                                        weight, bias, eps, seed, threshold, use),
                             stream);
  });
}

void backward_cuda(std::optional<Tensor> grad_input, std::optional<Tensor> grad_residual,
                   std::optional<Tensor> grad_weight, std::optional<Tensor> grad_bias, std::optional<Tensor> partial,
                   Tensor grad_output, Tensor sum, Tensor mean, Tensor rstd, std::optional<Tensor> weight,
                   std::optional<Tensor> seed, int64_t threshold, int64_t use) {
  if ((grad_weight || grad_bias) && !partial) refuse("partial", "is missing");
  const ScalarType W = grad_output.scalar_type();
  with_dtypes<true>(grad_input ? grad_input->scalar_type() : W, W, [&](auto types) {
    using Y = decltype(types);
    StreamLease stream(grad_output);
    cuda::layer_norm_backward(
        backward_args<typename Y::T, typename Y::W>(grad_input, grad_residual, grad_weight, grad_bias, partial,
                                                    grad_output, sum, mean, rstd, weight, seed, threshold, use),
        stream);
  });
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastft, m) {
  m.def(
      "layer_norm_forward(Tensor(a!) output, Tensor(b!)? sum, Tensor(c!)? mean, Tensor(d!)? rstd, Tensor input, "
      "Tensor? residual, Tensor? weight, Tensor? bias, float eps, Tensor? seed, int threshold, int use) -> ()");
  m.def(
      "layer_norm_backward(Tensor(a!)? grad_input, Tensor(b!)? grad_residual, Tensor(c!)? grad_weight, Tensor(d!)? "
      "grad_bias, Tensor(e!)? partial, Tensor grad_output, Tensor sum, Tensor mean, Tensor rstd, Tensor? weight, "
      "Tensor? seed, int threshold, int use) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastft, CPU, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&forward_cpu));
  m.impl("layer_norm_backward", TORCH_BOX(&backward_cpu));
}
#ifdef FASTFT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastft, CUDA, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&forward_cuda));
  m.impl("layer_norm_backward", TORCH_BOX(&backward_cuda));
}
#endif

}  // namespace fastft::binding
