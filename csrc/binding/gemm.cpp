// torch.ops.fastft.gemm_tasks: how a matrix product is cut for so many threads, asked without running it; cpu/gemm.h.
#include "torch.h"

namespace fastft::binding {
namespace {

int64_t gemm_tasks(Tensor work, int64_t M, int64_t N, int64_t K, bool is_bf16, bool a_depth_major, bool b_depth_major,
                   int64_t threads, int64_t phase) {
  const int64_t capacity = work.numel();
  const cpu::GemmQuery query{M, N, K, is_bf16, a_depth_major, b_depth_major, int(threads < 1 ? 1 : threads)};
  return cpu::kernels().gemm_tasks(query, int(phase), pointer<double>(work, "work", {capacity}), capacity);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastft, m) {
  m.def(
      "gemm_tasks(Tensor(a!) work, int M, int N, int K, bool is_bf16, bool a_depth_major, bool b_depth_major, int "
      "threads, int phase) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fastft, CPU, m) { m.impl("gemm_tasks", TORCH_BOX(&gemm_tasks)); }

}  // namespace fastft::binding
