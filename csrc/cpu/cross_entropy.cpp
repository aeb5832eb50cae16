// Softmax cross-entropy. With s = sum of exp(x_c - max), p_c = exp(x_c - max) / s and -log p_c = log s - (x_c - max):
//   loss = h (-log p_t) + sum over c of k_c (-log p_c)            dx_c = g ((h + sum of k) p_c - k_c - (c == t ? h : 0))
//   class indices t:   h = (1 - smoothing) w_t   k_c = smoothing / C w_c
//   probabilities q:   h = 0                     k_c = ((1 - smoothing) q_c + smoothing / C) w_c   dq_c = g (1 - smoothing) w_c (-log p_c)
// Moves 3 M C sizeof(T) bytes for M rows, forward and backward: each reads the logits once, the backward writes dx. Of a row, its maximum and log s are
// kept apart: their sum would be rounded to half an ulp of the maximum, 5e-4 for logits near 1e4.
//
// Lanes hold the classes of one row, or rows (few classes, or classes that do not come last). Either way each lane runs an online softmax of its own
// (Milakov and Gimelshein 2018, arXiv:1805.02867) over blocks of 16 values: one exp more for 16, and nothing moves between lanes before a row's end.
// A reduction adds the rows of a task, then the tasks in order: that order follows from the shape.
#include "isa.h"

namespace FASTFT_NAMESPACE {
namespace {

constexpr int kBlock = 16;                // values of a lane that share one look at the maximum
constexpr int64_t kTaskLogits = 1 << 15;  // of a task: about 10 us, ten times what handing it out costs

// What a lane knows of the values it has seen: the maximum, the sum of exp(x - max), the sums of k (x - max) and of k.
template <bool kSoft, class F>
struct Online {
  using V = Vec<F>;
  V max = broadcast(-kLargest), sum = {}, dot = {}, mass = {};

  static constexpr F kLargest = sizeof(F) == 8 ? F(1.7976931348623157e308) : F(3.4028234e38f);  // not infinity: -inf - max is no NaN

  // x(i) and k(i), i < n: the next n <= kBlock values of each lane.
  template <class X, class K>
  inline __attribute__((always_inline)) void add(int n, const X& x, const K& k) {
    V top = max;
    for (int i = 0; i < n; ++i) {
      const V v = x(i);
      top = v > top ? v : top;
    }
    raise(top);
    V s = {}, d = {}, m = {};
    for (int i = 0; i < n; ++i) {
      const V v = x(i) - top;
      s += exp(v);
      if constexpr (kSoft) d += k(i) * v, m += k(i);
    }
    sum += s, dot += d, mass += m;
  }

  // One more value, in those lanes that `fresh` is true for.
  template <class Mask>
  void add_some(Mask fresh, V x, V k) {
    x = fresh ? x : broadcast(-F(HUGE_VAL));
    raise(x > max ? x : max);
    sum += exp(x - max);
    if constexpr (kSoft) dot += fresh ? k * (x - max) : V{}, mass += fresh ? k : V{};
  }

  void raise(V top) {
    sum *= exp(max - top);
    if constexpr (kSoft) dot += mass != 0 ? mass * (max - top) : V{};  // 0 times the -inf of two extreme maxima is NaN
    max = top;
  }
};

struct Group {
  int64_t row;  // the first
  int rows;     // at most kLanes
  int64_t at;   // the first row's first logit
};

// What a group's targets say, by row.
template <class F>
struct Targets {
  int64_t index[kLanes<F>];  // -1: none, because it is ignored, wrong, or there are probabilities
  F hard[kLanes<F>];         // h
  F weight[kLanes<F>];       // in the divisor of a mean
  F live[kLanes<F>];         // 0: ignored
  int64_t invalid;           // the first row whose target is out of range, or -1
};

// What forward and backward share: how rows are grouped into tasks, and where things lie.
template <class T, class W, class Args>
struct Rows {
  using F = Compute<T>;
  using V = Vec<F>;
  static constexpr int L = kLanes<F>;

