// LayerNorm of one row, in both directions; layer_norm.cpp has the formulas, and why the moments are taken so.
#pragma once
#include "dropout.h"

namespace FASTFT_NAMESPACE {

// Room for a row and a register more, and for its dropout's factors.
inline int64_t padded_row(int64_t H) { return (dropout_groups(H) + 1) * kDropoutGroup; }

template <class Acc>
struct RowMoments {
  Acc mean, rstd, shift;
};

// Of a row v with this total over its elements, in lanes. The row becomes its differences to a mean that is off by `shift`.
template <class Acc>
inline RowMoments<Acc> center_row(Acc* v, typename VecOf<Acc>::type total, int64_t H, double eps) {
  constexpr int L = kLanes<Acc>;
  const Acc about = sum_lanes<Acc>(total)[0] / Acc(H);
  for (int64_t j = H; j < ceil_div(H, L) * L; ++j) v[j] = about;  // adds nothing below
  Vec<Acc> rest = {}, squares = {};
  for (int64_t j = 0; j < H; j += L) {
    const Vec<Acc> d = load(v + j) - about;
    store(v + j, d);
    rest += d;
    squares += d * d;
  }
  const Acc shift = sum_lanes<Acc>(rest)[0] / Acc(H), variance = sum_lanes<Acc>(squares)[0] / Acc(H) - shift * shift;
  const Acc rstd = Acc(1) / __builtin_sqrt(variance + Acc(eps));
  return {about + shift, rstd, shift};
}

template <class Acc>
struct RowInputs {
  Vec<Acc> dy, h;
};

// Adds a row's part to dw and db, and gives dh. n and g are room for a row each.
//   inputs(j, load) -> RowInputs, of which lanes beyond the end are zeros   output(j, dh, store), null if dh is not wanted
template <class Acc, class W, class Inputs, class Output>
inline void row_norm_backward(Acc* dw, Acc* db, Acc* n, Acc* g, Acc mean, Acc rstd, const W* w, int64_t H, bool wants_h,
                              bool past_caches, const Inputs& inputs, const Output& output) {
  Vec<Acc> g_total = {}, gn_total = {};
  for_lanes<Acc>(H, [&](int64_t j, auto load, auto store) {
    const RowInputs<Acc> given = inputs(j, load);
    const Vec<Acc> nj = (given.h - mean) * rstd, gj = w ? given.dy * load(w + j) : given.dy;
    g_total += gj;
    gn_total += gj * nj;
    FASTFT_NAMESPACE::store(n + j, nj);
    FASTFT_NAMESPACE::store(g + j, gj);
    store(dw + j, load(dw + j) + given.dy * nj);
    store(db + j, load(db + j) + given.dy);
  });
  if (!wants_h) return;
  const Acc g_mean = sum_lanes<Acc>(g_total)[0] / Acc(H), gn_mean = sum_lanes<Acc>(gn_total)[0] / Acc(H);
  for_lanes<Acc>(H, past_caches, [&](int64_t j, auto, auto store) {
    output(j, (load(g + j) - g_mean - load(n + j) * gn_mean) * rstd, store);
  });
}

}  // namespace FASTFT_NAMESPACE
