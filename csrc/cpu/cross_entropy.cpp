// Softmax cross-entropy. With s = sum of exp(x_c - max), p_c = exp(x_c - max) / s, -log p_c = log s - (x_c - max):
//   loss = h (-log p_t) + sum over c of k_c (-log p_c)      dx_c = g ((h + sum of k) p_c - k_c - (c == t ? h : 0))
//   class indices t:  h = (1 - smoothing) w_t  k_c = smoothing / C w_c
//   probabilities q:  h = 0  k_c = ((1 - smoothing) q_c + smoothing / C) w_c;  dq_c = g (1 - smoothing) w_c (-log p_c)
// Moves 3 M C sizeof(T) bytes for M rows, forward and backward: each reads the logits once, the backward writes dx. Of
// a row, its maximum and log s are kept apart: their sum would be off by half an ulp of the maximum, 5e-4 at 1e4.
// Reached on one Zen 4 core, C = 1000: 0.31 and 0.28 ns per logit in fp32, 20 GB/s; 0.42 and 0.51 ns in bf16, 6 GB/s:
// widening and rounding make the difference.
//
// Lanes hold the classes of one row ("along"), or rows, where classes are few or do not come last ("across"). Either
// way each lane runs an online softmax of its own (Milakov and Gimelshein 2018, arXiv:1805.02867) over blocks of 16
// values: one exp more for 16, and nothing moves between lanes before a row's end. A reduction adds the rows of a task,
// then the tasks in order: that order follows from the shape.
// Tried: blocks of 8, 0.97x; a block kept in registers between its maximum and its sum, 1.06x in bf16, 1x in fp32.
#include "isa.h"

namespace FASTFT_NAMESPACE {
namespace {

constexpr int kBlock = 16;                // values of a lane that share one look at the maximum
constexpr int64_t kTaskLogits = 1 << 15;  // of a task: about 10 us, ten times what handing it out costs

// What a lane knows of the values it has seen: the maximum, the sum of exp(x - max), the sums of k (x - max) and of k.
template <bool kSoft, class F>
struct Online {
  using V = Vec<F>;
  static constexpr F kLargest = sizeof(F) == 8 ? F(1.7976931348623157e308) : F(3.4028234e38f);
  V max = broadcast(-kLargest), sum = {}, dot = {}, mass = {};  // not -infinity, which minus itself is NaN
  bool empty = true;

  // x(i) and k(i), i < n: the next n values of each lane.
  template <class X, class K>
  inline __attribute__((always_inline)) void add(int n, const X& x, const K& k) {
    V top = max, other = max;  // two, as each waits for the one before
    for (int i = 0; i + 1 < n; i += 2) {
      const V a = x(i), b = x(i + 1);
      top = a > top ? a : top;
      other = b > other ? b : other;
    }
    const V last = x(n - 1);
    top = other > top ? other : top;
    raise(last > top ? last : top);
    V s = {}, d = {}, m = {};
    for (int i = 0; i < n; ++i) {
      const V v = x(i) - max;
      s += exp(v);
      if constexpr (kSoft) {
        const V soft = k(i);
        d += soft * v, m += soft;
      }
    }
    sum += s, dot += d, mass += m;
  }

  // One more value, in those lanes where `fresh` is true. Others take part with a harmless one: underflow is slow.
  template <class Mask>
  void add_some(Mask fresh, V x, V k) {
    x = fresh ? x : max;
    raise(x > max ? x : max);
    sum += fresh ? exp(x - max) : V{};
    if constexpr (kSoft) dot += fresh ? k * (x - max) : V{}, mass += fresh ? k : V{};
  }

  void raise(V top) {
    if (!empty) {
      sum *= exp(max - top);
      // 0 times the infinite difference of two extreme maxima is NaN.
      if constexpr (kSoft) dot += mass != 0 ? mass * (max - top) : V{};
    }
    max = top;
    empty = false;
  }
};

struct Group {
  int64_t row;  // the first
  int rows;     // at most kLanes
  int64_t at;   // the first row's first logit
};

// What a group's targets say of its rows.
template <class F>
struct Targets {
  int64_t index[kLanes<F>];  // t, or -1: ignored, out of range, or there are probabilities
  F hard[kLanes<F>];         // h
  F weight[kLanes<F>];       // in the divisor of a mean
  F live[kLanes<F>];         // 0: ignored
  int64_t invalid;           // the first row whose target is out of range, or -1
};

// What forward and backward share: how rows are grouped into tasks, and where things lie.
template <class T, class W, class Args, int kAcross>
struct Rows {
  using Logit = T;
  using F = Compute<T>;
  using V = Vec<F>;
  static constexpr int L = kLanes<F>;

  static int64_t between(int64_t low, int64_t x, int64_t high) { return x < low ? low : x < high ? x : high; }

