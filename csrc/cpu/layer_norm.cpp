// LayerNorm over rows of h = dropout(x) + residual:   y = (h - mean) rstd w + b,   rstd = 1 / sqrt(var + eps)
//   backward, with n = (h - mean) rstd and g = dy w:   dh = rstd (g - avg(g) - n avg(g n)),   dw = sum of dy n,   db = sum of dy
//   dresidual = dh,   dx = dropout's factor dh                              Ba et al. 2016, arXiv:1607.06450, eq. 3
//   x (M, H) T   residual, h, y, w, b W   mean, rstd fp32 (fp64 for fp64).   Dropout is drawn here, in registers, both times.
// Moves M H (sizeof(T) + 3 sizeof(W)) bytes forward (x, residual, h, y), the same backward (dy, h, dx, dresidual): at 44 GB/s 0.57 ms for 2048 x 768
// in fp32 (0.5 in bf16 with an fp32 residual). Arithmetic is hidden behind it but for Philox (0.75 cycles an element).
// Large outputs go past the caches, which is 1 % of a fp32 step: they need not be fetched first, and other cores read them.
// A row stays in L1 between its passes. What is squared are differences to a mean that may be off by its rounding (`about`), and the
// mean of these differences (`shift`) corrects both moments: E[h^2] - mean^2 would cancel where |mean| >> sigma.
#include "column_sums.h"
#include "row_norm.h"

namespace FASTFT_NAMESPACE {

constexpr int64_t kRows = 8;  // of a task of the forward

template <class T, class W>
void layer_norm_forward(const LayerNormForward<T, W>& p, const Host& host) {
  using Acc = Compute<W>;
  const int64_t H = p.H, pitch = padded_row(H);
  const Dropout dropout(p.seed, p.threshold, p.use);
  const bool past_caches = streams(p.y, p.M, H) && (!p.h || streams(p.h, p.M, H));
  Acc* const buffers = scratch<Acc>(host, 2 * pitch * host.threads);
  parallel_for(host, ceil_div(p.M, kRows), [&](int64_t task, int worker) {
    Acc *const v = buffers + 2 * pitch * worker, *const factors = v + pitch;
    for (int64_t row = task * kRows; row < p.M && row < (task + 1) * kRows; ++row) {
      const int64_t at = row * H;
      if (dropout) dropout_factors(factors, dropout, row, H);
      Vec<Acc> total = {};
      for_lanes<Acc>(H, past_caches, [&](int64_t j, auto load, auto store) {
        Vec<Acc> value = load(p.x + at + j);
        if (dropout) value *= load(factors + j);
        if (p.residual) value += load(p.residual + at + j);
        if (p.h) store(p.h + at + j, value);
        FASTFT_NAMESPACE::store(v + j, value);
        total += value;
      });
      const RowMoments<Acc> moments = center_row(v, total, H, p.eps);
      for_lanes<Acc>(H, past_caches, [&](int64_t j, auto load, auto store) {
        Vec<Acc> n = (FASTFT_NAMESPACE::load(v + j) - moments.shift) * moments.rstd;
        if (p.w) n *= load(p.w + j);
        if (p.b) n += load(p.b + j);
        store(p.y + at + j, n);
      });
      if (p.mean) p.mean[row] = moments.mean;
      if (p.rstd) p.rstd[row] = moments.rstd;
    }
    if (past_caches) streamed();
  });
}

template <class T, class W>
void layer_norm_backward(const LayerNormBackward<T, W>& p, const Host& host) {
  using Acc = Compute<W>;
  const int64_t H = p.H, pitch = padded_row(H), chunks = ceil_div(p.M, kSumRows);
  const Dropout dropout(p.dx ? p.seed : nullptr, p.threshold, p.use);
  const bool past_caches =
      (p.dx || p.dresidual) && (!p.dx || streams(p.dx, p.M, H)) && (!p.dresidual || streams(p.dresidual, p.M, H));
  Acc* const buffers = scratch<Acc>(host, 3 * pitch * host.threads);
  Acc* const sums = scratch<Acc>(host, chunks * 2 * H);
  parallel_for(host, chunks, [&](int64_t chunk, int worker) {
    Acc *const n = buffers + 3 * pitch * worker, *const g = n + pitch, *const factors = g + pitch;
    Acc *const dw = sums + chunk * 2 * H, *const db = dw + H;
    std::memset(dw, 0, size_t(2 * H) * sizeof(Acc));
    for (int64_t row = chunk * kSumRows; row < p.M && row < (chunk + 1) * kSumRows; ++row) {
      const int64_t at = row * H;
      if (dropout) dropout_factors(factors, dropout, row, H);
      row_norm_backward(
          dw, db, n, g, p.mean[row], p.rstd[row], p.w, H, p.dx || p.dresidual, past_caches,
          [&](int64_t j, auto load) { return RowInputs<Acc>{load(p.dy + at + j), load(p.h + at + j)}; },
          [&](int64_t j, Vec<Acc> dh, auto store) {
            if (p.dresidual) store(p.dresidual + at + j, dh);
            if (dropout) dh *= load(factors + j);
            if (p.dx) store(p.dx + at + j, dh);
          });
    }
    if (past_caches) streamed();
  });
  if (p.dw) add_up(p.dw, sums, chunks, 2 * H, H, host);
  if (p.db) add_up(p.db, sums + H, chunks, 2 * H, H, host);
}

FASTFT_INSTANTIATE(layer_norm_forward, LayerNormForward)
FASTFT_INSTANTIATE(layer_norm_backward, LayerNormBackward)

}  // namespace FASTFT_NAMESPACE
