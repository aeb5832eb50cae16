// torch.ops.fastft.adamw, grad_norm, scale_grads; kernels.h has the arguments. Addresses are taken anew in every call.
#include <vector>

#include "torch.h"

namespace fastft::binding {
namespace {

using Tensors = std::vector<Tensor>;

std::vector<int64_t> sizes_of(const Tensors& tensors) {
  std::vector<int64_t> sizes;
  for (const Tensor& tensor : tensors) sizes.push_back(tensor.numel());
  return sizes;
}

// Of dense tensors of exactly these numbers of elements; 0 for those that are empty, if any may be.
enum Presence { kAll, kSome };
template <class T>
std::vector<int64_t> addresses(const Tensors& tensors, const char* name, const std::vector<int64_t>& sizes,
                               Presence presence = kAll) {
  if (tensors.size() != sizes.size()) refuse(name, "is a list of the wrong length");
  std::vector<int64_t> found;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const bool missing = presence == kSome && tensors[i].numel() == 0;
    found.push_back(missing ? 0 : reinterpret_cast<int64_t>(pointer<T>(tensors[i], name, {sizes[i]})));
  }
  return found;
}

// A step's number is a CPU tensor of float, or of double where that is PyTorch's default dtype; the kernel's arguments and the steps after it.
template <class F>
void count_step(const Tensor& step, std::vector<double>& steps) {
  F& value = *pointer<F>(step, "steps", {1}, kCpu);
  steps.push_back(double(value += 1));
}

std::vector<double> count_steps(const Tensors& tensors, size_t count) {
  if (tensors.size() != count) refuse("steps", "is a list of the wrong length");
  std::vector<double> steps;
  for (const Tensor& step : tensors) {
    if (step.scalar_type() == ScalarType::Double)
      count_step<double>(step, steps);
    else
      count_step<float>(step, steps);
  }
  return steps;
}

const Tensor& first(const Tensors& tensors, const char* name) {
  if (tensors.empty()) refuse(name, "is an empty list");
  return tensors[0];
}

// Calls run(the kernel's arguments); moments that have never been written are given huge pages.
template <class T, class W, class Run>
void with_adamw_args(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                     const Tensors& step_counts, const std::optional<Tensor>& factor, double lr, double beta1,
                     double beta2, double eps, double weight_decay, bool maximize, const std::optional<Tensors>& low,
                     const Run& run) {
  const std::vector<int64_t> sizes = sizes_of(params);
  const auto p = addresses<W>(params, "params", sizes), g = addresses<const T>(grads, "grads", sizes),
             m = addresses<W>(exp_avgs, "exp_avgs", sizes), v = addresses<W>(exp_avg_sqs, "exp_avg_sqs", sizes);
  if (low && !std::is_same_v<W, float>) refuse("low", "is given for parameters that are not float32");
  const bool is_f16 = low && first(*low, "low").scalar_type() == ScalarType::Half;
  const std::vector<int64_t> copies = !low     ? std::vector<int64_t>()
                                      : is_f16 ? addresses<f16>(*low, "low", sizes, kSome)
                                               : addresses<bf16>(*low, "low", sizes, kSome);
  const auto* const scale = pointer<const Statistic<W>>(factor, "factor", {1});
  const std::vector<double> steps = count_steps(step_counts, sizes.size());
  if (params[0].is_cpu())
    for (size_t i = 0; i < sizes.size(); ++i)
      if (steps[i] == 1)
        for (const int64_t moment : {m[i], v[i]})
          advise_huge_pages(reinterpret_cast<void*>(moment), size_t(sizes[i]) * sizeof(W), false);
  run(AdamW<T, W>{p.data(), g.data(), m.data(), v.data(), sizes.data(), steps.data(), int64_t(sizes.size()), scale, lr,
                  beta1, beta2, eps, weight_decay, maximize, low ? copies.data() : nullptr, is_f16});
}

template <class T, class W, class Run>
void with_norm_args(const Tensor& norm, const std::optional<Tensor>& partial, const Tensors& grads, const Run& run) {
  const std::vector<int64_t> sizes = sizes_of(grads), g = addresses<const T>(grads, "grads", sizes);
  int64_t chunks = 0;
  for (const int64_t size : sizes) chunks += (size + kOptimizerChunk - 1) / kOptimizerChunk;
  run(GradNorm<T, W>{pointer<W>(norm, "norm", {1}), pointer<double>(partial, "partial", {chunks}), g.data(),
                     sizes.data(), int64_t(sizes.size())});
}

template <class T, class W, class Run>
void with_scale_args(const Tensors& grads, const Tensor& factor, const Run& run) {
  const std::vector<int64_t> sizes = sizes_of(grads), g = addresses<T>(grads, "grads", sizes);
  run(ScaleGrads<T, W>{g.data(), sizes.data(), int64_t(sizes.size()), pointer<const W>(factor, "factor", {1})});
}

void adamw_cpu(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps,
               std::optional<Tensor> factor, double lr, double beta1, double beta2, double eps, double weight_decay,
               bool maximize, std::optional<Tensors> low) {
  if (low) refuse("low", "is written on CUDA only");
  const ScalarType W = first(params, "params").scalar_type(), T = first(grads, "grads").scalar_type();
  with_dtypes<false>(T, W, [&](auto types) {
    using Y = decltype(types);
    HostLease host;
    with_adamw_args<typename Y::T, typename Y::W>(params, grads, exp_avgs, exp_avg_sqs, steps, factor, lr, beta1, beta2,
                                                  eps, weight_decay, maximize, low,
                                                  [&](const auto& args) { cpu::kernels().adamw(args, host); });
  });
}

void grad_norm_cpu(Tensor norm, std::optional<Tensor> partial, Tensors grads) {
  with_dtypes<false>(first(grads, "grads").scalar_type(), norm.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    HostLease host;
    with_norm_args<typename Y::T, typename Y::W>(norm, partial, grads,
                                                 [&](const auto& args) { cpu::kernels().grad_norm(args, host); });
  });
}

