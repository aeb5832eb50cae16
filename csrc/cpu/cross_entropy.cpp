// Softmax cross-entropy. With s = sum of exp(x_c - max), p_c = exp(x_c - max) / s, -log p_c = log s - (x_c - max):
//   loss = h (-log p_t) + sum over c of k_c (-log p_c)      dx_c = g ((h + sum of k) p_c - k_c - (c == t ? h : 0))
//   class indices t:  h = (1 - smoothing) w_t  k_c = smoothing / C w_c
//   probabilities q:  h = 0  k_c = ((1 - smoothing) q_c + smoothing / C) w_c;  dq_c = g (1 - smoothing) w_c (-log p_c)
// Moves 3 M C sizeof(T) bytes for M rows, forward and backward: each reads the logits once, the backward writes dx; 2 M C
// where both are one (cross_entropy_with_grad). Of a row, its maximum and log s are kept apart: their sum would be off by
// half an ulp of the maximum, 5e-4 at 1e4.
// Reached on two Zen 4 cores at (4096, 30522), forward and backward: 34 and 47 GB/s in fp32, 27 and 43 GB/s in bf16,
// where a loop that only reads makes 31 (rows of 61 KB) to 36 GB/s (122 KB) and a streaming copy 46 to 52: the CPU's
// prefetcher ends with a page (with pages of 2 MB, 36 to 38). 16 values of bf16 take 6.8 and 7.9 cycles where a cache
// holds them, and 8 and 9 to be moved; of the two, hardly more than half runs at the same time. In one it takes 0.77 of
// the time in fp32 and 0.84 in bf16, there 17 cycles for 16 values: each row is fetched during the gradient before it.
//
// Lanes hold the classes of one row ("along"), or rows, where classes are few or do not come last ("across"). Either
// way each lane runs an online softmax of its own (Milakov and Gimelshein 2018, arXiv:1805.02867) over blocks of 16
// values: one exp more for 16, and nothing moves between lanes before a row's end. A reduction adds the rows of a task,
// then the tasks in order: that order follows from the shape.
// Tried: an exp in fixed point of three operations less, 1x; the next row's beginning fetched during a row, 1.01x; 1, 2,
// 3, 6 and 8 parts instead of 4, 1 to 1.1x; fetched into L2, or all of the next row, 1.1 to 1.3x; blocks of 8, 0.97x; a
// block kept in registers between its maximum and its sum, 1.06x in bf16, 1x in fp32; the range of long rows from
// widened numbers instead of words, 1.14x in bf16.
#include "class_rows.h"

