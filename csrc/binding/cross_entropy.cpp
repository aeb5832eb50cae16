// torch.ops.fastft.cross_entropy_forward / _backward / _with_grad; kernels.h has the shapes. input is (N, C, *): what
// follows C is one dimension, S, here. target is int64 for class indices, or has the loss's dtype for probabilities.
#include "torch.h"

namespace fastft::binding {
namespace {

struct Sizes {
  int64_t N, C, S, stats;
  bool indices;  // are in target
  Sizes(const Tensor& input, const Tensor& target, double label_smoothing)
      : S(1), indices(target.scalar_type() == ScalarType::Long) {
    if (input.dim() < 2 || input.size(1) == 0) refuse("input", "has no classes");
    N = input.size(0), C = input.size(1);
    for (int64_t i = 2; i < input.dim(); ++i) S *= input.size(i);
    if (S == 0) N = 0, S = 1;  // no rows, either way
    stats = indices && !(label_smoothing > 0) ? 2 : 3;
  }
};

constexpr char kOutOfRange[] =
    "holds a class that is out of range";  // functional/cross_entropy.py says which, and where

template <class T, class W>
CrossEntropyForward<T, W> forward_args(const Tensor& loss, const std::optional<Tensor>& stats,
                                       const std::optional<Tensor>& divisor, const std::optional<Tensor>& row_loss,
                                       int64_t* invalid, const Tensor& input, const Tensor& target,
                                       const std::optional<Tensor>& weight, int64_t ignore_index,
                                       double label_smoothing, int64_t reduction) {
  const auto [N, C, S, stats_of_row, indices] = Sizes(input, target, label_smoothing);
  return {reduction == kNone ? pointer<W>(loss, "loss", {N, S}) : pointer<W>(loss, "loss", {}),
          pointer<Statistic<T>>(stats, "stats", {stats_of_row, N, S}),
          pointer<Statistic<T>>(divisor, "divisor", {}),
          pointer<Statistic<T>>(row_loss, "row_loss", {N, S}),
          invalid,
          pointer<const T>(input, "input", {N, C, S}),
          indices ? pointer<const int64_t>(target, "target", {N, S}) : nullptr,
          indices ? nullptr : pointer<const W>(target, "target", {N, C, S}),
          pointer<const W>(weight, "weight", {C}),
          N,
          C,
          S,
          ignore_index,
          label_smoothing,
          int(reduction)};
}

template <class T, class W>
CrossEntropyBackward<T, W> backward_args(const std::optional<Tensor>& grad_input,
                                         const std::optional<Tensor>& grad_target, const Tensor& grad_output,
                                         const Tensor& stats, const std::optional<Tensor>& divisor, const Tensor& input,
                                         const Tensor& target, const std::optional<Tensor>& weight,
                                         int64_t ignore_index, double label_smoothing, int64_t reduction) {
  const auto [N, C, S, stats_of_row, indices] = Sizes(input, target, label_smoothing);
  if (indices && grad_target) refuse("grad_target", "does not exist for class indices");
  if (reduction == kMean && !divisor) refuse("divisor", "is missing");
  return {fresh<T>(grad_input, "grad_input", {N, C, S}),
          fresh<W>(grad_target, "grad_target", {N, C, S}),
          reduction == kNone ? pointer<const W>(grad_output, "grad_output", {N, S})
                             : pointer<const W>(grad_output, "grad_output", {}),
          pointer<const Statistic<T>>(stats, "stats", {stats_of_row, N, S}),
          pointer<const Statistic<T>>(divisor, "divisor", {}),
          pointer<const T>(input, "input", {N, C, S}),
          indices ? pointer<const int64_t>(target, "target", {N, S}) : nullptr,
          indices ? nullptr : pointer<const W>(target, "target", {N, C, S}),
          pointer<const W>(weight, "weight", {C}),
          N,
          C,
          S,
          ignore_index,
          label_smoothing,
          int(reduction)};
}

void forward_cpu(Tensor loss, std::optional<Tensor> stats, std::optional<Tensor> divisor,
                 std::optional<Tensor> row_loss, Tensor input, Tensor target, std::optional<Tensor> weight,
                 int64_t ignore_index, double label_smoothing, int64_t reduction) {
  int64_t invalid = -1;
  with_dtypes<false>(input.scalar_type(), loss.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    HostLease host;
    cpu::kernels().cross_entropy_forward(
        forward_args<typename Y::T, typename Y::W>(loss, stats, divisor, row_loss, &invalid, input, target, weight,
                                                   ignore_index, label_smoothing, reduction),
        host);
  });
  if (invalid >= 0) refuse("target", kOutOfRange);
}

void backward_cpu(std::optional<Tensor> grad_input, std::optional<Tensor> grad_target, Tensor grad_output, Tensor stats,
                  std::optional<Tensor> divisor, Tensor input, Tensor target, std::optional<Tensor> weight,
                  int64_t ignore_index, double label_smoothing, int64_t reduction) {
  with_dtypes<false>(input.scalar_type(), grad_output.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    HostLease host;
    cpu::kernels().cross_entropy_backward(
        backward_args<typename Y::T, typename Y::W>(grad_input, grad_target, grad_output, stats, divisor, input, target,
                                                    weight, ignore_index, label_smoothing, reduction),
        host);
  });
}