  const Args& p;
  const int64_t C = p.C, S = p.S, count = p.N * S;
  const int64_t stride = S > 1 ? 1 : C;         // from one row of a group to the next
  const bool across = S > 1 || C < L* kAcross;  // then transposing is cheaper than what moves between lanes
  const int64_t size = across ? L : between(1, kTaskLogits / C, L);  // rows of a group
  const int64_t groups_of_n = ceil_div(S > 1 ? S : p.N, size), groups = S > 1 ? p.N * groups_of_n : groups_of_n;
  const int64_t groups_per_task = between(1, kTaskLogits / (size * C), kTaskLogits);
  const int64_t tasks = ceil_div(groups, groups_per_task);
  const F rest = F(1 - p.smoothing), share = F(p.smoothing / double(C));

  Group group(int64_t i) const {
    const int64_t n = S > 1 ? i / groups_of_n : 0, first = (i - n * groups_of_n) * size;
    return {n * S + first, int(between(0, (S > 1 ? S : p.N) - first, size)), n * C * S + first * stride};
  }

  // body(group, task) for all groups; those of a task in ascending order, by one worker.
  template <class Body>
  void for_groups(const Host& host, const Body& body) const {
    parallel_for(host, tasks, [&](int64_t task, int) {
      const int64_t end = (task + 1) * groups_per_task;
      for (int64_t i = task * groups_per_task; i < (end < groups ? end : groups); ++i) body(group(i), task);
    });
  }

  Targets<F> targets(const Group& g) const {
    Targets<F> t;
    t.invalid = -1;
    for (int r = 0; r < L; ++r) {
      const int64_t c = p.target && r < g.rows ? p.target[g.row + r] : p.ignore_index;
      const bool ignored = c == p.ignore_index, inside = uint64_t(c) < uint64_t(C);
      const bool valid = p.target && inside && !ignored;
      if (!ignored && !inside && t.invalid < 0) t.invalid = g.row + r;
      t.index[r] = valid ? c : -1;
      t.weight[r] = valid ? (p.w ? F(to_float(p.w[c])) : F(1)) : F(!p.target && r < g.rows);
      t.hard[r] = valid ? rest * t.weight[r] : F(0);
      t.live[r] = F(valid || !p.target);
    }
    return t;
  }

  V soft(V q, V w) const { return (share + rest * q) * w; }

  // ---- along: a register of classes from c on
  V q_along(int64_t at, int64_t c) const { return p.q ? load(p.q + at + c) : V{}; }
  V w_along(int64_t c) const { return p.w ? load(p.w + c) : broadcast(F(1)); }

