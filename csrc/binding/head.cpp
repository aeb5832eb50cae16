// torch.ops.fastft.head_forward / _backward; kernels.h has the shapes.
#include "torch.h"

namespace fastft::binding {
namespace {

template <class T, class W>
HeadForward<T, W> forward_args(const Tensor& loss, const Tensor& logits, const std::optional<Tensor>& stats,
                               const std::optional<Tensor>& divisor, const std::optional<Tensor>& row_loss,
                               const std::optional<Tensor>& blocks_done, int64_t* invalid, const Tensor& input,
                               const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target,
                               int64_t ignore_index, const std::optional<Tensor>& seed, int64_t threshold,
                               int64_t use) {
  const int64_t B = input.size(0), C = weight.size(0), H = input.size(1);
  return {pointer<W>(loss, "loss", {}),
          pointer<T>(logits, "logits", {B, C}),
          pointer<Statistic<T>>(stats, "stats", {2, B}),
          pointer<Statistic<T>>(divisor, "divisor", {}),
          pointer<Statistic<T>>(row_loss, "row_loss", {B}),
          pointer<int32_t>(blocks_done, "blocks_done", {1}),
          invalid,
          pointer<const T>(input, "input", {B, H}),
          pointer<const W>(weight, "weight", {C, H}),
          pointer<const W>(bias, "bias", {C}),
          pointer<const int64_t>(target, "target", {B}),
          B,
          C,
          H,
          ignore_index,
          pointer<const int64_t>(seed, "seed", {1}),
          threshold,
          use};
}

template <class T, class W>
HeadBackward<T, W> backward_args(const std::optional<Tensor>& grad_input, const std::optional<Tensor>& grad_weight,
                                 const std::optional<Tensor>& grad_bias, const std::optional<Tensor>& all_grad_logits,
                                 const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_logits,
                                 const Tensor& logits, const Tensor& stats, const Tensor& divisor, const Tensor& input,
                                 const Tensor& weight, const Tensor& target, int64_t ignore_index,
                                 const std::optional<Tensor>& seed, int64_t threshold, int64_t use) {
  const int64_t B = input.size(0), C = weight.size(0), H = input.size(1);
  if (!grad_loss && !grad_logits) refuse("grad_loss", "is missing");
  return {fresh<T>(grad_input, "grad_input", {B, H}),
          fresh<W>(grad_weight, "grad_weight", {C, H}),
          pointer<W>(grad_bias, "grad_bias", {C}),
          pointer<Statistic<T>>(all_grad_logits, "all_grad_logits", {B, C}),
          pointer<const W>(grad_loss, "grad_loss", {}),
          pointer<const T>(grad_logits, "grad_logits", {B, C}),
          pointer<const T>(logits, "logits", {B, C}),
          pointer<const Statistic<T>>(stats, "stats", {2, B}),
          pointer<const Statistic<T>>(divisor, "divisor", {}),
          pointer<const T>(input, "input", {B, H}),
          pointer<const W>(weight, "weight", {C, H}),
          pointer<const int64_t>(target, "target", {B}),
          B,
          C,
          H,
          ignore_index,
          pointer<const int64_t>(seed, "seed", {1}),
          threshold,
          use};
}

void forward_cpu(Tensor loss, Tensor logits, std::optional<Tensor> stats, std::optional<Tensor> divisor,
                 std::optional<Tensor> row_loss, std::optional<Tensor> blocks_done, Tensor input, Tensor weight,
                 std::optional<Tensor> bias, Tensor target, int64_t ignore_index, std::optional<Tensor> seed,
                 int64_t threshold, int64_t use) {
  int64_t invalid = -1;
  with_dtypes<false>(input.scalar_type(), weight.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    HostLease host;
    cpu::kernels().head_forward(
        forward_args<typename Y::T, typename Y::W>(loss, logits, stats, divisor, row_loss, blocks_done, &invalid, input,
                                                   weight, bias, target, ignore_index, seed, threshold, use),
        host);
  });
  if (invalid >= 0) refuse("target", "holds a class that is out of range");  // functional/head.py says which, and where
}

void backward_cpu(std::optional<Tensor> grad_input, std::optional<Tensor> grad_weight, std::optional<Tensor> grad_bias,
                  std::optional<Tensor> all_grad_logits, std::optional<Tensor> grad_loss,
                  std::optional<Tensor> grad_logits, Tensor logits, Tensor stats, Tensor divisor, Tensor input,
                  Tensor weight, Tensor target, int64_t ignore_index, std::optional<Tensor> seed, int64_t threshold,
                  int64_t use) {
  with_dtypes<false>(input.scalar_type(), weight.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    HostLease host;
    cpu::kernels().head_backward(backward_args<typename Y::T, typename Y::W>(
                                     grad_input, grad_weight, grad_bias, all_grad_logits, grad_loss, grad_logits,
                                     logits, stats, divisor, input, weight, target, ignore_index, seed, threshold, use),
                                 host);
  });
}

