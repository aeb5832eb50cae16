// torch.ops.fastft.linear_act_forward / _backward; kernels.h has the shapes.
#include "torch.h"

namespace fastft::binding {
namespace {

// Whether the kernel rounds a float32 input to T itself.
template <class T, class W>
bool takes_float(const Tensor& input) {
  return kTakesFloat<T, W> && !input.is_cuda() && input.scalar_type() == ScalarType::Float;
}

template <class T, class W>
LinearActForward<T, W> forward_args(const Tensor& output, const std::optional<Tensor>& preact, const Tensor& input,
                                    const Tensor& weight, const std::optional<Tensor>& bias, int64_t activation,
                                    const std::optional<Tensor>& low_weight) {
  const int64_t N = weight.size(0), K = weight.size(1), M = input.size(0);
  const Shape x = Shape::rows_like(input, M, K), y = Shape::rows_like(output, M, N);
  const bool x32 = takes_float<T, W>(input);
  return {fresh<T>(output, "output", y),
          fresh<T>(preact, "preact", y),
          x32 ? nullptr : pointer<const T>(input, "input", x),
          pointer<const W>(weight, "weight", {N, K}),
          pointer<const W>(bias, "bias", {N}),
          M,
          N,
          K,
          int(activation),
          x32 ? pointer<const float>(input, "input", x) : nullptr,
          pointer<const T>(low_weight, "low_weight", {N, K}),
          x.stride,
          y.stride};
}

template <class T, class W>
LinearActBackward<T, W> backward_args(const std::optional<Tensor>& grad_input, const std::optional<Tensor>& grad_weight,
                                      const std::optional<Tensor>& grad_bias, const Tensor& grad_output,
                                      const std::optional<Tensor>& preact, const Tensor& input, const Tensor& weight,
                                      int64_t activation, const std::optional<Tensor>& add,
                                      const std::optional<Tensor>& output, const std::optional<Tensor>& low_weight,
                                      const std::optional<Tensor>& grad_preact, const std::optional<Tensor>& partial,
                                      const std::optional<Tensor>& input_preact,
                                      const std::optional<Tensor>& input_again, int64_t input_activation) {
  const int64_t N = weight.size(0), K = weight.size(1), M = input.size(0);
  if (activation != 0 && !preact) refuse("preact", "is missing");
  const Shape x = Shape::rows_like(input, M, K), y = Shape::rows_like(grad_output, M, N);
  const bool x32 = takes_float<T, W>(input);
  const int64_t splits = partial ? partial->size(0) : 1;
  return {x32 ? nullptr : fresh<T>(grad_input, "grad_input", x),
          fresh<W>(grad_weight, "grad_weight", {N, K}),
          pointer<W>(grad_bias, "grad_bias", {N}),
          pointer<const T>(grad_output, "grad_output", y),
          pointer<const T>(preact, "preact", y),
          x32 ? nullptr : pointer<const T>(input, "input", x),
          pointer<const W>(weight, "weight", {N, K}),
          M,
          N,
          K,
          int(activation),
          x32 ? nullptr : pointer<const T>(add, "add", x),
          fresh<T>(output, "output", y),
          x32 ? pointer<const float>(input, "input", x) : nullptr,
          x32 ? fresh<float>(grad_input, "grad_input", x) : nullptr,
          x32 ? pointer<const float>(add, "add", x) : nullptr,
          pointer<const T>(low_weight, "low_weight", {N, K}),
          pointer<T>(grad_preact, "grad_preact", {M, N}),
          pointer<float>(partial, "partial", {splits, N * K + N}),
          splits,
          pointer<const T>(input_preact, "input_preact", x),
          pointer<T>(input_again, "input_again", x),
          int(input_activation),
          x.stride,
          y.stride};
}

#ifdef FASTFT_WITH_CUDA
// What only tensor cores ask for.
template <class T, class W>
void need_low_weight(const std::optional<Tensor>& low_weight) {
  if (!std::is_same_v<T, W> && !low_weight) refuse("low_weight", "is missing");
}
#endif

void forward_cpu(Tensor output, std::optional<Tensor> preact, Tensor input, Tensor weight, std::optional<Tensor> bias,
                 int64_t activation, std::optional<Tensor> low_weight) {
  with_dtypes<false>(output.scalar_type(), weight.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    HostLease host;
    cpu::kernels().linear_act_forward(
        forward_args<typename Y::T, typename Y::W>(output, preact, input, weight, bias, activation, low_weight), host);
  });
}

void backward_cpu(std::optional<Tensor> grad_input, std::optional<Tensor> grad_weight, std::optional<Tensor> grad_bias,
                  Tensor grad_output, std::optional<Tensor> preact, Tensor input, Tensor weight, int64_t activation,
                  std::optional<Tensor> add, std::optional<Tensor> output, std::optional<Tensor> low_weight,
                  std::optional<Tensor> grad_preact, std::optional<Tensor> partial, std::optional<Tensor> input_preact,
                  std::optional<Tensor> input_again, int64_t input_activation) {
  with_dtypes<false>(grad_output.scalar_type(), weight.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    HostLease host;
    cpu::kernels().linear_act_backward(
        backward_args<typename Y::T, typename Y::W>(grad_input, grad_weight, grad_bias, grad_output, preact, input,
                                                    weight, activation, add, output, low_weight, grad_preact, partial,
                                                    input_preact, input_again, input_activation),
        host);
  });
}