void scale_grads_cpu(Tensors grads, Tensor factor) {
  with_dtypes<false>(first(grads, "grads").scalar_type(), factor.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    HostLease host;
    with_scale_args<typename Y::T, typename Y::W>(grads, factor,
                                                  [&](const auto& args) { cpu::kernels().scale_grads(args, host); });
  });
}

#ifdef FASTFT_WITH_CUDA
void adamw_cuda(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps,
                std::optional<Tensor> factor, double lr, double beta1, double beta2, double eps, double weight_decay,
                bool maximize, std::optional<Tensors> low) {
  const ScalarType W = first(params, "params").scalar_type(), T = first(grads, "grads").scalar_type();
  with_dtypes<true>(T, W, [&](auto types) {
    using Y = decltype(types);
    StreamLease stream(params[0]);
    with_adamw_args<typename Y::T, typename Y::W>(params, grads, exp_avgs, exp_avg_sqs, steps, factor, lr, beta1, beta2,
                                                  eps, weight_decay, maximize, low,
                                                  [&](const auto& args) { cuda::adamw(args, stream); });
  });
}

void grad_norm_cuda(Tensor norm, std::optional<Tensor> partial, Tensors grads) {
  if (!partial) refuse("partial", "is missing");
  with_dtypes<true>(first(grads, "grads").scalar_type(), norm.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    StreamLease stream(grads[0]);
    with_norm_args<typename Y::T, typename Y::W>(norm, partial, grads,
                                                 [&](const auto& args) { cuda::grad_norm(args, stream); });
  });
}

void scale_grads_cuda(Tensors grads, Tensor factor) {
  with_dtypes<true>(first(grads, "grads").scalar_type(), factor.scalar_type(), [&](auto types) {
    using Y = decltype(types);
    StreamLease stream(grads[0]);
    with_scale_args<typename Y::T, typename Y::W>(grads, factor,
                                                  [&](const auto& args) { cuda::scale_grads(args, stream); });
  });
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastft, m) {
  m.def(
      "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
      "Tensor? factor, float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize, Tensor(e!)[]? "
      "low=None) -> ()");
  m.def("grad_norm(Tensor(a!) norm, Tensor(b!)? partial, Tensor[] grads) -> ()");
  m.def("scale_grads(Tensor(a!)[] grads, Tensor factor) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastft, CPU, m) {
  m.impl("adamw", TORCH_BOX(&adamw_cpu));
  m.impl("grad_norm", TORCH_BOX(&grad_norm_cpu));
  m.impl("scale_grads", TORCH_BOX(&scale_grads_cpu));
}
#ifdef FASTFT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastft, CUDA, m) {
  m.impl("adamw", TORCH_BOX(&adamw_cuda));
  m.impl("grad_norm", TORCH_BOX(&grad_norm_cuda));
  m.impl("scale_grads", TORCH_BOX(&scale_grads_cuda));
}
#endif

}  // namespace fastft::binding