  const Args& p;
  const int64_t C = p.C, S = p.S, count = p.N * S;
  const bool across = S > 1 || C < 8 * L;  // lanes hold rows
  const int64_t size = across || kTaskLogits / C >= L ? L : kTaskLogits / C > 0 ? kTaskLogits / C : 1;  // rows of a group
  const int64_t groups_of_n = ceil_div(S > 1 ? S : p.N, size), groups = S > 1 ? p.N * groups_of_n : groups_of_n;
  const int64_t groups_per_task = size * C < kTaskLogits ? kTaskLogits / (size * C) : 1, tasks = ceil_div(groups, groups_per_task);
  const int64_t row_stride = S > 1 ? 1 : C;
  const F rest = F(1 - p.smoothing), share = F(p.smoothing / double(C));

  Group group(int64_t i) const {
    if (S == 1) {
      const int64_t row = i * size;
      return {row, int(p.N - row < size ? p.N - row : size), row * C};
    }
    const int64_t n = i / groups_of_n, s = i % groups_of_n * size;
    return {n * S + s, int(S - s < size ? S - s : size), n * C * S + s};
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
    Targets<F> t{{}, {}, {}, {}, -1};
    for (int r = 0; r < g.rows; ++r) {
      const int64_t c = p.target ? p.target[g.row + r] : -1;
      const bool valid = p.target && c != p.ignore_index && uint64_t(c) < uint64_t(C);
      if (p.target && !valid && c != p.ignore_index && t.invalid < 0) t.invalid = g.row + r;
      t.index[r] = valid ? c : -1;
      t.weight[r] = !valid ? F(!p.target) : p.w ? F(to_float(p.w[c])) : F(1);
      t.hard[r] = valid ? rest * t.weight[r] : F(0);
      t.live[r] = F(valid || !p.target);
    }
    return t;
  }

  // ---- lanes hold classes

  template <class... Some>
  V soft_along(int64_t at, int64_t c, Some... n) const {
    V k = broadcast(share);
    if (p.q) k += rest * load(p.q + at + c, n...);
    if (p.w) k *= load(p.w + c, n...);
    return k;
  }

  // ---- lanes hold rows

  // out[c][r] = in[r][c] for a block of classes; missing rows are zero.
  template <class In>
  void gather(F* out, const In* in, int rows, int classes) const {
    if (S > 1) {
      for (int c = 0; c < classes; ++c) store(out + c * L, rows == L ? load(in + c * S) : load(in + c * S, rows));
      return;
    }
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < classes; ++c) out[c * L + r] = to_float(in[r * C + c]);
    for (int r = rows; r < L; ++r)
      for (int c = 0; c < classes; ++c) out[c * L + r] = 0;
  }

  template <class Out>
  void scatter(Out* out, const F* in, int rows, int classes) const {
    if (S > 1) {
      for (int c = 0; c < classes; ++c)
        if (rows == L)
          store(out + c * S, load(in + c * L));
        else
          store(out + c * S, load(in + c * L), rows);
      return;
    }
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < classes; ++c) out[r * C + c] = from_float<Out>(in[c * L + r]);
  }

  V soft_across(const F* q, int64_t c) const {  // q: what gather made of the probabilities of class c
    V k = broadcast(share);
    if (p.q) k += rest * load(q);
    if (p.w) k *= F(to_float(p.w[c]));
    return k;
  }
};

// ---- forward

template <bool kSoft, class T, class W, class R, class F = Compute<T>>
Online<kSoft, F> along(const R& rows, int64_t at) {
  constexpr int L = kLanes<F>;
  const int64_t C = rows.C, last = C - L;
  const T* const x = rows.p.x + at;
  Online<kSoft, F> online;
  int64_t c = 0;
  const auto value = [&](int i) { return load(x + c + i * L); };
  const auto soft = [&](int i) { return rows.soft_along(at, c + i * L); };
  for (; c + kBlock * L <= C; c += kBlock * L) online.add(kBlock, value, soft);
  const int registers = int((C - c) / L), rest = int(C % L);
  if (registers) online.add(registers, value, soft);
  if (rest) {  // the last register overlaps what has been seen
    Bits<Vec<F>> lane;
    for (int i = 0; i < L; ++i) lane[i] = i;
    online.add_some(lane >= unsigned(L - rest), load(x + last), kSoft ? rows.soft_along(at, last) : Vec<F>{});
  }
  online.raise(broadcast(max_lanes<F>(online.max)));
  return online;
}

