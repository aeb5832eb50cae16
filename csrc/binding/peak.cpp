// torch.ops.fastft.peak_f32 / peak_bf16: FLOP/s of this machine's multiply-add units on torch's threads; cpu/peak.cpp.
#include "torch.h"

namespace fastft::binding {
namespace {

double peak_f32(double seconds) {
  HostLease host;
  return cpu::kernels().peak_f32(seconds, host);
}

double peak_bf16(double seconds) {
  HostLease host;
  return cpu::kernels().peak_bf16(seconds, host);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastft, m) {
  m.def("peak_f32(float seconds) -> float");
  m.def("peak_bf16(float seconds) -> float");
}
STABLE_TORCH_LIBRARY_IMPL(fastft, CompositeExplicitAutograd, m) {
  m.impl("peak_f32", TORCH_BOX(&peak_f32));
  m.impl("peak_bf16", TORCH_BOX(&peak_bf16));
}

}  // namespace fastft::binding