#ifdef FASTFT_WITH_CUDA
void forward_cuda(Tensor loss, Tensor logits, std::optional<Tensor> stats, std::optional<Tensor> divisor,
                  std::optional<Tensor> row_loss, std::optional<Tensor> blocks_done, Tensor input, Tensor weight,
                  std::optional<Tensor> bias, Tensor target, int64_t ignore_index, std::optional<Tensor> seed,
                  int64_t threshold, int64_t use) {
  if (!row_loss || !blocks_done) refuse("row_loss", "or blocks_done is missing");
  if (weight.size(0) > kHeadClasses) refuse("weight", "has too many classes");
  with_dtypes<true>(input.scalar_type(), weight.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    StreamLease stream(input);
    cuda::head_forward(
        forward_args<typename Y::T, typename Y::W>(loss, logits, stats, divisor, row_loss, blocks_done, nullptr, input,
                                                   weight, bias, target, ignore_index, seed, threshold, use),
        stream);
  });
}

void backward_cuda(std::optional<Tensor> grad_input, std::optional<Tensor> grad_weight, std::optional<Tensor> grad_bias,
                   std::optional<Tensor> all_grad_logits, std::optional<Tensor> grad_loss,
                   std::optional<Tensor> grad_logits, Tensor logits, Tensor stats, Tensor divisor, Tensor input,
                   Tensor weight, Tensor target, int64_t ignore_index, std::optional<Tensor> seed, int64_t threshold,
                   int64_t use) {
  if (!all_grad_logits) refuse("all_grad_logits", "is missing");
  with_dtypes<true>(input.scalar_type(), weight.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    StreamLease stream(input);
    cuda::head_backward(backward_args<typename Y::T, typename Y::W>(
                            grad_input, grad_weight, grad_bias, all_grad_logits, grad_loss, grad_logits, logits, stats,
                            divisor, input, weight, target, ignore_index, seed, threshold, use),
                        stream);
  });
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastft, m) {
  m.def(
      "head_forward(Tensor(a!) loss, Tensor(b!) logits, Tensor(c!)? stats, Tensor(d!)? divisor, Tensor(e!)? row_loss, "
      "Tensor(f!)? blocks_done, Tensor input, Tensor weight, Tensor? bias, Tensor target, int ignore_index, Tensor? "
      "seed, int threshold, int use) -> ()");
  m.def(
      "head_backward(Tensor(a!)? grad_input, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, Tensor(d!)? "
      "all_grad_logits, Tensor? grad_loss, Tensor? grad_logits, Tensor logits, Tensor stats, Tensor divisor, Tensor "
      "input, Tensor weight, Tensor target, int ignore_index, Tensor? seed, int threshold, int use) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastft, CPU, m) {
  m.impl("head_forward", TORCH_BOX(&forward_cpu));
  m.impl("head_backward", TORCH_BOX(&backward_cpu));
}
#ifdef FASTFT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastft, CUDA, m) {
  m.impl("head_forward", TORCH_BOX(&forward_cuda));
  m.impl("head_backward", TORCH_BOX(&backward_cuda));
}
#endif

}  // namespace fastft::binding
