// What kernels that normalize rows have in common: the moments of a row, and the sums over rows.
#pragma once
#include "dropout.cuh"

namespace fastft::cuda {

constexpr int kRowsPerBlock = 4;  // warps, each of which takes a row

template <class Acc>
struct RowMoments {
  Acc about, shift, rstd;  // the mean is about + shift
};

// Of a row whose values each(body) hands to body(column, value), those of this lane; total: their sum over this lane.
// `about` is off by its rounding; the mean of differences to it corrects both moments.
template <class Acc, class Each>
__device__ RowMoments<Acc> row_moments(Acc total, int64_t H, double eps, const Each& each) {
  const Acc about = warp_reduce(total, Sum()) / Acc(H);
  Acc rest = 0, squares = 0;
  each([&](int64_t, Acc value) {
    const Acc d = value - about;
    rest += d;
    squares += d * d;
  });
  const Acc shift = warp_reduce(rest, Sum()) / Acc(H), variance = warp_reduce(squares, Sum()) / Acc(H) - shift * shift;
  return {about, shift, Acc(1) / sqrt(variance + Acc(eps))};
}

// dw and db, each of which may be null, from partial (chunks, 2, H): layer_norm.cu.
template <class W>
void add_partial_sums(W* dw, W* db, const Statistic<W>* partial, int64_t chunks, int64_t H, Stream stream);

}  // namespace fastft::cuda
