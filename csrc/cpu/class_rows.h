// The rows that cross-entropy is of: how they are grouped into tasks, where their classes, targets and parameters lie, and
// how a long row is walked through.
#pragma once
#include <type_traits>

#include "isa.h"

namespace FASTFT_NAMESPACE {

constexpr int kStreams = 4;    // parts of a long row that are walked through side by side
constexpr int kFetched = 512;  // bytes that each of them is fetched ahead
constexpr int64_t kPage = 4096;
constexpr int64_t kTaskLogits = 1 << 15;  // of a task: about 10 us, ten times what handing it out costs
constexpr size_t kCached = 16 << 20;      // bytes of a gradient from which on its readers will not find it in a cache

struct RowGroup {
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

// What stands as a W is of T, or of float beside logits of bf16, which is told at run time: as a type it would make a
// quarter more of this file's code. Calls body with the pointer as what it is.
template <class T, class Body>
inline __attribute__((always_inline)) auto as_given(T* data, bool is_float, const Body& body) {
  using Float = std::conditional_t<std::is_const_v<T>, const float, float>;
  if constexpr (sizeof(T) == sizeof(bf16))
    if (is_float) return body(reinterpret_cast<Float*>(data));
  return body(data);
}

// What forward and backward share: how rows are grouped into tasks, and where things lie.
template <class T, class Args, int kAcross>
struct ClassRows {
  using Logit = T;
  using F = Compute<T>;
  using V = Vec<F>;
  static constexpr int L = kLanes<F>;

  static int64_t between(int64_t low, int64_t x, int64_t high) { return x < low ? low : x < high ? x : high; }

  const Args& p;
  const bool is_float;  // what stands as a W
  const int64_t C = p.C, S = p.S, count = p.N * S;
  const int64_t stride = S > 1 ? 1 : C;         // from one row of a group to the next
  const bool across = S > 1 || C < L* kAcross;  // then transposing is cheaper than what moves between lanes
  const int64_t size = across ? L : between(1, kTaskLogits / C, L);  // rows of a group
  const int64_t groups_of_n = ceil_div(S > 1 ? S : p.N, size), groups = S > 1 ? p.N * groups_of_n : groups_of_n;
  const int64_t groups_per_task = between(1, kTaskLogits / (size * C), kTaskLogits);
  const int64_t tasks = ceil_div(groups, groups_per_task);
  const bool streams = S == 1 && size_t(count) * C * sizeof(T) > kCached;  // a gradient past the caches
  const F rest = F(1 - p.smoothing), share = F(p.smoothing / double(C));
  int64_t ahead = kFetched;  // bytes from what a gradient is made of to what is asked for meanwhile

  RowGroup group(int64_t i) const {
    const int64_t n = S > 1 ? i / groups_of_n : 0, first = (i - n * groups_of_n) * size;
    return {n * S + first, int(between(0, (S > 1 ? S : p.N) - first, size)), n * C * S + first * stride};
  }

  // body(group) for the groups of a task, in ascending order.
  template <class Body>
  void for_groups(int64_t task, const Body& body) const {
    const int64_t end = (task + 1) * groups_per_task;
    for (int64_t i = task * groups_per_task; i < (end < groups ? end : groups); ++i) body(group(i));
  }

  Targets<F> targets(const RowGroup& g) const {
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
      if (t.index[r] >= 0) t.weight[r] = weight(t.index[r]);
    for (int r = 0; r < L; ++r) t.hard[r] = rest * t.weight[r];
    for (int r = L; wrong && r--;)
      if (index[r] != p.ignore_index && uint64_t(index[r]) >= uint64_t(C)) t.invalid = g.row + r;
    return t;
  }

  F weight(int64_t c) const {
    return as_given(p.w, is_float, [&](auto* w) { return F(to_float(w[c])); });
  }
  V soft(V q, V w) const { return (share + rest * q) * w; }

  // ---- along: a register of classes from c on
  V q_along(int64_t at, int64_t c) const { return p.q ? along(p.q, at + c) : V{}; }
  V w_along(int64_t c) const { return p.w ? along(p.w, c) : broadcast(F(1)); }
  V along(const T* from, int64_t at) const {
    return as_given(from, is_float, [&](auto* parameters) { return load(parameters + at); });
  }

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
  void gather_q(F* out, int64_t at, int rows, int classes) const {
    if (p.q) as_given(p.q, is_float, [&](auto* q) { gather(out, q + at, rows, classes); });
  }
  V w_across(int64_t c) const { return broadcast(p.w ? weight(c) : F(1)); }
};

// Long rows are walked through in kStreams parts side by side, as the CPU's own prefetcher ends with a page: a loop that
// only reads makes 36 GB/s so, not 25. Each is fetched ahead, too, because arithmetic fills the window of a core.
template <class T>
struct RowParts {
  static constexpr int P = kLanes<T>;
  const int64_t registers;  // of one part; none where these would be shorter than a page
  const int64_t apart = registers * P;

  explicit RowParts(int64_t elements)
      : registers(elements * int64_t(sizeof(T)) < kStreams * kPage ? 0 : elements / (kStreams * P)) {}
  int64_t elements() const { return apart * kStreams; }
  int64_t at(int i) const { return i / kStreams * P + i % kStreams * apart; }  // of register i in the order of the walk
};
template <class T>
inline Words<T> fetch_words(const T* p, int64_t ahead = kFetched) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + ahead);
  return load_words(p);
}

}  // namespace FASTFT_NAMESPACE