namespace FASTFT_NAMESPACE {
namespace {

constexpr int kBlock = 16;         // values of a lane that share one look at the maximum
constexpr int kChunk = 128;        // registers of logits that share one look at their range: 8 KB, in L1
constexpr int64_t kShort = 512;    // classes up to which rows are added up L at a time
constexpr int64_t kRun = 8;        // tasks in a row of one thread, which fetches ahead, at most,
constexpr int kRunsPerThread = 8;  // and of such runs at least
constexpr int kFar = 60;           // exponents of the factors that a gradient may be made with

template <class F>
constexpr F kLargest = sizeof(F) == 8 ? F(1.7976931348623157e308) : F(3.4028234e38f);
template <class F>
constexpr F kRoom = 40;  // exp(40) = 2^58 in a sum of as many terms as memory holds is far from infinite

// What a lane knows of the values it has seen: the maximum, the sum of exp(x - max), the sums of k (x - max) and of k.
template <bool kSoft, class F>
struct Online {
  using V = Vec<F>;
  V max = broadcast(-kLargest<F>), sum = {}, dot = {}, mass = {};  // not -infinity, which minus itself is NaN
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

// ---- forward

// What the logits of a group's rows add up to, a row in each lane.
template <class F>
struct Totals {
  Vec<F> max, more, dot, mass;  // the sum of exp(x - max) is 1 + more: near 1, its logarithm would be lost
};

template <class R>
Totals<typename R::F> along_soft(const R& rows, int64_t at) {
  using F = typename R::F;
  constexpr int L = R::L;
  const auto* const x = rows.p.x + at;
  const auto soft_at = [&](int64_t c) { return rows.soft(rows.q_along(at, c), rows.w_along(c)); };
  Online<true, F> online;
  int64_t c = 0;
  const auto value = [&](int i) { return load(x + c + i * L); };
  const auto soft = [&](int i) { return soft_at(c + i * L); };
  for (; c + kBlock * L <= rows.C; c += kBlock * L) online.add(kBlock, value, soft);
  if (const int registers = int((rows.C - c) / L)) online.add(registers, value, soft);
  if (const int rest = int(rows.C % L))  // the last register overlaps what has been seen
    online.add_some(lanes<F>() + rest >= L, load(x + rows.C - L), soft_at(rows.C - L));
  online.raise(max_lanes<F>(online.max));
  return {online.max, sum_lanes<F>(online.sum) - 1, sum_lanes<F>(online.dot), sum_lanes<F>(online.mass)};
}

// exp(x) factor, or the least normal number where it is below that: nothing beside a sum's 1
template <bool kRough, class V>
inline V exp_or_least(V x, V factor, V low) {
  return exp_times<kRough>(x < low ? low : x, factor);
}

// Short rows, two passes over what L1 holds. A row's maximum and sum are spread over a register until the rows of a
// group are folded together.
template <class R>
Totals<typename R::F> along_short(const R& rows, const RowGroup& g) {
  using F = typename R::F;
  using V = Vec<F>;
  constexpr int L = R::L;
  const int64_t C = rows.C;
  const int rest = int(C % L);
  V tops[L] = {}, sums[L] = {};
  for (int r = 0; r < g.rows; ++r) {
    const auto* const x = rows.p.x + g.at + r * C;
    V top = load(x + C - L);
    for (int64_t c = 0; c + L <= C; c += L) top = larger(load(x + c), top);
    tops[r] = top;
  }
  alignas(kVectorBytes) F max[L];
  store(max, fold_rows<F>(tops, [](V a, V b) { return larger(a, b); }));
  const V low = lowest_exp(V{}), one = broadcast(F(1));
  for (int r = 0; r < g.rows; ++r) {
    const auto* const x = rows.p.x + g.at + r * C;
    const V m = broadcast(max[r]);
    V sum = {};
    for (int64_t c = 0; c + L <= C; c += L) sum += exp_or_least<false>(load(x + c) - m, one, low);
    if (rest)  // the last register overlaps what has been seen
      sum += lanes<F>() + rest >= L ? exp_or_least<false>(load(x + C - L) - m, one, low) : V{};
    sums[r] = sum;
  }
  const V unit = exp_or_least<false>(V{}, one, low), total = fold_rows<F>(sums, [](V a, V b) { return a + b; });
  return {load(max), (total - unit) / unit, V{}, V{}};
}

// The least and the largest of words of logits, lane by lane, without widening them first: of signed words the largest
// is the largest logit if one is not negative; of unsigned ones, the least negative comes first.
template <class T>
struct Range {
  using Signed = decltype(Words<T>{} < Words<T>{});
  Signed signed_top;
  Words<T> top, bottom;

  explicit Range(Words<T> words) : signed_top((Signed)words), top(words), bottom(words) {}
  void add(Words<T> words) {
    signed_top = (Signed)words > signed_top ? (Signed)words : signed_top;
    top = words > top ? words : top;
    bottom = words < bottom ? words : bottom;
  }
  Words<T> max() const { return signed_top < 0 ? bottom : (Words<T>)signed_top; }
  Words<T> min() const { return (Signed)top < 0 ? top : bottom; }
};

// Long rows, one pass: logits are added up relative to a guess at their maximum, which is mended where it turns out far
// too low. With the target's logit in the guess, rounding the differences costs less than an ulp of the loss.
template <bool kRough, class T>
struct Running {
  using F = Compute<T>;
  using V = Vec<F>;
  static constexpr int kOf = kParts<T>;
  V guess, max, sum = {};

