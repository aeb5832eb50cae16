// torch.ops.fastft.peak_f32 … tile_bf16: FLOP/s of this machine on torch's threads; cpu/peak.cpp.
#include "torch.h"

namespace fastft::binding {
namespace {

template <double (*cpu::Kernels::*kRate)(double, const Host&)>
double rate(double seconds) {
  HostLease host;
  return (cpu::kernels().*kRate)(seconds, host);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastft, m) {
  m.def("peak_f32(float seconds) -> float");
  m.def("peak_bf16(float seconds) -> float");
  m.def("tile_f32(float seconds) -> float");
  m.def("tile_bf16(float seconds) -> float");
}
STABLE_TORCH_LIBRARY_IMPL(fastft, CompositeExplicitAutograd, m) {
  m.impl("peak_f32", TORCH_BOX(&rate<&cpu::Kernels::peak_f32>));
  m.impl("peak_bf16", TORCH_BOX(&rate<&cpu::Kernels::peak_bf16>));
  m.impl("tile_f32", TORCH_BOX(&rate<&cpu::Kernels::tile_f32>));
  m.impl("tile_bf16", TORCH_BOX(&rate<&cpu::Kernels::tile_bf16>));
}

}  // namespace fastft::binding