#ifdef FASTFT_WITH_CUDA
void forward_cuda(Tensor output, std::optional<Tensor> preact, Tensor input, Tensor weight, std::optional<Tensor> bias,
                  int64_t activation, std::optional<Tensor> low_weight) {
  with_dtypes<true>(input.scalar_type(), weight.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    StreamLease stream(input);
    need_low_weight<typename Y::T, typename Y::W>(low_weight);
    cuda::linear_act_forward(
        forward_args<typename Y::T, typename Y::W>(output, preact, input, weight, bias, activation, low_weight),
        stream);
  });
}

void backward_cuda(std::optional<Tensor> grad_input, std::optional<Tensor> grad_weight, std::optional<Tensor> grad_bias,
                   Tensor grad_output, std::optional<Tensor> preact, Tensor input, Tensor weight, int64_t activation,
                   std::optional<Tensor> add, std::optional<Tensor> output, std::optional<Tensor> low_weight,
                   std::optional<Tensor> grad_preact, std::optional<Tensor> partial, std::optional<Tensor> input_preact,
                   std::optional<Tensor> input_again, int64_t input_activation) {
  with_dtypes<true>(input.scalar_type(), weight.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    StreamLease stream(input);
    if (grad_input) need_low_weight<typename Y::T, typename Y::W>(low_weight);
    if (preact && !grad_preact && (grad_input || grad_weight || grad_bias)) refuse("grad_preact", "is missing");
    cuda::linear_act_backward(
        backward_args<typename Y::T, typename Y::W>(grad_input, grad_weight, grad_bias, grad_output, preact, input,
                                                    weight, activation, add, output, low_weight, grad_preact, partial,
                                                    input_preact, input_again, input_activation),
        stream);
  });
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastft, m) {
  m.def(
      "linear_act_forward(Tensor(a!) output, Tensor(b!)? preact, Tensor input, Tensor weight, Tensor? bias, int "
      "activation, Tensor? low_weight=None) -> ()");
  m.def(
      "linear_act_backward(Tensor(a!)? grad_input, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, Tensor grad_output, "
      "Tensor? preact, Tensor input, Tensor weight, int activation, Tensor? add=None, Tensor(d!)? output=None, Tensor? "
      "low_weight=None, Tensor(e!)? grad_preact=None, Tensor(f!)? partial=None, Tensor? input_preact=None, "
      "Tensor(g!)? input_again=None, int input_activation=0) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastft, CPU, m) {
  m.impl("linear_act_forward", TORCH_BOX(&forward_cpu));
  m.impl("linear_act_backward", TORCH_BOX(&backward_cpu));
}
#ifdef FASTFT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastft, CUDA, m) {
  m.impl("linear_act_forward", TORCH_BOX(&forward_cuda));
  m.impl("linear_act_backward", TORCH_BOX(&backward_cuda));
}
#endif

}  // namespace fastft::binding
