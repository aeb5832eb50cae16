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
constexpr int kChunk = 64;                // registers of logits that share one look at their range: 4 KB, in L1
constexpr int64_t kTaskLogits = 1 << 15;  // of a task: about 10 us, ten times what handing it out costs
constexpr size_t kCached = 16 << 20;      // bytes of a gradient from which on its readers will not find it in a cache

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
      s += exp_below_0(v);
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
    sum += fresh ? exp_below_0(x - max) : V{};
    if constexpr (kSoft) dot += fresh ? k * (x - max) : V{}, mass += fresh ? k : V{};
  }

  void raise(V top) {
    if (!empty) {
      sum *= exp_below_0(max - top);
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
  using Parameter = W;
  using F = Compute<T>;
  using V = Vec<F>;
  static constexpr int L = kLanes<F>;

  static int64_t between(int64_t low, int64_t x, int64_t high) { return x < low ? low : x < high ? x : high; }

  const Args& p;
  const int64_t C = p.C, S = p.S, count = p.N * S;
  const int64_t stride = S > 1 ? 1 : C;         // from one row of a group to the next
  const bool across = S > 1 || C < L * kAcross;  // then transposing is cheaper than what moves between lanes
  const int64_t size = across ? L : between(1, kTaskLogits / C, L);  // rows of a group
  const int64_t groups_of_n = ceil_div(S > 1 ? S : p.N, size), groups = S > 1 ? p.N * groups_of_n : groups_of_n;
  const int64_t groups_per_task = between(1, kTaskLogits / (size * C), kTaskLogits);
  const int64_t tasks = ceil_div(groups, groups_per_task);
  const bool streams = S == 1 && size_t(count) * C * sizeof(T) > kCached;  // a gradient past the caches
  const F rest = F(1 - p.smoothing), share = F(p.smoothing / double(C));

  Group group(int64_t i) const {
    const int64_t n = S > 1 ? i / groups_of_n : 0, first = (i - n * groups_of_n) * size;
    return {n * S + first, int(between(0, (S > 1 ? S : p.N) - first, size)), n * C * S + first * stride};
  }

  // body(group) for the groups of a task, in ascending order.
  template <class Body>
  void for_groups(int64_t task, const Body& body) const {
    const int64_t end = (task + 1) * groups_per_task;
    for (int64_t i = task * groups_per_task; i < (end < groups ? end : groups); ++i) body(group(i));
  }

  Targets<F> targets(const Group& g) const {
    Targets<F> t;
    t.invalid = -1;
    if (!p.target) {
      for (int r = 0; r < L; ++r) t.index[r] = -1, t.hard[r] = 0, t.weight[r] = F(r < g.rows), t.live[r] = 1;
      return t;
    }
    int64_t index[L];
    for (int r = 0; r < L; ++r) index[r] = p.ignore_index;
    std::memcpy(index, p.target + g.row, size_t(g.rows) * sizeof *index);
    int64_t wrong = 0;
    for (int r = 0; r < L; ++r) {  // no branches: a register at a time
      const bool ignored = index[r] == p.ignore_index, inside = uint64_t(index[r]) < uint64_t(C);
      wrong |= !ignored & !inside;
      t.index[r] = inside & !ignored ? index[r] : -1;
      t.weight[r] = t.live[r] = inside & !ignored ? F(1) : F(0);
    }
    for (int r = 0; p.w && r < L; ++r)
      if (t.index[r] >= 0) t.weight[r] = F(to_float(p.w[t.index[r]]));
    for (int r = 0; r < L; ++r) t.hard[r] = rest * t.weight[r];
    for (int r = L; wrong && r--;)
      if (index[r] != p.ignore_index && uint64_t(index[r]) >= uint64_t(C)) t.invalid = g.row + r;
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

// What the logits of a group's rows add up to, a row in each lane.
template <class F>
struct Totals {
  Vec<F> max, more, dot, mass;  // the sum of exp(x - max) is 1 + more: near 1, its logarithm would be lost
};

template <bool kSoft, class R>
void add_along(const R& rows, int64_t at, int64_t c, int64_t end, Online<kSoft, typename R::F>& online) {
  using F = typename R::F;
  constexpr int L = R::L;
  const auto* const x = rows.p.x + at;
  const auto soft_at = [&](int64_t c) { return rows.soft(rows.q_along(at, c), rows.w_along(c)); };
  const auto value = [&](int i) { return load(x + c + i * L); };
  const auto soft = [&](int i) { return soft_at(c + i * L); };
  for (; c + kBlock * L <= end; c += kBlock * L) online.add(kBlock, value, soft);
  if (const int registers = int((end - c) / L)) online.add(registers, value, soft);
  if (const int rest = int((end - c) % L)) {  // the last register overlaps what has been seen
    Bits<Vec<F>> lane;
    for (int i = 0; i < L; ++i) lane[i] = i;
    online.add_some(lane + rest >= L, load(x + end - L), soft_at(end - L));
  }
}

// The least and the largest of the words of logits, lane by lane. Of signed words the largest is the largest logit if
// one is not negative; of unsigned ones, the least negative comes first.
template <class T>
struct Range {
  using F = Compute<T>;
  using V = Vec<F>;
  using Signed = decltype(Words<T>{} < Words<T>{});
  Words<T> signed_top, top, bottom;

  explicit Range(Words<T> words) : signed_top(words), top(words), bottom(words) {}
  void add(const Range& other) {
    signed_top = (Signed)other.signed_top > (Signed)signed_top ? other.signed_top : signed_top;
    top = other.top > top ? other.top : top;
    bottom = other.bottom < bottom ? other.bottom : bottom;
  }
  Words<T> max() const { return (Signed)signed_top < 0 ? bottom : signed_top; }
  Words<T> min() const { return (Signed)top < 0 ? top : bottom; }
  bool within(V low, V high) const {  // false for NaN, too
    V outside = {};
    for (int i = 0; i < kParts<T>; ++i)
      outside = (part<T>(min(), i) >= low) & (part<T>(max(), i) <= high) ? outside : broadcast(F(1));
    return max_lanes<F>(outside)[0] == 0;
  }
  V largest() const {  // of all, in every lane
    V top = part<T>(max(), 0);
    for (int i = 1; i < kParts<T>; ++i) top = part<T>(max(), i) > top ? part<T>(max(), i) : top;
    return max_lanes<F>(top);
  }
};

// Logits within 2^highest of the first ones' maximum are added up as they come, in one pass; a chunk that holds others
// goes the long way.
template <class R>
Totals<typename R::F> along(const R& rows, int64_t at) {
  using T = typename R::Logit;
  using F = typename R::F;
  using V = Vec<F>;
  constexpr int P = kLanes<T>;
  constexpr bool kRough = sizeof(typename R::Parameter) == 2;
  const T* const x = rows.p.x + at;
  const int64_t C = rows.C;
  const Words<T> first = load_words(x);
  const V start = Range<T>(first).largest(), one = broadcast(F(1));
  Online<false, F> online;
  V sum = {};
  Range<T> all(first);
  const V shift = ShiftedExp<V>::shift(start);
  const ShiftedExp<V> exp(shift);
  const V low = ShiftedExp<V>::low(shift), high = ShiftedExp<V>::high(shift);
  if (ShiftedExp<V>::reaches(start[0])) {
    int64_t c = 0;
    for (int n; (n = int((C - c) / P)) > 0; c += n * P) {
      n = n < kChunk ? n : kChunk;
      Range<T> range(load_words(x + c));
      V sums[kParts<T>] = {};
      for (int i = 0; i < n; ++i) {
        const Words<T> words = load_words(x + c + i * P);
        range.add(Range<T>(words));
#pragma GCC unroll 2
        for (int k = 0; k < kParts<T>; ++k) sums[k] += exp.template times<kRough>(part<T>(words, k), one);
      }
      if (!range.within(low, high)) {
        add_along<false>(rows, at, c, c + n * P, online);
        continue;
      }
      for (int k = 0; k < kParts<T>; ++k) sum += sums[k];
      all.add(range);
    }
    if (const int rest = int(C - c)) {  // the last register overlaps what has been seen
      Words<T> seen, lane;
      for (int i = 0; i < P; ++i) lane[i] = i, seen[i] = P - rest;
      const auto fresh = lane >= seen;
      const Words<T> words = fresh ? load_words(x + C - P) : first;
      const Range<T> range(words);
      if (range.within(low, high)) {
        for (int k = 0; k < kParts<T>; ++k)
          sum += (Bits<V>)part<T>((Words<T>)fresh, k) != 0 ? exp.template times<kRough>(part<T>(words, k), one) : V{};
        all.add(range);
      } else {
        add_along<false>(rows, at, c, C, online);
      }
    }
  } else {
    add_along<false>(rows, at, 0, C, online);
  }
  const V max = all.largest(), unit = exp.template times<kRough>(max, one), total = sum_lanes<F>(sum);
  if (online.empty) return {max, (total - unit) / unit, V{}, V{}};
  online.raise(max_lanes<F>(max > online.max ? max : online.max));
  const V ours = ShiftedExp<V>::reaches(start[0]) ? total / unit * exp_below_0(max - online.max) : V{};
  return {online.max, sum_lanes<F>(online.sum) - 1 + ours, V{}, V{}};
}

template <class R>
Totals<typename R::F> along_soft(const R& rows, int64_t at) {
  using F = typename R::F;
  Online<true, F> online;
  add_along<true>(rows, at, 0, rows.C, online);
  online.raise(max_lanes<F>(online.max));
  return {online.max, sum_lanes<F>(online.sum) - 1, sum_lanes<F>(online.dot), sum_lanes<F>(online.mass)};
}

template <bool kSoft, class R>
Totals<typename R::F> across(const R& rows, const Group& g) {
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
  return {online.max, online.sum - 1, online.dot, online.mass};
}

struct Sums {  // of a task
  double loss, weight;
  int64_t invalid;
};

template <bool kSoft, class R>
void forward_group(const R& rows, const Group& g, const Targets<typename R::F>& t, Vec<typename R::F>& loss) {
  using F = typename R::F;
  const auto& p = rows.p;
  Totals<F> totals = {};
  if (rows.across) {
    totals = across<kSoft>(rows, g);
  } else {
    for (int r = 0; r < g.rows; ++r) {
      if (t.live[r] == 0) continue;
      const int64_t at = g.at + r * rows.stride;
      Totals<F> row;
      if constexpr (kSoft)
        row = along_soft(rows, at);
      else
        row = along(rows, at);
      totals.max[r] = row.max[0], totals.more[r] = row.more[0];
      if constexpr (kSoft) totals.dot[r] = row.dot[0], totals.mass[r] = row.mass[0];
    }
  }
  F picked[R::L] = {};
  for (int r = 0; p.target && r < g.rows; ++r)
    picked[r] = to_float(p.x[g.at + r * rows.stride + (t.index[r] < 0 ? 0 : t.index[r]) * rows.S]);

  const Vec<F> log_sum = log1p(totals.more);
  loss = load(t.hard) * (log_sum - (load(picked) - totals.max));
  if constexpr (kSoft) loss += totals.mass * log_sum - totals.dot;
  loss = load(t.live) != 0 ? loss : Vec<F>{};

  if (p.reduction == kNone) store(p.loss + g.row, loss, g.rows);
  if (p.stats) {
    store(p.stats + g.row, totals.max, g.rows);
    store(p.stats + rows.count + g.row, log_sum, g.rows);
    if constexpr (kSoft) store(p.stats + 2 * rows.count + g.row, totals.mass, g.rows);
  }
}

template <bool kSoft, class R>
Sums forward_task(const R& rows, int64_t task) {
  using F = typename R::F;
  double losses[R::L] = {}, weights[R::L] = {};
  Sums sums = {0, 0, -1};
  rows.for_groups(task, [&](const Group& g) {
    const Targets<F> t = rows.targets(g);
    Vec<F> loss;
    forward_group<kSoft>(rows, g, t, loss);
    for (int r = 0; r < g.rows; ++r) losses[r] += double(loss[r]), weights[r] += double(t.weight[r]);
    if (sums.invalid < 0) sums.invalid = t.invalid;
  });
  for (int r = 0; r < R::L; ++r) sums.loss += losses[r], sums.weight += weights[r];
  return sums;
}

template <bool kSoft, class T, class W>
void forward(const CrossEntropyForward<T, W>& p, const Host& host) {
  using F = Compute<T>;
  const Rows<T, W, CrossEntropyForward<T, W>, 4> rows{p};
  Sums* const sums = scratch<Sums>(host, rows.tasks);
  parallel_for(host, rows.tasks, [&](int64_t task, int) { sums[task] = forward_task<kSoft>(rows, task); });

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
  V dx = exp_below_0(x) * by.softmax;
  if constexpr (kSoft) dx -= by.grad * k;
  return dx;
}

// Classes c to end of a row; the last register overlaps what has been written.
template <bool kSoft, class R, class F>
void grad_along(const R& rows, int64_t at, int64_t c, int64_t end, const Scales<F>& by) {
  using V = Vec<F>;
  const auto& p = rows.p;
  const auto step = [&](int64_t c) {
    const V x = load(p.x + at + c) - by.max, w = kSoft ? rows.w_along(c) : V{};
    if (p.dx) store(p.dx + at + c, grad_logits<kSoft>(x, kSoft ? rows.soft(rows.q_along(at, c), w) : V{}, by));
    if (kSoft && p.dq) store(p.dq + at + c, by.grad * rows.rest * w * (by.log_sum - x));
  };
  for (; c + R::L <= end; c += R::L) step(c);
  if (c < end) step(end - R::L);
}

// A whole row, with exp(x) 2^-shift factor for exp(x - max) softmax, where logits are at least `low`.
template <class F>
struct Quick {
  F shift, factor, low;
};
template <class R, class F>
void grad_along_quickly(const R& rows, int64_t at, const Scales<F>& by, const Quick<F>& quick) {
  using T = typename R::Logit;
  using V = Vec<F>;
  constexpr int P = kLanes<T>;
  const T* const x = rows.p.x + at;
  T* const dx = rows.p.dx + at;
  const ShiftedExp<V> exp(broadcast(quick.shift));
  const V factor = broadcast(quick.factor), low = broadcast(quick.low), high = broadcast(Online<false, F>::kLargest);
  const auto registers = [&](int64_t c, int n, auto put) {
    Range<T> range(load_words(x + c));
    for (int i = 1; i < n; ++i) range.add(Range<T>(load_words(x + c + i * P)));
    if (!range.within(low, high)) return grad_along<false>(rows, at, c, c + n * P, by);
    for (int i = 0; i < n; ++i) {
      const Words<T> words = load_words(x + c + i * P);
      V parts[kParts<T>];
#pragma GCC unroll 2
      for (int k = 0; k < kParts<T>; ++k)
        parts[k] = exp.template times<sizeof(T) == 2>(part<T>(words, k), factor);
      put(dx + c + i * P, join<T>(parts));
    }
  };
  const auto keep = [](T* p, Words<T> words) { std::memcpy(p, &words, sizeof words); };
  int64_t c = 0;
  if (rows.streams) {
    registers(0, 1, keep);
    c = int64_t(-reinterpret_cast<uintptr_t>(dx) % kVectorBytes / sizeof(T));
    for (; c + kChunk * P <= rows.C; c += kChunk * P) registers(c, kChunk, [](T* p, Words<T> words) { stream(p, words); });
  }
  for (int n; (n = int((rows.C - c) / P)) > 0; c += n * P) registers(c, n = n < kChunk ? n : kChunk, keep);
  if (c < rows.C) registers(rows.C - P, 1, keep);
}

template <bool kSoft, class R, class F>
void subtract_hard(const R& rows, int64_t at, int64_t index, const Scales<F>& by) {
  const auto& p = rows.p;
  const Vec<F> x = broadcast(F(to_float(p.x[at + index])) - by.max);
  p.dx[at + index] =
      from_float<typename R::Logit>(grad_logits<kSoft>(x, rows.soft(Vec<F>{}, rows.w_across(index)), by)[0] - by.hard);
}

template <class R>
void clear_row(const R& rows, int64_t at) {
  using T = typename R::Logit;
  constexpr int P = kLanes<T>;
  T* const dx = rows.p.dx + at;
  int64_t c = 0;
  if (rows.streams) {
    c = int64_t(-reinterpret_cast<uintptr_t>(dx) % kVectorBytes / sizeof(T));
    std::memset(dx, 0, size_t(c) * sizeof *dx);
    for (; c + P <= rows.C; c += P) stream(dx + c, Words<T>{});
  }
  std::memset(dx + c, 0, size_t(rows.C - c) * sizeof *dx);
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

  constexpr bool kRough = sizeof(typename R::Logit) == 2;
  const bool quick = !kSoft && p.dx;
  const V shift = ShiftedExp<V>::shift(max), factor = by.softmax / ShiftedExp<V>(shift).template times<kRough>(max, broadcast(F(1)));
  const V exponent = exponent_of(factor), low = ShiftedExp<V>::low(shift - exponent);
  for (int r = 0; r < g.rows; ++r) {
    const int64_t at = g.at + r * rows.stride;
    const Scales<F> of_row = {max[r], log_sum[r], grad[r], hard[r], by.softmax[r]};
    if (t.live[r] == 0) {
      if (p.dx) clear_row(rows, at);
    } else {
      if (quick && ShiftedExp<V>::reaches(max[r]) && -60 < exponent[r] && exponent[r] < 60)
        grad_along_quickly(rows, at, of_row, Quick<F>{shift[r], factor[r], low[r]});
      else
        grad_along<kSoft>(rows, at, 0, rows.C, of_row);
      if (p.dx && t.index[r] >= 0) subtract_hard<kSoft>(rows, at, t.index[r], of_row);
    }
  }
}

}  // namespace

template <class T, class W>
void cross_entropy_forward(const CrossEntropyForward<T, W>& p, const Host& host) {
  p.q || p.smoothing > 0 ? forward<true>(p, host) : forward<false>(p, host);
}

template <class T, class W>
void cross_entropy_backward(const CrossEntropyBackward<T, W>& p, const Host& host) {
  const Rows<T, W, CrossEntropyBackward<T, W>, kParts<T>> rows{p};
  parallel_for(host, rows.tasks, [&](int64_t task, int) {
    rows.for_groups(task, [&](const Group& g) {
      p.q || p.smoothing > 0 ? backward_group<true>(rows, g) : backward_group<false>(rows, g);
    });
    if (rows.streams) streamed();
  });
}

FASTFT_INSTANTIATE(cross_entropy_forward, CrossEntropyForward)
FASTFT_INSTANTIATE(cross_entropy_backward, CrossEntropyBackward)

}  // namespace FASTFT_NAMESPACE
