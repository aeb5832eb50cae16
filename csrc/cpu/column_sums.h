// Sums over the rows of a matrix that is made row by row: each chunk of kSumRows rows has a partial sum of its own, whatever thread
// makes it, and add_up adds the chunks in order: same bits for every number of threads.
#pragma once
#include "isa.h"

namespace FASTFT_NAMESPACE {

// out[j] = sum over chunks of sums[chunk * stride + j], j < N.
template <class Acc, class Out>
void add_up(Out* out, const Acc* sums, int64_t chunks, int64_t stride, int64_t N, const Host& host) {
  constexpr int64_t kCols = 256;
  parallel_for(host, ceil_div(N, kCols), [&](int64_t task, int) {
    const int64_t from = task * kCols, count = N - from < kCols ? N - from : kCols;
    for_lanes<Acc>(count, [&](int64_t j, auto load, auto store) {
      Vec<Acc> sum = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += load(sums + chunk * stride + from + j);
      store(out + from + j, sum);
    });
  });
}

}  // namespace FASTFT_NAMESPACE
