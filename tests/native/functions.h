// The functions of numeric.h and activation.h over arrays: in each instruction set, and over scalars as CUDA's threads
// compute them.
#pragma once
#include <cstdint>

namespace fastft::test {

struct Function {
  const char* name;  // as in numeric.h, or an activation's; a derivative's ends in '
  void (*f32)(float* y, const float* x, int64_t n);
  void (*f64)(double* y, const double* x, int64_t n);
};

struct Functions {
  const char* isa;  // or "scalar"
  const Function* begin;
  const Function* end;
};

// Null where the compiler does not know the instruction set.
#define FASTFT_TEST_SETS(X) X(scalar) X(baseline) X(avx2) X(avx512) X(avx512_bf16)

}  // namespace fastft::test

#define FASTFT_X(isa)                                                                         \
  namespace fastft::cpu::isa {                                                                \
  extern const fastft::test::Functions functions __attribute__((weak, visibility("hidden"))); \
  }
FASTFT_TEST_SETS(FASTFT_X)
#undef FASTFT_X