void with_grad_cpu(Tensor loss, Tensor stats, std::optional<Tensor> divisor, Tensor grad_input, double grad_output,
                   Tensor input, Tensor target, std::optional<Tensor> weight, int64_t ignore_index, int64_t reduction) {
  const auto [N, C, S, stats_of_row, indices] = Sizes(input, target, 0.0);
  if (!indices || input.dim() != 2) refuse("input", "must be (N, C) and target class indices");
  if (reduction == kNone) refuse("loss", "must be of all rows");
  int64_t invalid = -1;
  with_dtypes<false>(input.scalar_type(), loss.scalar_type(), [&](auto types) {
    using T = typename decltype(types)::T;
    using W = typename decltype(types)::W;
    HostLease host;
    cpu::kernels().cross_entropy_with_grad(
        CrossEntropyWithGrad<T, W>{
            pointer<W>(loss, "loss", {}), pointer<Statistic<T>>(stats, "stats", {2, N}),
            pointer<Statistic<T>>(divisor, "divisor", {}), fresh<T>(grad_input, "grad_input", {N, C}), &invalid,
            grad_output, pointer<const T>(input, "input", {N, C}), pointer<const int64_t>(target, "target", {N}),
            pointer<const W>(weight, "weight", {C}), N, C, ignore_index, int(reduction)},
        host);
  });
  if (invalid >= 0) refuse("target", kOutOfRange);
}

#ifdef FASTFT_WITH_CUDA
void forward_cuda(Tensor loss, std::optional<Tensor> stats, std::optional<Tensor> divisor,
                  std::optional<Tensor> row_loss, Tensor input, Tensor target, std::optional<Tensor> weight,
                  int64_t ignore_index, double label_smoothing, int64_t reduction) {
  if (reduction != kNone && !row_loss) refuse("row_loss", "is missing");
  with_dtypes<true>(input.scalar_type(), loss.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    StreamLease stream(input);
    cuda::cross_entropy_forward(
        forward_args<typename Y::T, typename Y::W>(loss, stats, divisor, row_loss, nullptr, input, target, weight,
                                                   ignore_index, label_smoothing, reduction),
        stream);
  });
}

void backward_cuda(std::optional<Tensor> grad_input, std::optional<Tensor> grad_target, Tensor grad_output,
                   Tensor stats, std::optional<Tensor> divisor, Tensor input, Tensor target,
                   std::optional<Tensor> weight, int64_t ignore_index, double label_smoothing, int64_t reduction) {
  with_dtypes<true>(input.scalar_type(), grad_output.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    StreamLease stream(input);
    cuda::cross_entropy_backward(
        backward_args<typename Y::T, typename Y::W>(grad_input, grad_target, grad_output, stats, divisor, input, target,
                                                    weight, ignore_index, label_smoothing, reduction),
        stream);
  });
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastft, m) {
  m.def(
      "cross_entropy_forward(Tensor(a!) loss, Tensor(b!)? stats, Tensor(c!)? divisor, Tensor(d!)? row_loss, Tensor "
      "input, Tensor target, "
      "Tensor? weight, int ignore_index, float label_smoothing, int reduction) -> ()");
  m.def(
      "cross_entropy_backward(Tensor(a!)? grad_input, Tensor(b!)? grad_target, Tensor grad_output, Tensor stats, "
      "Tensor? divisor, Tensor input, "
      "Tensor target, Tensor? weight, int ignore_index, float label_smoothing, int reduction) -> ()");
  m.def(
      "cross_entropy_with_grad(Tensor(a!) loss, Tensor(b!) stats, Tensor(c!)? divisor, Tensor(d!) grad_input, float "
      "grad_output, Tensor input, Tensor target, Tensor? weight, int ignore_index, int reduction) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastft, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&forward_cpu));
  m.impl("cross_entropy_backward", TORCH_BOX(&backward_cpu));
  m.impl("cross_entropy_with_grad", TORCH_BOX(&with_grad_cpu));
}
#ifdef FASTFT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastft, CUDA, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&forward_cuda));
  m.impl("cross_entropy_backward", TORCH_BOX(&backward_cuda));
}
#endif

}  // namespace fastft::binding
