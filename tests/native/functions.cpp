// functions.h of FASTFT_TEST_SET, which is an instruction set or "scalar".
#include "functions.h"

#include "activation.h"
#include "gelu_lookup.h"

#define FASTFT_TEXT_OF(x) #x
#define FASTFT_TEXT(x) FASTFT_TEXT_OF(x)

namespace FASTFT_NAMESPACE {
namespace {

#define FASTFT_NUMERIC(X)               \
  X(exp, exp(x))                        \
  X(expm1, expm1(x))                    \
  X(log, log(x))                        \
  X(log1p, log1p(x))                    \
  X(tanh, tanh(x))                      \
  X(sigmoid, sigmoid(x))                \
  X(sigmoid_slope, sigmoid_slope(x))    \
  X(normal_cdf, normal(x).cdf)          \
  X(normal_pdf, normal(x).pdf)          \
  X(exp_times, times_one<false>(x))     \
  X(rough_exp, times_one<true>(x))      \
  X(rough_gelu, Act<kGelu>::f<true>(x)) \
  X(rough_gelu_slope, Act<kGelu>::df<true>(x))

template <bool kRough, class F>
FASTFT_INLINE F times_one(F x) {
  return exp_times<kRough>(x, splat<F>(1));
}

template <class F, class Op>
void over(F* y, const F* x, int64_t n, Op op) {
#if defined(FASTFT_ISA_SCALAR)
  for (int64_t i = 0; i < n; ++i) y[i] = op(x[i]);
#else
  for_lanes<F>(n, [&](int64_t i, auto load, auto store) { store(y + i, op(load(x + i))); });
#endif
}

#define FASTFT_FUNCTION(name, expression)                                                               \
  {name, [](float* y, const float* a, int64_t n) { over(y, a, n, [](auto x) { return expression; }); }, \
   [](double* y, const double* a, int64_t n) { over(y, a, n, [](auto x) { return expression; }); }},

const test::Function kFunctions[] = {
#define FASTFT_X(name, expression) FASTFT_FUNCTION(#name, expression)
    FASTFT_NUMERIC(FASTFT_X)
#undef FASTFT_X
#define FASTFT_X(name, f_of_z, df_of_z) \
  FASTFT_FUNCTION(#name, Act<k##name>::f(x)) FASTFT_FUNCTION(#name "'", Act<k##name>::df(x))
        FASTFT_ACTIVATIONS(FASTFT_X)
#undef FASTFT_X
};

}  // namespace

extern const test::Functions functions;
const test::Functions functions = {FASTFT_TEXT(FASTFT_TEST_SET), kFunctions,
                                   kFunctions + sizeof kFunctions / sizeof *kFunctions};

}  // namespace FASTFT_NAMESPACE