  Running(Words<T> first, F target)
      : guess(larger(broadcast(-kLargest<F>), broadcast(target))), max(part<T>(first, 0)) {
    for (int k = 1; k < kOf; ++k) max = larger(part<T>(first, k), max);
    guess = larger(max_lanes<F>(max), guess);  // finite: -infinity minus itself is NaN
  }

  template <class At>
  inline __attribute__((always_inline)) void add(int n, const At& words_at) {
    const V low = lowest_exp(V{}), one = broadcast(F(1));
    Range<T> range(words_at(0));
    V sums[kOf] = {}, outside = {};
#pragma GCC unroll kStreams
    for (int i = 0; i < n; ++i) {
      const Words<T> words = words_at(i);
      range.add(words);
#pragma GCC unroll 2
      for (int k = 0; k < kOf; ++k) sums[k] += exp_times<kRough>(part<T>(words, k) - guess, one);
    }
    for (int k = 0; k < kOf; ++k) {  // outside of what exp_times takes, NaN too
      const V top = part<T>(range.max(), k), bottom = part<T>(range.min(), k);
      outside = (bottom >= guess + low) & (top <= guess + kRoom<F>) ? outside : one;
      max = larger(top, max);
    }
    if (max_lanes<F>(outside)[0] != 0) {  // again, with care
      const V top = max_lanes<F>(max);
      if (top[0] > guess[0] + kRoom<F>) sum *= exp_below_0(guess - top), guess = top;
      for (int k = 0; k < kOf; ++k) {
        sums[k] = V{};
        for (int i = 0; i < n; ++i) sums[k] += exp_or_least<kRough>(part<T>(words_at(i), k) - guess, one, low);
      }
    }
    for (int k = 0; k < kOf; ++k) sum += sums[k];
  }

