// This instruction set's entry of the dispatch table in isa.cpp: constants only, nothing runs at load.
#include "isa.h"

#if defined(FASTFT_ISA_AVX512_BF16)
namespace fastft::cpu::avx512 {  // fp32 and fp64 have no use for the instruction: compiled once for both sets
FASTFT_KERNELS(FASTFT_DECLARE)
}  // namespace fastft::cpu::avx512
#endif

namespace FASTFT_NAMESPACE {
namespace {

#if defined(FASTFT_ISA_AVX512_BF16)
namespace wide = avx512;
#else
namespace wide = FASTFT_NAMESPACE;
#endif

}  // namespace

extern const Kernels table;
const Kernels table = {
#define FASTFT_X(name, Args) \
  {&wide::name<float, float>, &name<bf16, bf16>, &name<bf16, float>, &wide::name<double, double>},
    FASTFT_KERNELS(FASTFT_X)
#undef FASTFT_X
        & peak_f32,
    &peak_bf16,
    &tile_f32,
    &tile_bf16,
    &gemm_tasks,
};

}  // namespace FASTFT_NAMESPACE
