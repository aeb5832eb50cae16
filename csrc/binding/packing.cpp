// torch.ops.fastft.pack_rows / unpack_rows, of CUDA only; kernels.h has the shapes.
#include "torch.h"

namespace fastft::binding {

#ifdef FASTFT_WITH_CUDA
namespace {

// rows (B, S, H) and (T, H), of which the first two are given
struct Sizes {
  int64_t tokens, B, S, H;

  Sizes(const Tensor& padded, const Tensor& packed) : tokens(packed.size(0)), H(packed.size(1)) {
    if (padded.dim() != 3 || padded.size(2) != H) refuse("padded", "is not (B, S, H)");
    B = padded.size(0), S = padded.size(1);
  }
};

void pack_cuda(Tensor packed, Tensor padded, std::optional<Tensor> present, Tensor cu_seqlens) {
  const auto [tokens, B, S, H] = Sizes(padded, packed);
  with_dtypes<true>(packed.scalar_type(), packed.scalar_type(), [&, tokens = tokens, B = B, S = S, H = H](auto types) {
    using T = typename decltype(types)::T;
    StreamLease stream(padded);
    cuda::pack_rows(
        PackRows<T, T>{pointer<T>(packed, "packed", {tokens, H}), pointer<const T>(padded, "padded", {B, S, H}),
                       pointer<const uint8_t>(present, "present", {B, S}),
                       pointer<const int32_t>(cu_seqlens, "cu_seqlens", {B + 1}), tokens, B, S, H},
        stream);
  });
}

void unpack_cuda(Tensor padded, Tensor packed, Tensor cu_seqlens) {
  const auto [tokens, B, S, H] = Sizes(padded, packed);
  with_dtypes<true>(packed.scalar_type(), packed.scalar_type(), [&, tokens = tokens, B = B, S = S, H = H](auto types) {
    using T = typename decltype(types)::T;
    StreamLease stream(packed);
    cuda::unpack_rows(
        UnpackRows<T, T>{pointer<T>(padded, "padded", {B, S, H}), pointer<const T>(packed, "packed", {tokens, H}),
                         pointer<const int32_t>(cu_seqlens, "cu_seqlens", {B + 1}), tokens, B, S, H},
        stream);
  });
}

}  // namespace
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(fastft, m) {
  m.def("pack_rows(Tensor(a!) packed, Tensor padded, Tensor? present, Tensor cu_seqlens) -> ()");
  m.def("unpack_rows(Tensor(a!) padded, Tensor packed, Tensor cu_seqlens) -> ()");
}
#ifdef FASTFT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastft, CUDA, m) {
  m.impl("pack_rows", TORCH_BOX(&pack_cuda));
  m.impl("unpack_rows", TORCH_BOX(&unpack_cuda));
}
#endif

}  // namespace fastft::binding