  // ---- across: a block of classes is gathered, out[c][r] = in[r][c], and scattered; missing rows are zero
  template <class In>
  void gather(F* out, const In* in, int rows, int classes) const {
    if (rows < L) std::memset(out, 0, size_t(classes) * L * sizeof(F));
    for (int c = 0; c < classes; ++c)
      if (S == 1)
        for (int r = 0; r < rows; ++r) out[c * L + r] = to_float(in[r * C + c]);
      else if (rows == L)
        store(out + c * L, load(in + c * S));
      else
        store(out + c * L, load(in + c * S, rows));
  }
  template <class Out>
  void scatter(Out* out, const F* in, int rows, int classes) const {
    for (int c = 0; c < classes; ++c, in += L) {
      if (S > 1) {
        rows == L ? store(out + c * S, load(in)) : store(out + c * S, load(in), rows);
      } else if constexpr (sizeof(Out) == sizeof(F)) {
        for (int r = 0; r < rows; ++r) out[r * C + c] = in[r];
      } else {
        Out rounded[L];
        store(rounded, load(in));
        for (int r = 0; r < rows; ++r) out[r * C + c] = rounded[r];
      }
    }
  }
  V w_across(int64_t c) const { return broadcast(p.w ? F(to_float(p.w[c])) : F(1)); }
};

// ---- forward

template <bool kSoft, class R>
Online<kSoft, typename R::F> along(const R& rows, int64_t at) {
  using F = typename R::F;
  constexpr int L = R::L;
  const auto* const x = rows.p.x + at;
  const auto soft_at = [&](int64_t c) { return rows.soft(rows.q_along(at, c), rows.w_along(c)); };
  Online<kSoft, F> online;
  int64_t c = 0;
  const auto value = [&](int i) { return load(x + c + i * L); };
  const auto soft = [&](int i) { return soft_at(c + i * L); };
  for (; c + kBlock * L <= rows.C; c += kBlock * L) online.add(kBlock, value, soft);
  if (const int registers = int((rows.C - c) / L)) online.add(registers, value, soft);
  if (const int rest = int(rows.C % L)) {  // the last register overlaps what has been seen
    Bits<Vec<F>> lane;
    for (int i = 0; i < L; ++i) lane[i] = i;
    online.add_some(lane + rest >= L, load(x + rows.C - L), soft_at(rows.C - L));
  }
  online.raise(max_lanes<F>(online.max));
  return online;
}

template <bool kSoft, class R>
Online<kSoft, typename R::F> across(const R& rows, const Group& g) {
  using F = typename R::F;
  constexpr int L = R::L;
  alignas(kVectorBytes) F x[kBlock * L], q[kBlock * L] = {};
  Online<kSoft, F> online;
  for (int64_t c = 0; c < rows.C; c += kBlock) {
    const int classes = int(rows.C - c < kBlock ? rows.C - c : kBlock);
    rows.gather(x, rows.p.x + g.at + c * rows.S, g.rows, classes);
    if (kSoft && rows.p.q) rows.gather(q, rows.p.q + g.at + c * rows.S, g.rows, classes);
    online.add(
        classes, [&](int i) { return load(x + i * L); },
        [&](int i) { return rows.soft(load(q + i * L), rows.w_across(c + i)); });
  }
  return online;
}

struct Sums {  // of a task
  double loss, weight;
  int64_t invalid;
};

template <bool kSoft, class R>
void forward_group(const R& rows, const Group& g, Sums& sums) {
  using F = typename R::F;
  const auto& p = rows.p;
  const Targets<F> t = rows.targets(g);
  Online<kSoft, F> online;
  if (rows.across) {
    online = across<kSoft>(rows, g);
  } else {
    for (int r = 0; r < g.rows; ++r) {
      if (t.live[r] == 0) continue;
      const Online<kSoft, F> row = along<kSoft>(rows, g.at + r * rows.stride);
      online.max[r] = row.max[0];
      online.sum[r] = sum_lanes<F>(row.sum)[0];
      online.dot[r] = sum_lanes<F>(row.dot)[0];
      online.mass[r] = sum_lanes<F>(row.mass)[0];
    }
  }
  F picked[R::L] = {};
  for (int r = 0; r < g.rows; ++r)
    if (t.index[r] >= 0) picked[r] = to_float(p.x[g.at + r * rows.stride + t.index[r] * rows.S]);

  const Vec<F> log_sum = log(online.sum);
  Vec<F> loss = load(t.hard) * (log_sum - (load(picked) - online.max));
  if constexpr (kSoft) loss += online.mass * log_sum - online.dot;
  loss = load(t.live) != 0 ? loss : Vec<F>{};

  if (p.reduction == kNone) store(p.loss + g.row, loss, g.rows);
  if (p.stats) {
    store(p.stats + g.row, online.max, g.rows);
    store(p.stats + rows.count + g.row, log_sum, g.rows);
    if constexpr (kSoft) store(p.stats + 2 * rows.count + g.row, online.mass, g.rows);
  }
  for (int r = 0; r < g.rows; ++r) sums.loss += double(loss[r]), sums.weight += double(t.weight[r]);
  if (sums.invalid < 0) sums.invalid = t.invalid;
}

template <bool kSoft, class T, class W>
void forward(const CrossEntropyForward<T, W>& p, const Host& host) {
  using F = Compute<T>;
  const Rows<T, W, CrossEntropyForward<T, W>, 4> rows{p};
  Sums* const sums = scratch<Sums>(host, rows.tasks);
  for (int64_t task = 0; task < rows.tasks; ++task) sums[task] = {0, 0, -1};
  rows.for_groups(host, [&](const Group& g, int64_t task) { forward_group<kSoft>(rows, g, sums[task]); });

  Sums all = {0, 0, -1};
  for (int64_t task = 0; task < rows.tasks; ++task) {
    all.loss += sums[task].loss;
    all.weight += sums[task].weight;
    if (all.invalid < 0) all.invalid = sums[task].invalid;
  }
  if (p.reduction != kNone) *p.loss = from_float<W>(F(p.reduction == kMean ? all.loss / all.weight : all.loss));
  if (p.divisor) *p.divisor = F(all.weight);
  *p.invalid = all.invalid;
}

// ---- backward

// What the gradients of a row (V a number), or of the rows in the lanes (V a register), are made of.
template <class V>
struct Scales {
  V max, log_sum;
  V grad;     // g
  V hard;     // g h
  V softmax;  // g (h + sum of k) / s
};

template <bool kSoft, class V, class By>
inline V grad_logits(V x, V k, const By& by) {  // x: less the maximum
  V dx = exp(x) * by.softmax;
  if constexpr (kSoft) dx -= by.grad * k;
  return dx;
}

template <bool kSoft, class R, class F>
void backward_along(const R& rows, int64_t at, int64_t index, const Scales<F>& by) {
  using V = Vec<F>;
  const auto& p = rows.p;
  const auto step = [&](int64_t c) {
    const V x = load(p.x + at + c) - by.max, w = kSoft ? rows.w_along(c) : V{};
    if (p.dx) store(p.dx + at + c, grad_logits<kSoft>(x, kSoft ? rows.soft(rows.q_along(at, c), w) : V{}, by));
    if (kSoft && p.dq) store(p.dq + at + c, by.grad * rows.rest * w * (by.log_sum - x));
  };
  for (int64_t c = 0; c + R::L <= rows.C; c += R::L) step(c);
  if (rows.C % R::L) step(rows.C - R::L);  // again some that have been written
  if (p.dx && index >= 0) {
    const V x = broadcast(F(to_float(p.x[at + index])) - by.max);
    p.dx[at + index] =
        from_float<typename R::Logit>(grad_logits<kSoft>(x, rows.soft(V{}, rows.w_across(index)), by)[0] - by.hard);
  }
}

template <bool kSoft, class R, class V>
void backward_across(const R& rows, const Group& g, const Targets<typename R::F>& t, const Scales<V>& by) {
  using F = typename R::F;
  constexpr int L = R::L;
  const auto& p = rows.p;
  alignas(kVectorBytes) F x[kBlock * L], q[kBlock * L] = {};
  for (int64_t c = 0; c < rows.C; c += kBlock) {
    const int classes = int(rows.C - c < kBlock ? rows.C - c : kBlock);
    const int64_t at = g.at + c * rows.S;
    rows.gather(x, p.x + at, g.rows, classes);
    if (kSoft && p.q) rows.gather(q, p.q + at, g.rows, classes);
    for (int i = 0; i < classes; ++i) {  // dx and dq take the places of x and q
      const V v = load(x + i * L) - by.max, w = rows.w_across(c + i);
      const V dx = grad_logits<kSoft>(v, kSoft ? rows.soft(load(q + i * L), w) : V{}, by);
      store(x + i * L, load(t.live) != 0 ? dx : V{});  // where ignored logits are NaN, too
      if (kSoft && p.dq) store(q + i * L, by.grad * rows.rest * w * (by.log_sum - v));
    }
    for (int r = 0; r < g.rows; ++r)
      if (t.index[r] >= c && t.index[r] < c + classes) x[(t.index[r] - c) * L + r] -= by.hard[r];
    if (p.dx) rows.scatter(p.dx + at, x, g.rows, classes);
    if (kSoft && p.dq) rows.scatter(p.dq + at, q, g.rows, classes);
  }
}

template <bool kSoft, class R>
void backward_group(const R& rows, const Group& g) {
  using F = typename R::F;
  using V = Vec<F>;
  const auto& p = rows.p;
  const Targets<F> t = rows.targets(g);
  const V max = load(p.stats + g.row, g.rows), log_sum = load(p.stats + rows.count + g.row, g.rows);
  V grad = p.reduction == kNone ? load(p.dy + g.row, g.rows) : broadcast(F(to_float(*p.dy)));
  if (p.reduction == kMean) grad /= *p.divisor;
  const V hard = grad * load(t.hard), soft = kSoft ? grad * load(p.stats + 2 * rows.count + g.row, g.rows) : V{};
  const Scales<V> by = {max, log_sum, grad, hard, (hard + soft) * exp(-log_sum)};
  if (rows.across) return backward_across<kSoft>(rows, g, t, by);
  for (int r = 0; r < g.rows; ++r) {
    const int64_t at = g.at + r * rows.stride;
    if (t.live[r] != 0)
      backward_along<kSoft>(rows, at, t.index[r], Scales<F>{max[r], log_sum[r], grad[r], hard[r], by.softmax[r]});
    else if (p.dx)
      std::memset(p.dx + at, 0, size_t(rows.C) * sizeof *p.dx);
  }
}

}  // namespace

template <class T, class W>
void cross_entropy_forward(const CrossEntropyForward<T, W>& p, const Host& host) {
  p.q || p.smoothing > 0 ? forward<true>(p, host) : forward<false>(p, host);
}

template <class T, class W>
void cross_entropy_backward(const CrossEntropyBackward<T, W>& p, const Host& host) {
  const Rows<T, W, CrossEntropyBackward<T, W>, 1> rows{p};
  rows.for_groups(host, [&](const Group& g, int64_t) {
    p.q || p.smoothing > 0 ? backward_group<true>(rows, g) : backward_group<false>(rows, g);
  });
}

FASTFT_INSTANTIATE(cross_entropy_forward, CrossEntropyForward)
FASTFT_INSTANTIATE(cross_entropy_backward, CrossEntropyBackward)

}  // namespace FASTFT_NAMESPACE