template <bool kSoft, class T, class W, class R, class F = Compute<T>>
Online<kSoft, F> across(const R& rows, const Group& g) {
  constexpr int L = kLanes<F>;
  alignas(kVectorBytes) F x[kBlock * L], q[kBlock * L];
  Online<kSoft, F> online;
  for (int64_t c = 0; c < rows.C; c += kBlock) {
    const int classes = int(rows.C - c < kBlock ? rows.C - c : kBlock);
    rows.gather(x, rows.p.x + g.at + c * rows.S, g.rows, classes);
    if (rows.p.q) rows.gather(q, rows.p.q + g.at + c * rows.S, g.rows, classes);
    online.add(classes, [&](int i) { return load(x + i * L); }, [&](int i) { return rows.soft_across(q + i * L, c + i); });
  }
  return online;
}

struct Sums {  // of a task
  double loss, weight;
  int64_t invalid;
};

template <bool kSoft, class T, class W, class R>
void forward_group(const R& rows, const Group& g, Sums& sums) {
  using F = Compute<T>;
  using V = Vec<F>;
  constexpr int L = kLanes<F>;
  const auto& p = rows.p;
  const Targets<F> t = rows.targets(g);
  Online<kSoft, F> online;
  if (rows.across) {
    online = across<kSoft, T, W>(rows, g);
  } else {
    for (int r = 0; r < g.rows; ++r) {
      if (t.live[r] == 0) continue;
      const Online<kSoft, F> row = along<kSoft, T, W>(rows, g.at + r * rows.row_stride);
      online.max[r] = row.max[0];
      online.sum[r] = sum_lanes<F>(row.sum);
      if constexpr (kSoft) online.dot[r] = sum_lanes<F>(row.dot), online.mass[r] = sum_lanes<F>(row.mass);
    }
  }
  F picked[L] = {};
  for (int r = 0; r < g.rows; ++r)
    if (t.index[r] >= 0) picked[r] = to_float(p.x[g.at + r * rows.row_stride + t.index[r] * rows.S]);

  const V log_sum = log(online.sum);
  V loss = load(t.hard) * (log_sum - (load(picked) - online.max));
  if constexpr (kSoft) loss += online.mass * log_sum - online.dot;
  loss = load(t.live) != 0 ? loss : V{};

  if (p.reduction == kNone) store(p.loss + g.row, loss, g.rows);
  if (p.stats) {
    store(p.stats + g.row, online.max, g.rows);
    store(p.stats + rows.count + g.row, log_sum, g.rows);
    if (p.q) store(p.stats + 2 * rows.count + g.row, online.mass, g.rows);
  }
  for (int r = 0; r < g.rows; ++r) sums.loss += double(loss[r]), sums.weight += double(t.weight[r]);
  if (sums.invalid < 0) sums.invalid = t.invalid;
}

// ---- backward

// What a group's rows multiply by.
template <class F>
struct Scales {
  Vec<F> max, log_sum, grad, softmax;  // g; g (h + sum of k) / s
};

template <bool kSoft, class T, class W, class R, class F = Compute<T>>
void backward_along(const R& rows, int64_t at, int64_t index, F hard, F max, F log_sum, F grad, F softmax) {
  const auto& p = rows.p;
  for_lanes<F>(rows.C, [&](int64_t c, auto load, auto store) {
    const Vec<F> x = load(p.x + at + c) - max;
    Vec<F> dx = exp(x) * softmax;
    if constexpr (kSoft) {
      Vec<F> k = broadcast(rows.share), dq = (grad * rows.rest) * (log_sum - x);
      if (p.q) k += rows.rest * load(p.q + at + c);
      if (p.w) k *= load(p.w + c), dq *= load(p.w + c);
      dx -= grad * k;
      if (p.dq) store(p.dq + at + c, dq);
    }
    if (p.dx) store(p.dx + at + c, dx);
  });
  if (index >= 0 && p.dx) {
    F dx = exp(broadcast(F(to_float(p.x[at + index])) - max))[0] * softmax - hard;
    if constexpr (kSoft) dx -= grad * rows.share * (p.w ? F(to_float(p.w[index])) : F(1));
    p.dx[at + index] = from_float<T>(dx);
  }
}
}  // namespace
}  // namespace FASTFT_NAMESPACE