  Totals<F> totals() const {
    const V top = max_lanes<F>(max), low = lowest_exp(V{});
    const V unit = exp_or_least<kRough>(top - guess, broadcast(F(1)), low);
    return {top, (sum_lanes<F>(sum) - unit) / unit, V{}, V{}};
  }
};

template <bool kRough, class R>
Totals<typename R::F> along(const R& rows, int64_t at, int64_t index) {
  using T = typename R::Logit;
  constexpr int P = kLanes<T>;
  const T* const x = rows.p.x + at;
  Running<kRough, T> running(load_words(x), to_float(x[index]));
  const RowParts<T> parts(rows.C);
  int64_t c = 0;
  for (int n; (n = int(parts.registers - c / P)) > 0; c += n * P) {
    n = n < kChunk / kStreams ? n : kChunk / kStreams;
    running.add(n * kStreams, [&](int i) { return fetch_words(x + c + parts.at(i)); });
  }
  c = parts.elements();
  for (int n; (n = int((rows.C - c) / P)) > 0; c += n * P) {
    n = n < kChunk ? n : kChunk;
    running.add(n, [&](int i) { return load_words(x + c + i * P); });
  }
  if (c < rows.C) {  // the last register overlaps what has been seen
    T last[2 * P];
    for (int i = 0; i < P; ++i) last[P + i] = from_float<T>(-HUGE_VALF);
    std::memcpy(last, x + rows.C - P, sizeof last / 2);
    running.add(1, [&](int) { return load_words(last + (P - (rows.C - c))); });
  }
  return running.totals();
}

template <bool kSoft, class R>
Totals<typename R::F> across(const R& rows, const RowGroup& g) {
  using F = typename R::F;
  constexpr int L = R::L;
  alignas(kVectorBytes) F x[kBlock * L], q[kBlock * L] = {};
  Online<kSoft, F> online;
  for (int64_t c = 0; c < rows.C; c += kBlock) {
    const int classes = int(rows.C - c < kBlock ? rows.C - c : kBlock);
    rows.gather(x, rows.p.x + g.at + c * rows.S, g.rows, classes);
    if (kSoft) rows.gather_q(q, g.at + c * rows.S, g.rows, classes);
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
void forward_group(const R& rows, const RowGroup& g, const Targets<typename R::F>& t, Vec<typename R::F>& loss) {
  using F = typename R::F;
  const auto& p = rows.p;
  Totals<F> totals = {};
  if (rows.across) {
    totals = across<kSoft>(rows, g);
  } else if (!kSoft && rows.C <= kShort) {
    totals = along_short(rows, g);
  } else {
    for (int r = 0; r < g.rows; ++r) {
      if (t.live[r] == 0) continue;
      const int64_t at = g.at + r * rows.stride;
      Totals<F> row;
      if constexpr (kSoft)
        row = along_soft(rows, at);
      else
        row = kRough<typename R::Logit> && !rows.is_float ? along<kRough<typename R::Logit>>(rows, at, t.index[r])
                                                          : along<false>(rows, at, t.index[r]);
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

  if (p.reduction == kNone) as_given(p.loss, rows.is_float, [&](auto* losses) { store(losses + g.row, loss, g.rows); });
  if (p.stats) {
    store(p.stats + g.row, totals.max, g.rows);
    store(p.stats + rows.count + g.row, log_sum, g.rows);
    if constexpr (kSoft) store(p.stats + 2 * rows.count + g.row, totals.mass, g.rows);
  }
}

// Calls then(group) for each group when its statistics are there.
template <bool kSoft, class R, class Then>
Sums forward_task(const R& rows, int64_t task, const Then& then) {
  using F = typename R::F;
  double losses[R::L] = {}, weights[R::L] = {};
  Sums sums = {0, 0, -1};
  rows.for_groups(task, [&](const RowGroup& g) {
    const Targets<F> t = rows.targets(g);
    Vec<F> loss;
    forward_group<kSoft>(rows, g, t, loss);
    for (int r = 0; r < g.rows; ++r) losses[r] += double(loss[r]), weights[r] += double(t.weight[r]);
    if (sums.invalid < 0) sums.invalid = t.invalid;
    then(g);
  });
  for (int r = 0; r < R::L; ++r) sums.loss += losses[r], sums.weight += weights[r];
  return sums;
}

// Adds up the tasks, in order.
template <class R>
void finish(const R& rows, const Sums* sums) {
  using F = typename R::F;
  const auto& p = rows.p;
  Sums all = {0, 0, -1};
  for (int64_t task = 0; task < rows.tasks; ++task) {
    all.loss += sums[task].loss;
    all.weight += sums[task].weight;
    if (all.invalid < 0) all.invalid = sums[task].invalid;
  }
  if (p.reduction != kNone)
    as_given(p.loss, rows.is_float, [&](auto* loss) {
      *loss =
          from_float<std::remove_pointer_t<decltype(loss)>>(F(p.reduction == kMean ? all.loss / all.weight : all.loss));
    });
  if (p.divisor) *p.divisor = F(all.weight);
  *p.invalid = all.invalid;
}

template <bool kSoft, class T>
void forward(const CrossEntropyForward<T, T>& p, bool is_float, const Host& host) {
  const ClassRows<T, CrossEntropyForward<T, T>, kSoft ? 4 : 1> rows{p, is_float};
  Sums* const sums = scratch<Sums>(host, rows.tasks);
  parallel_for(host, rows.tasks,
               [&](int64_t task, int) { sums[task] = forward_task<kSoft>(rows, task, [](const RowGroup&) {}); });
  finish(rows, sums);
}

// The divisor of a mean, before any logits are read.
template <class R>
typename R::F divisor_of(const R& rows) {
  double all = 0;
  for (int64_t task = 0; task < rows.tasks; ++task) {
    double weights[R::L] = {}, weight = 0;
    rows.for_groups(task, [&](const RowGroup& g) {
      const Targets<typename R::F> t = rows.targets(g);
      for (int r = 0; r < g.rows; ++r) weights[r] += double(t.weight[r]);
    });
    for (int r = 0; r < R::L; ++r) weight += weights[r];
    all += weight;
  }
  return typename R::F(all);
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

template <bool kSoft, class R, class F>
void grad_along(const R& rows, int64_t at, const Scales<F>& by) {
  using V = Vec<F>;
  const auto& p = rows.p;
  const auto step = [&](int64_t c) {
    const V x = load(p.x + at + c) - by.max, w = kSoft ? rows.w_along(c) : V{};
    if (p.dx) store(p.dx + at + c, grad_logits<kSoft>(x, kSoft ? rows.soft(rows.q_along(at, c), w) : V{}, by));
    if (kSoft && p.dq)
      as_given(p.dq, rows.is_float, [&](auto* dq) { store(dq + at + c, by.grad * rows.rest * w * (by.log_sum - x)); });
  };
  for (int64_t c = 0; c + R::L <= rows.C; c += R::L) step(c);
  if (rows.C % R::L) step(rows.C - R::L);  // again some that have been written
}

// Writes words_at(c) to dx + c, whole registers of a row; returns where they end. Past the caches, to aligned addresses,
// if the gradient does not fit them: what comes before the first of those is written as well.
template <class R, class At>
inline __attribute__((always_inline)) int64_t write_words(const R& rows, typename R::Logit* dx, const At& words_at) {
  using T = typename R::Logit;
  constexpr int P = kLanes<T>;
  int64_t c = 0;
  if (rows.streams && rows.C >= 2 * P) {
    store_words(dx, words_at(0));
    c = int64_t(kVectorBytes - uintptr_t(dx) % kVectorBytes) / int64_t(sizeof(T));
    const RowParts<T> parts(rows.C - c);
    for (const int64_t end = c + parts.apart; c < end; c += P)
#pragma GCC unroll kStreams
      for (int i = 0; i < kStreams; ++i) stream(dx + c + i * parts.apart, words_at(c + i * parts.apart));
    c += parts.elements() - parts.apart;
    for (; c + P <= rows.C; c += P) stream(dx + c, words_at(c));
  }
  for (; c + P <= rows.C; c += P) store_words(dx + c, words_at(c));
  return c;
}

// The same without soft targets, for factors of moderate size; where exp(x - max) softmax is less than normal, it is 0.
template <class R, class F>
void grad_along_quickly(const R& rows, int64_t at, const Scales<F>& by, F lowest) {
  using T = typename R::Logit;
  using V = Vec<F>;
  constexpr int L = R::L;
  const T* const x = rows.p.x + at;
  T* const dx = rows.p.dx + at;
  const V max = broadcast(by.max), factor = broadcast(by.softmax), low = broadcast(lowest);
  const auto grad = [&](V x) { return exp_or_0<kRough<T>>(x - max, factor, low); };
  int64_t c = write_words(rows, dx, [&](int64_t c) {
    const Words<T> words = fetch_words(x + c, rows.ahead);
    V parts[kParts<T>];
#pragma GCC unroll 2
    for (int k = 0; k < kParts<T>; ++k) parts[k] = grad(part<T>(words, k));
    return join<T>(parts);
  });
  for (; c + L <= rows.C; c += L) store(dx + c, grad(load(x + c)));
  if (c < rows.C) store(dx + rows.C - L, grad(load(x + rows.C - L)));  // again some that have been written
}

template <class R>
void clear_row(const R& rows, int64_t at) {
  using T = typename R::Logit;
  T* const dx = rows.p.dx + at;
  const int64_t c = write_words(rows, dx, [](int64_t) { return Words<T>{}; });
  std::memset(dx + c, 0, size_t(rows.C - c) * sizeof(T));
}

template <bool kSoft, class R, class V>
void backward_across(const R& rows, const RowGroup& g, const Targets<typename R::F>& t, const Scales<V>& by) {
  using F = typename R::F;
  constexpr int L = R::L;
  const auto& p = rows.p;
  alignas(kVectorBytes) F x[kBlock * L], q[kBlock * L] = {};
  for (int64_t c = 0; c < rows.C; c += kBlock) {
    const int classes = int(rows.C - c < kBlock ? rows.C - c : kBlock);
    const int64_t at = g.at + c * rows.S;
    rows.gather(x, p.x + at, g.rows, classes);
    if (kSoft) rows.gather_q(q, at, g.rows, classes);
    for (int i = 0; i < classes; ++i) {  // dx and dq take the places of x and q
      const V v = load(x + i * L) - by.max, w = rows.w_across(c + i);
      const V dx = grad_logits<kSoft>(v, kSoft ? rows.soft(load(q + i * L), w) : V{}, by);
      store(x + i * L, load(t.live) != 0 ? dx : V{});  // where ignored logits are NaN, too
      if (kSoft && p.dq) store(q + i * L, by.grad * rows.rest * w * (by.log_sum - v));
    }
    for (int r = 0; r < g.rows; ++r)
      if (t.index[r] >= c && t.index[r] < c + classes) x[(t.index[r] - c) * L + r] -= by.hard[r];
    if (p.dx) rows.scatter(p.dx + at, x, g.rows, classes);
    if (kSoft && p.dq) as_given(p.dq, rows.is_float, [&](auto* dq) { rows.scatter(dq + at, q, g.rows, classes); });
  }
}

template <bool kSoft, class R>
void backward_group(const R& rows, const RowGroup& g) {
  using F = typename R::F;
  using V = Vec<F>;
  const auto& p = rows.p;
  const Targets<F> t = rows.targets(g);
  const V max = load(p.stats + g.row, g.rows), log_sum = load(p.stats + rows.count + g.row, g.rows);
  V grad = as_given(p.dy, rows.is_float, [&](auto* dy) {
    return p.reduction == kNone ? load(dy + g.row, g.rows) : broadcast(F(to_float(*dy)));
  });
  if (p.reduction == kMean) grad /= *p.divisor;
  const V hard = grad * load(t.hard), soft = kSoft ? grad * load(p.stats + 2 * rows.count + g.row, g.rows) : V{};
  const Scales<V> by = {max, log_sum, grad, hard, (hard + soft) * exp(-log_sum)};
  if (rows.across) return backward_across<kSoft>(rows, g, t, by);

  // What the targets' own gradients are: one at a time they would take as long as short rows.
  F picked[R::L] = {}, at_target[R::L];
  for (int r = 0; r < g.rows; ++r)
    if (t.index[r] >= 0) picked[r] = to_float(p.x[g.at + r * rows.stride + t.index[r]]);
  const V soft_target = kSoft ? rows.soft(V{}, load(t.weight)) : V{};
  store(at_target, grad_logits<kSoft>(load(picked) - max, soft_target, by) - hard);

  const V exponent = exponent_of(by.softmax), low = lowest_exp(exponent);
  for (int r = 0; r < g.rows; ++r) {
    const int64_t at = g.at + r * rows.stride;
    const Scales<F> of_row = {max[r], log_sum[r], grad[r], hard[r], by.softmax[r]};
    if (t.live[r] == 0) {
      if (p.dx) clear_row(rows, at);
      continue;
    }
    if (!kSoft && p.dx && exponent[r] > -kFar && exponent[r] < kFar)
      grad_along_quickly(rows, at, of_row, low[r]);
    else
      grad_along<kSoft>(rows, at, of_row);
    if (p.dx && t.index[r] >= 0) p.dx[at + t.index[r]] = from_float<typename R::Logit>(at_target[r]);
  }
}

template <class T>
void forward(const CrossEntropyForward<T, T>& p, bool is_float, const Host& host) {
  p.q || p.smoothing > 0 ? forward<true>(p, is_float, host) : forward<false>(p, is_float, host);
}

template <class T>
void backward(const CrossEntropyBackward<T, T>& p, bool is_float, const Host& host) {
  const ClassRows<T, CrossEntropyBackward<T, T>, 1> rows{p, is_float};
  parallel_for(host, rows.tasks, [&](int64_t task, int) {
    rows.for_groups(task, [&](const RowGroup& g) {
      p.q || p.smoothing > 0 ? backward_group<true>(rows, g) : backward_group<false>(rows, g);
    });
    if (rows.streams) streamed();
  });
}

// Each row's gradient while a cache has its logits: 2 M C sizeof(T) bytes are moved. Meanwhile the next row is fetched.
template <class T>
void with_grad(const CrossEntropyWithGrad<T, T>& p, bool is_float, const Host& host) {
  using F = Compute<T>;
  const CrossEntropyForward<T, T> of_forward = {p.loss, p.stats,  p.divisor,      nullptr, p.invalid,
                                                p.x,    p.target, nullptr,        p.w,     p.N,
                                                p.C,    1,        p.ignore_index, 0.0,     p.reduction};
  const ClassRows<T, CrossEntropyForward<T, T>, 1> rows{of_forward, is_float};
  const F divisor = p.reduction == kMean ? divisor_of(rows) : F(1);
  const float dy_float = float(p.dy);
  const T dy_own = from_float<T>(F(p.dy)), *const dy = is_float ? reinterpret_cast<const T*>(&dy_float) : &dy_own;
  const CrossEntropyBackward<T, T> of_backward = {p.dx, nullptr, dy,  p.stats, &divisor,       p.x, p.target,   nullptr,
                                                  p.w,  p.N,     p.C, 1,       p.ignore_index, 0.0, p.reduction};
  ClassRows<T, CrossEntropyBackward<T, T>, 1> grads{of_backward, is_float};
  grads.ahead = p.C * int64_t(sizeof(T));
  Sums* const sums = scratch<Sums>(host, rows.tasks);
  const int64_t run = rows.between(1, rows.tasks / (kRunsPerThread * host.threads), kRun);
  parallel_for(host, ceil_div(rows.tasks, run), [&](int64_t index, int) {
    const int64_t end = (index + 1) * run;
    for (int64_t task = index * run; task < (end < rows.tasks ? end : rows.tasks); ++task)
      sums[task] = forward_task<false>(rows, task, [&](const RowGroup& g) { backward_group<false>(grads, g); });
    if (grads.streams) streamed();
  });
  finish(rows, sums);
}

}  // namespace

template <class T, class W>
void cross_entropy_forward(const CrossEntropyForward<T, W>& p, const Host& host) {
  forward(bit_cast<CrossEntropyForward<T, T>>(p), std::is_same_v<W, float>, host);
}

template <class T, class W>
void cross_entropy_backward(const CrossEntropyBackward<T, W>& p, const Host& host) {
  backward(bit_cast<CrossEntropyBackward<T, T>>(p), std::is_same_v<W, float>, host);
}

template <class T, class W>
void cross_entropy_with_grad(const CrossEntropyWithGrad<T, W>& p, const Host& host) {
  with_grad(bit_cast<CrossEntropyWithGrad<T, T>>(p), std::is_same_v<W, float>, host);
}

FASTFT_INSTANTIATE(cross_entropy_forward, CrossEntropyForward)
FASTFT_INSTANTIATE(cross_entropy_backward, CrossEntropyBackward)
FASTFT_INSTANTIATE(cross_entropy_with_grad, CrossEntropyWithGrad)

}  // namespace FASTFT_NAMESPACE
