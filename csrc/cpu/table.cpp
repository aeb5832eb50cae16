// This instruction set's entry of the dispatch table in isa.cpp: constants only, nothing runs at load.
#include "isa.h"

namespace FASTFT_NAMESPACE {

extern const Kernels table;
const Kernels table = {
#define FASTFT_X(name, Args) {&name<float, float>, &name<bf16, bf16>, &name<bf16, float>, &name<double, double>},
    FASTFT_KERNELS(FASTFT_X)
#undef FASTFT_X
        & peak_f32,
    &peak_bf16,
    &gemm_tasks,
};

}  // namespace FASTFT_NAMESPACE
