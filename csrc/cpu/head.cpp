// A classifier's end, by the kernels of linear_act.cpp and cross_entropy.cpp one after the other:
//   logits = dropout(x) w^T + b    loss = mean of -log softmax(logits) at the targets
//   backward, with dz = dloss d(loss)/d(logits) + dlogits:    dx = dropout's factor dz w    dw = dz^T dropout(x)    db = sum of dz
//   x (B, H), logits (B, C) T    w, b W    Of a batch everything lies in L1 and L2: what one op saves is calls, 10 us each.
// The rows that are dropped out are made again in the backward, and rounded to T as between modules.
#include "dropout.h"

namespace FASTFT_NAMESPACE {
namespace {

constexpr int64_t kRows = 8;  // of a task

// to = dropout(from), which may be the same; to (B, H).
template <class T>
void drop_rows(T* to, const T* from, const Dropout& dropout, int64_t B, int64_t H, const Host& host) {
  using F = Compute<T>;
  const int64_t pitch = dropout_groups(H) * kDropoutGroup;
  F* const buffers = scratch<F>(host, pitch * host.threads);
  parallel_for(host, ceil_div(B, kRows), [&](int64_t task, int worker) {
    F* const factors = buffers + pitch * worker;
    for (int64_t row = task * kRows; row < B && row < (task + 1) * kRows; ++row) {
      dropout_factors(factors, dropout, row, H);
      for_lanes<F>(H, [&](int64_t j, auto load, auto store) {
        store(to + row * H + j, load(from + row * H + j) * load(factors + j));
      });
    }
  });
}

// What the linear layer multiplies with.
template <class T, class Args>
const T* rows_of(const Args& p, const Dropout& dropout, const Host& host) {
  if (!dropout) return p.x;
  T* const x = scratch<T>(host, p.B * p.H);
  drop_rows(x, p.x, dropout, p.B, p.H, host);
  return x;
}

// The gradient of the logits.
template <class T, class W>
const T* grad_logits(const HeadBackward<T, W>& p, const Host& host) {
  if (!p.dloss) return p.dlogits;
  T* const dz = scratch<T>(host, p.B * p.C);
  cross_entropy_backward(CrossEntropyBackward<T, W>{dz, nullptr, p.dloss, p.stats, p.divisor, p.logits, p.target,
                                                    nullptr, nullptr, p.B, p.C, 1, p.ignore_index, 0.0, kMean},
                         host);
  if (p.dlogits)
    for_lanes<Compute<T>>(p.B * p.C,
                          [&](int64_t j, auto load, auto store) { store(dz + j, load(dz + j) + load(p.dlogits + j)); });
  return dz;
}

}  // namespace

template <class T, class W>
void head_forward(const HeadForward<T, W>& p, const Host& host) {
  const T* const x = rows_of<T>(p, Dropout(p.seed, p.threshold, p.use), host);
  linear_act_forward(LinearActForward<T, W>{p.logits, nullptr, x, p.w, p.b, p.B, p.C, p.H, 0}, host);
  cross_entropy_forward(CrossEntropyForward<T, W>{p.loss, p.stats, p.divisor, nullptr, p.invalid, p.logits, p.target,
                                                  nullptr, nullptr, p.B, p.C, 1, p.ignore_index, 0.0, kMean},
                        host);
}

template <class T, class W>
void head_backward(const HeadBackward<T, W>& p, const Host& host) {
  const Dropout dropout(p.seed, p.threshold, p.use);
  const T* const dz = grad_logits(p, host);
  const T* const x = p.dw ? rows_of<T>(p, dropout, host) : nullptr;
  linear_act_backward(LinearActBackward<T, W>{p.dx, p.dw, p.db, dz, nullptr, x, p.w, p.B, p.C, p.H, 0}, host);
  if (dropout && p.dx) drop_rows(p.dx, p.dx, dropout, p.B, p.H, host);
}

FASTFT_INSTANTIATE(head_forward, HeadForward)
FASTFT_INSTANTIATE(head_backward, HeadBackward)

}  // namespace FASTFT_NAMESPACE
