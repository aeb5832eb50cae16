// Scaled dot-product attention and its gradients, one (sequence, head) per task, longest first; never S x S in memory.
//   x = scale q k^T + mask    p = softmax(x)    o = (f p) v    f: dropout's factors, drawn again in the backward
//   dv = (f p)^T dy    dp = f (dy v^T)    ds = p (dp - sum over keys of p dp)    dq = scale ds k    dk = scale ds^T q
// Floor per head: 4 Sq Sk D FLOPs forward, 10 backward, at the FMA peak (VDPBF16PS for bf16 where there is one), and per
// score 0.7 cycles for exp (twice in a step), 0.75 for dropout (likewise); what is read and written is nothing beside that.
//
// Forward: kQueries rows of scores over all keys lie in L2 (64 x 512 fp32: 144 KB), so that softmax takes two passes over
// them, maximum and exp, 16 rows' sums at a time. Division by the sum waits for the output, which has fewer elements.
// Backward: likewise, with p from the two statistics of its row; dk and dv of a head stay in L2. The sum of p dp could be
// had before, as that of dy o over a head, but not with the rounding of dp, which it cancels where few keys count.
// Short heads would wait for memory half of their time: rows of a head are 256 bytes or less, kilobytes apart, which no
// hardware fetches ahead. So a head's rows are asked for while the one before is computed, and large outputs are written
// past the caches (fetching what is overwritten takes twice the time). With both, heads of 32 in memory take as long as in L2.
// Reached on Zen 4 for heads of 32, fp32, forward and backward: 14.5 us, 60 % of the floor; products are 65 % of that (at
// 90 % of the peak), packing 15, softmax and its gradient 10, dropout 4, writing 6.
// Fully masked rows give zeros, as torch's math path does. bf16: products accumulate in fp32, p and ds are rounded to bf16
// where VDPBF16PS multiplies them, else not at all.
#include "dropout.h"
#include "strips.h"

namespace FASTFT_NAMESPACE {
namespace {

constexpr int kQueries = 64;       // of a block of the forward
constexpr int kGradQueries = 128;  // of the backward, where they are also the depth of two products
constexpr int64_t kGradScores = 1 << 15, kLeastGradQueries = 2 * kTileRows;  // fewer, so that two strips stay in L2

// Parts of one block of memory; without a block it only counts.
struct Arena {
  char* base;
  int64_t bytes = 0;
  template <class E>
  E* take(int64_t n) {
    E* const part = base ? reinterpret_cast<E*>(base + bytes) : nullptr;
    bytes += round_up(n * int64_t(sizeof(E)), 64);
    return part;
  }
};

// One task: a head of a sequence.
struct Head {
  int64_t b, h, queries, keys;
  int64_t q_row, k_row;  // the first, in a packed tensor
  int64_t row;           // the number of the first query
};

// The tasks, sequences with many keys first, and masks and dropout of their rows.
template <class Args>
struct Heads {
  const Args& p;
  const float* float_bias;   // in place of p.bias, or null
  int64_t* order = nullptr;  // of the sequences

  Heads(const Args& p, const float* float_bias, const Host& host) : p(p), float_bias(float_bias) {
    if (!p.cu_k) return;
    order = scratch<int64_t>(host, p.B + p.Sk + 2);
    int64_t* const next = order + p.B;  // by length: where the next sequence goes
    for (int64_t s = 0; s <= p.Sk + 1; ++s) next[s] = 0;
    for (int64_t b = 0; b < p.B; ++b) ++next[p.cu_k[b + 1] - p.cu_k[b]];
    for (int64_t s = p.Sk, longer = 0; s >= 0; --s) {
      const int64_t of_length = next[s];
      next[s] = longer;
      longer += of_length;
    }
    for (int64_t b = 0; b < p.B; ++b) order[next[p.cu_k[b + 1] - p.cu_k[b]]++] = b;
  }

  int64_t count() const { return p.B * p.N; }

  Head head(int64_t task) const {
    const int64_t b = order ? order[task / p.N] : task / p.N, h = task % p.N;
    Head head{b, h, p.Sq, p.Sk, 0, 0, (b * p.N + h) * p.Sq};
    if (p.cu_q) {
      head.q_row = p.cu_q[b], head.queries = p.cu_q[b + 1] - p.cu_q[b];
      head.row = h * (p.rows / p.N) + p.cu_q[b];
    }
    if (p.cu_k) head.k_row = p.cu_k[b], head.keys = p.cu_k[b + 1] - p.cu_k[b];
    return head;
  }

  template <class E>
  E* rows_of(const Head& head, E* data, bool of_queries, int64_t batch, int64_t of_head, int64_t token) const {
    const bool packed = of_queries ? p.cu_q : p.cu_k;
    return data + (packed ? (of_queries ? head.q_row : head.k_row) * token : head.b * batch) + head.h * of_head;
  }

  // Lets `ahead` have a head's rows of a tensor.
  template <class E>
  void ask(Ahead& ahead, const Head& head, const E* data, bool of_queries, int64_t batch, int64_t of_head,
           int64_t token) const {
    const int64_t rows = least(of_queries ? head.queries : head.keys, kMostAhead);
    const E* const first = rows_of(head, data, of_queries, batch, of_head, token);
    if (rows > 0) ahead.parts[ahead.count++] = {reinterpret_cast<const char*>(first), token * int64_t(sizeof(E)), rows};
  }

  // Whether outputs are better written past the caches.
  bool large() const { return p.rows * p.D * int64_t(sizeof(*p.q)) >= kStreamBytes; }

  // Whether rows differ in what is added to their scores.
  bool by_row() const { return p.causal || ((p.keep || p.bias) && p.mask_query != 0); }

  // What is added to the scores of a query and keys [from, to), as many as whole registers hold.
  template <class F>
  void fill_bias(F* out, const Head& head, int64_t query, int64_t from, int64_t to) const {
    constexpr F kMasked = F(-__builtin_inf());
    int64_t live = least(head.keys, to);
    if (p.causal) live = least(live, query + 1);
    const int64_t at = head.b * p.mask_batch + head.h * p.mask_head + query * p.mask_query, step = p.mask_key;
    int64_t k = from;
    if (p.keep && step == 1)
      for (const uint8_t* const keep = p.keep + at; k < live; ++k) out[k - from] = keep[k] ? F(0) : kMasked;
    else if (p.keep)
      for (; k < live; ++k) out[k - from] = p.keep[at + k * step] ? F(0) : kMasked;
    else if (float_bias)
      for (; k < live; ++k) out[k - from] = F(float_bias[at + k * step]);
    else if (p.bias)
      for (; k < live; ++k) out[k - from] = F(to_float(p.bias[at + k * step]));
    else
      for (; k < live; ++k) out[k - from] = F(0);
    for (to = round_up(to, kLanes<F>), k = k < from ? from : k; k < to; ++k) out[k - from] = kMasked;
  }
};

// Dropout's factors, a row's after the other: rows of few keys share a group, which is drawn once.
template <class F>
struct Factors {
  F* buffer;
  const Dropout& dropout;
  int64_t pitch;       // by the most keys of all sequences, so that none shares its numbers
  int64_t drawn = -1;  // the group that is in the buffer

  // Without dropout they are ones, so that no loop has to ask.
  Factors(F* buffer, const Dropout& dropout, int64_t most_keys, int64_t keys)
      : buffer(buffer), dropout(dropout), pitch(dropout_pitch(most_keys)) {
    for (int64_t key = 0; !dropout && key < keys; key += kLanes<F>) store(buffer + key, broadcast(F(1)));
  }

  // Of a row and its first `keys`, as many as whole registers hold.
  const F* of_row(int64_t row, int64_t keys) {
    if (!dropout) return buffer;
    const int64_t first = row * pitch, group = first / kDropoutGroup;
    for (int64_t from = 0; from < keys && (pitch >= kDropoutGroup || group != drawn); from += kDropoutGroup)
      dropout_group(buffer + from, dropout, group + from / kDropoutGroup);
    drawn = group;
    return buffer + first % kDropoutGroup;
  }
};

// ---- forward

template <class T>
struct ForwardMemory {
  using Tile = typename TileFor<T>::type;
  using Unit = typename Tile::Unit;
  using Acc = typename Tile::Acc;
  int64_t k_panel, v_panel;  // units of a panel
  Unit *k, *v, *q, *p;       // panels of k^T and v; strips of q and p
  Acc *s, *o, *bias, *factors;

  ForwardMemory(Arena& arena, int64_t Sk, int64_t D) {
    constexpr int kCols = kTileCols<Tile>;
    k_panel = ceil_div(D, Tile::kPair) * kCols, v_panel = ceil_div(Sk, Tile::kPair) * kCols;
    k = arena.take<Unit>(ceil_div(Sk, kCols) * k_panel);
    v = arena.take<Unit>(ceil_div(D, kCols) * v_panel);
    q = arena.take<Unit>(strips(kQueries, ceil_div(D, Tile::kPair)));
    s = arena.take<Acc>(strips(kQueries, Sk));
    // Scores become probabilities where they are, unless these are smaller.
    p = Tile::kPair == 1 ? reinterpret_cast<Unit*>(s) : arena.take<Unit>(strips(kQueries, ceil_div(Sk, Tile::kPair)));
    o = arena.take<Acc>(strips(kQueries, D));
    bias = arena.take<Acc>(round_up(Sk, kBlock));
    factors = arena.take<Acc>(round_up(Sk, kBlock));
  }
};

// A row's numbers, a register at a time: body(key, scores).
template <class Acc, class Body>
inline __attribute__((always_inline)) void for_row(Acc* row, int64_t strip, int64_t keys, const Body& body) {
  for (int64_t from = 0; from < keys; from += kBlock, row += strip) {
    const int64_t to = least(keys - from, kBlock);
    for (int64_t j = 0; j < to; j += kLanes<Acc>) body(from + j, row + j);
  }
}

template <class T>
void softmax(const Heads<AttentionForward<T, T>>& heads, const Head& head, const ForwardMemory<T>& m, int64_t query,
             int64_t rows, int64_t keys, const Dropout& dropout, Compute<T>* over_sum) {
  using Tile = typename TileFor<T>::type;
  using Acc = Compute<T>;
  using V = Vec<Acc>;
  constexpr int L = kLanes<Acc>;
  constexpr int64_t kStrip = rows_of_strip(kQueries) * kStride;
  const auto& p = heads.p;
  const V scale = broadcast(Acc(p.scale)), low = lowest_exp(V{}), one = broadcast(Acc(1));
  const bool by_row = heads.by_row();
  Factors<Acc> drawn(m.factors, dropout, p.Sk, keys);
  for (int64_t first = 0; first < rows; first += L) {
    const int live = int(least(rows - first, L));
    V tops[L], sums[L];
    for (int r = live; r < L; ++r) tops[r] = sums[r] = V{};
    for (int r = 0; r < live; ++r) {
      if (by_row) heads.fill_bias(m.bias, head, query + first + r, 0, keys);
      V top = broadcast(Acc(-__builtin_inf()));
      for_row(m.s + (first + r) * kStride, kStrip, keys, [&](int64_t key, Acc* s) {
        const V x = load(s) * scale + load(m.bias + key);
        store(s, x);
        top = larger(x, top);
      });
      tops[r] = top;
    }
    V max = fold_rows<Acc>(tops, [](V a, V b) { return larger(a, b); });
    max = max == broadcast(Acc(-__builtin_inf())) ? V{} : max;  // fully masked: each x - max is still -infinity
    alignas(kVectorBytes) Acc max_of[L];
    store(max_of, max);
    for (int r = 0; r < live; ++r) {
      const Acc* const factors = drawn.of_row(head.row + query + first + r, keys);
      const V top = broadcast(max_of[r]);
      V sum = {};
      for_row(m.s + (first + r) * kStride, kStrip, keys, [&](int64_t key, Acc* s) {
        V e = exp_or_0<kRough<T>>(load(s) - top, one, low);
        sum += e;
        e *= load(factors + key);
        if constexpr (Tile::kPair == 1) {
          store(s, e);
        } else {
          const int64_t unit = key / 2;
          store(reinterpret_cast<bf16*>(m.p + unit / kBlock * kStrip + (first + r) * kStride + unit % kBlock), e);
        }
      });
      sums[r] = sum;
    }
    const V sum = fold_rows<Acc>(sums, [](V a, V b) { return a + b; });
    store(over_sum + first, sum == 0 ? V{} : 1 / sum);
    if (p.stats) {
      Acc* const stats = p.stats + head.row + query + first;
      store(stats, sum == sum ? max : sum, live);  // NaN where the backward is to give NaN
      store(stats + p.rows, (sum > 0) & (sum == sum) ? 1 / sum : one, live);
    }
  }
}

template <class T, class Claim>
void forward(const Heads<AttentionForward<T, T>>& heads, const Head& head, const ForwardMemory<T>& m,
             const Claim& claim) {
  using Tile = typename TileFor<T>::type;
  using Acc = Compute<T>;
  constexpr int64_t kStrip = rows_of_strip(kQueries) * kStride;
  const auto& p = heads.p;
  Ahead ahead{{}, p.D * int64_t(sizeof(T))};
  const Dropout dropout(p.seed, p.threshold, p.use);
  const T* const q = heads.rows_of(head, p.q, true, p.q_batch, p.q_head, p.q_token);
  T* const o = heads.rows_of(head, p.o, true, p.o_batch, p.o_head, p.o_token);
  pack_col_major<Tile>(m.k, m.k_panel, heads.rows_of(head, p.k, false, p.k_batch, p.k_head, p.k_token), p.k_token, p.D,
                       head.keys);
  pack_depth_major<Tile>(m.v, m.v_panel, heads.rows_of(head, p.v, false, p.v_batch, p.v_head, p.v_token), p.v_token,
                         head.keys, p.D);
  if (!heads.by_row()) heads.fill_bias(m.bias, head, 0, 0, head.keys);
  Acc over_sum[round_up(kQueries, kLanes<Acc>)];
  for (int64_t query = 0; query < head.queries; query += kQueries) {
    const int64_t rows = least(head.queries - query, kQueries);
    const int64_t keys = p.causal ? least(head.keys, query + rows) : head.keys;
    if (query + rows == head.queries)
      if (const int64_t task = claim(); task < heads.count()) {
        const Head next = heads.head(task);  // which reads the last of these first
        heads.ask(ahead, next, p.v, false, p.v_batch, p.v_head, p.v_token);
        heads.ask(ahead, next, p.q, true, p.q_batch, p.q_head, p.q_token);
        heads.ask(ahead, next, p.k, false, p.k_batch, p.k_head, p.k_token);
      }
    copy_rows<Tile>(m.q, kStrip, q + query * p.q_token, p.q_token, rows, p.D);
    multiply<Tile, false>(m.s, kStrip, m.q, kStrip, m.k, m.k_panel, rows, keys, ceil_div(p.D, Tile::kPair), false,
                          ahead);
    softmax(heads, head, m, query, rows, keys, dropout, over_sum);
    multiply<Tile, false>(m.o, kStrip, m.p, kStrip, m.v, m.v_panel, rows, p.D, ceil_div(keys, Tile::kPair), false,
                          ahead);
    store_rows(o + query * p.o_token, p.o_token, m.o, kStrip, rows, p.D, heads.large(),
               [&](int64_t i) { return over_sum[i]; });
  }
}

// ---- backward

template <class T>
struct BackwardMemory {
  using Tile = typename TileFor<T>::type;
  using Unit = typename Tile::Unit;
  using Acc = typename Tile::Acc;
  static constexpr int kPair = Tile::kPair;
  static constexpr int64_t kStrip = rows_of_strip(kGradQueries) * kStride;  // of numbers whose rows are queries
  static constexpr int64_t kPairStrip = rows_of_strip(kGradQueries / kPair) * kStride;  // or pairs of them
  int64_t rows;                                                                         // queries of a block
  int64_t d_panel, k_panel, q_panel;       // units of a panel whose depth is D, the keys, a block of queries
  Unit *kt, *vt, *k, *q, *dy;              // panels of k^T, v^T, k, q, dy
  Unit *q_rows, *dy_rows, *pt, *dst, *ds;  // strips of q, dy, (f p)^T, ds^T, ds
  Acc *s, *dp, *dq, *dk, *dv, *bias, *factors;

  BackwardMemory(Arena& arena, int64_t Sk, int64_t D) {
    constexpr int kCols = kTileCols<Tile>;
    const int64_t units = ceil_div(D, kPair), key_panels = ceil_div(Sk, kCols), d_panels = ceil_div(D, kCols);
    const int64_t key_strips = ceil_div(Sk, kBlock);
    d_panel = units * kCols, k_panel = ceil_div(Sk, kPair) * kCols, q_panel = kGradQueries / kPair * kCols;
    kt = arena.take<Unit>(key_panels * d_panel);
    vt = arena.take<Unit>(key_panels * d_panel);
    k = arena.take<Unit>(d_panels * k_panel);
    q = arena.take<Unit>(d_panels * q_panel);
    dy = arena.take<Unit>(d_panels * q_panel);
    q_rows = arena.take<Unit>(strips(kGradQueries, units));
    dy_rows = arena.take<Unit>(strips(kGradQueries, units));
    s = arena.take<Acc>(kStrip * key_strips);
    dp = arena.take<Acc>(kStrip * key_strips);
    // Of single units, a matrix and its transpose are one, read along its rows or its columns, and lie where scores were.
    pt = kPair == 1 ? reinterpret_cast<Unit*>(s) : arena.take<Unit>(kPairStrip * key_strips);
    dst = kPair == 1 ? reinterpret_cast<Unit*>(dp) : arena.take<Unit>(kPairStrip * key_strips);
    ds = kPair == 1 ? dst : arena.take<Unit>(strips(kGradQueries, ceil_div(Sk, kPair)));
    dq = arena.take<Acc>(strips(kGradQueries, D));
    dk = arena.take<Acc>(strips(Sk, D));
    dv = arena.take<Acc>(strips(Sk, D));
    bias = arena.take<Acc>(round_up(Sk, kBlock));
    factors = arena.take<Acc>(round_up(Sk, kBlock));
  }
};

// Scores and dy v^T of a block become (f p)^T, ds^T and ds.
template <class T>
void grad_scores(const Heads<AttentionBackward<T, T>>& heads, const Head& head, const BackwardMemory<T>& m,
                 int64_t query, int64_t rows, int64_t keys, const Dropout& dropout) {
  using Memory = BackwardMemory<T>;
  using Acc = Compute<T>;
  using V = Vec<Acc>;
  constexpr int L = kLanes<Acc>, P = Memory::kPair;
  const auto& p = heads.p;
  const V scale = broadcast(Acc(p.scale)), kept_scale = broadcast(Acc(dropout_scale(dropout.threshold)));
  const bool by_row = heads.by_row();
  Factors<Acc> drawn(m.factors, dropout, p.Sk, keys);
  for (int64_t first = 0; first < rows; first += L) {
    const int live = int(least(rows - first, L));
    V sums[L];
    for (int r = live; r < L; ++r) sums[r] = V{};
    // p in place of the score, negative where it is dropped, and f dp in place of dp.
    for (int r = 0; r < live; ++r) {
      const int64_t row = head.row + query + first + r;
      if (by_row) heads.fill_bias(m.bias, head, query + first + r, 0, keys);
      const Acc* const factors = drawn.of_row(row, keys);
      const V max = broadcast(p.stats[row]), over_sum = broadcast(p.stats[p.rows + row]);
      const V low = lowest_exp(exponent_of(over_sum));
      V sum = {};
      const int64_t dp_at = m.dp - m.s;
      for_row(m.s + (first + r) * kStride, Memory::kStrip, keys, [&](int64_t key, Acc* s) {
        const V x = load(s) * scale + load(m.bias + key);  // as in the forward, where a mask may swallow the score
        const V e = exp_or_0<kRough<T>>(x - max, over_sum, low);
        V dp = load(s + dp_at);
        const V factor = load(factors + key);
        dp *= factor;
        store(s + dp_at, dp);
        store(s, factor == 0 ? -e : e);
        sum += e * dp;
      });
      sums[r] = sum;
    }
    alignas(kVectorBytes) Acc delta_of[L];
    store(delta_of, fold_rows<Acc>(sums, [](V a, V b) { return a + b; }));
    for (int r = 0; r < live; r += P) {
      for (int64_t from = 0; from < keys; from += kBlock) {
        const int64_t at = from / kBlock * Memory::kStrip + (first + r) * kStride;
        for (int64_t j = 0; j < least(keys - from, kBlock); j += L) {
          V kept[P], ds[P];
#pragma GCC unroll 2
          for (int i = 0; i < P; ++i) {
            const V signed_p = load(m.s + at + i * kStride + j);
            kept[i] = signed_p < 0 ? V{} : signed_p * kept_scale;
            ds[i] = abs(signed_p) * (load(m.dp + at + i * kStride + j) - broadcast(delta_of[r + i]));
            if (P == 2 && r + i >= live) kept[i] = ds[i] = V{};  // the last row of an odd number
          }
          if constexpr (P == 1) {
            store(m.s + at + j, kept[0]);
            store(m.dp + at + j, ds[0]);
          } else {
            const int64_t pair = from / kBlock * Memory::kPairStrip + (first + r) / 2 * kStride + j;
            store_words(reinterpret_cast<bf16*>(m.pt + pair), join<bf16>(kept));
            store_words(reinterpret_cast<bf16*>(m.dst + pair), join<bf16>(ds));
            const int64_t unit = (from + j) / 2;
            auto* const to = m.ds + unit / kBlock * Memory::kStrip + (first + r) * kStride + unit % kBlock;
            for (int i = 0; i < P; ++i) store(reinterpret_cast<bf16*>(to + i * kStride), ds[i]);
          }
        }
      }
    }
  }
}

template <class T, class Claim>
void backward(const Heads<AttentionBackward<T, T>>& heads, const Head& head, const BackwardMemory<T>& m,
              const Claim& claim) {
  using Memory = BackwardMemory<T>;
  using Tile = typename Memory::Tile;
  using Acc = Compute<T>;
  constexpr int P = Memory::kPair;
  constexpr int64_t kStrip = Memory::kStrip;
  const auto& p = heads.p;
  Ahead ahead{{}, p.D * int64_t(sizeof(T))};
  const Dropout dropout(p.seed, p.threshold, p.use);
  const T* const q = heads.rows_of(head, p.q, true, p.q_batch, p.q_head, p.q_token);
  const T* const dy = heads.rows_of(head, p.dy, true, p.dy_batch, p.dy_head, p.dy_token);
  const T* const k = heads.rows_of(head, p.k, false, p.k_batch, p.k_head, p.k_token);
  const T* const v = heads.rows_of(head, p.v, false, p.v_batch, p.v_head, p.v_token);
  const int64_t units = ceil_div(p.D, P), k_strip = rows_of_strip(head.keys) * kStride;
  pack_col_major<Tile>(m.kt, m.d_panel, k, p.k_token, p.D, head.keys);
  pack_col_major<Tile>(m.vt, m.d_panel, v, p.v_token, p.D, head.keys);
  if (p.dq) pack_depth_major<Tile>(m.k, m.k_panel, k, p.k_token, head.keys, p.D);
  if (!heads.by_row()) heads.fill_bias(m.bias, head, 0, 0, head.keys);
  // Of blocks of keys that no query sees, or no query at all, sums are added to.
  const bool zeros = p.causal || head.queries == 0;
  if (zeros && p.dk) std::memset(m.dk, 0, size_t(k_strip * ceil_div(p.D, kBlock)) * sizeof(Acc));
  if (zeros && p.dv) std::memset(m.dv, 0, size_t(k_strip * ceil_div(p.D, kBlock)) * sizeof(Acc));
  const int64_t most = head.keys * kGradQueries > kGradScores ? kGradScores / head.keys / 2 * 2 : kGradQueries;
  const int64_t block = most > kLeastGradQueries ? most : kLeastGradQueries;
  for (int64_t query = 0; query < head.queries; query += block) {
    const int64_t rows = least(head.queries - query, block);
    // Whole blocks of keys: the last tile of fewer would write to rows of dk and dv that are not the end.
    const int64_t keys = p.causal ? least(head.keys, round_up(query + rows, kBlock)) : head.keys;
    const T *const q_block = q + query * p.q_token, *const dy_block = dy + query * p.dy_token;
    if (query + rows == head.queries)
      if (const int64_t task = claim(); task < heads.count()) {
        const Head next = heads.head(task);  // which reads the last of these first
        heads.ask(ahead, next, p.dy, true, p.dy_batch, p.dy_head, p.dy_token);
        heads.ask(ahead, next, p.q, true, p.q_batch, p.q_head, p.q_token);
        heads.ask(ahead, next, p.v, false, p.v_batch, p.v_head, p.v_token);
        heads.ask(ahead, next, p.k, false, p.k_batch, p.k_head, p.k_token);
      }
    copy_rows<Tile>(m.q_rows, kStrip, q_block, p.q_token, rows, p.D);
    copy_rows<Tile>(m.dy_rows, kStrip, dy_block, p.dy_token, rows, p.D);
    if (p.dk) pack_depth_major<Tile>(m.q, m.q_panel, q_block, p.q_token, rows, p.D);
    if (p.dv) pack_depth_major<Tile>(m.dy, m.q_panel, dy_block, p.dy_token, rows, p.D);
    multiply<Tile, false>(m.s, kStrip, m.q_rows, kStrip, m.kt, m.d_panel, rows, keys, units, false, ahead);
    multiply<Tile, false>(m.dp, kStrip, m.dy_rows, kStrip, m.vt, m.d_panel, rows, keys, units, false, ahead);
    grad_scores(heads, head, m, query, rows, keys, dropout);
    for (int64_t key = 0; key < keys; key += kBlock) {
      const int64_t of_block = least(keys - key, kBlock), at = key / kBlock * Memory::kPairStrip;
      const bool add = zeros || query > 0;
      if (p.dv)
        multiply<Tile, true>(m.dv + key * kStride, k_strip, m.pt + at, 0, m.dy, m.q_panel, of_block, p.D,
                             ceil_div(rows, P), add, ahead);
      if (p.dk)
        multiply<Tile, true>(m.dk + key * kStride, k_strip, m.dst + at, 0, m.q, m.q_panel, of_block, p.D,
                             ceil_div(rows, P), add, ahead);
    }
    if (!p.dq) continue;
    multiply<Tile, false>(m.dq, kStrip, m.ds, kStrip, m.k, m.k_panel, rows, p.D, ceil_div(keys, P), false, ahead);
    store_rows(heads.rows_of(head, p.dq, true, p.dq_batch, p.dq_head, p.dq_token) + query * p.dq_token, p.dq_token,
               m.dq, kStrip, rows, p.D, heads.large(), [&](int64_t) { return Acc(p.scale); });
  }
  if (p.dk)
    store_rows(heads.rows_of(head, p.dk, false, p.dk_batch, p.dk_head, p.dk_token), p.dk_token, m.dk, k_strip,
               head.keys, p.D, heads.large(), [&](int64_t) { return Acc(p.scale); });
  if (p.dv)
    store_rows(heads.rows_of(head, p.dv, false, p.dv_batch, p.dv_head, p.dv_token), p.dv_token, m.dv, k_strip,
               head.keys, p.D, heads.large(), [](int64_t) { return Acc(1); });
}

// Each worker's memory, and body(heads, head, memory, claim) for each head. claim() gives the task that this worker does
// next; called late, in the last block of queries, so that no worker claims what another one could begin sooner.
template <class Memory, class Args, class Body>
void for_heads(const Args& p, const float* float_bias, const Host& host, const Body& body) {
  const Heads<Args> heads(p, float_bias, host);
  Arena sizes{nullptr};
  Memory(sizes, p.Sk, p.D);
  char* const all = scratch<char>(host, sizes.bytes * host.threads);
  int64_t claimed = 0;
  parallel_for(host, least(host.threads, heads.count()), [&](int64_t worker, int) {
    Arena arena{all + sizes.bytes * worker};
    const Memory memory(arena, p.Sk, p.D);
    const auto claim = [&] { return __atomic_fetch_add(&claimed, 1, __ATOMIC_RELAXED); };
    for (int64_t task = claim(); task < heads.count();) {
      int64_t next = -1;
      body(heads, heads.head(task), memory, [&] { return next = claim(); });
      task = next < 0 ? claim() : next;  // without queries it was not called
    }
    streamed();
  });
}

// An additive mask of float beside bf16 is a pointer of its own: as a type it would be a quarter of this file's code.
template <class T>
const float* float_bias_of(const T*) {
  return nullptr;
}
inline const float* float_bias_of(const float* bias) { return bias; }

template <class T>
void forward_heads(const AttentionForward<T, T>& p, const float* float_bias, const Host& host) {
  for_heads<ForwardMemory<T>>(
      p, float_bias, host,
      [](const auto& heads, const Head& head, const auto& m, const auto& claim) { forward(heads, head, m, claim); });
}
template <class T>
void backward_heads(const AttentionBackward<T, T>& p, const float* float_bias, const Host& host) {
  for_heads<BackwardMemory<T>>(
      p, float_bias, host,
      [](const auto& heads, const Head& head, const auto& m, const auto& claim) { backward(heads, head, m, claim); });
}

}  // namespace

template <class T, class W>
void attention_forward(const AttentionForward<T, W>& p, const Host& host) {
  forward_heads(bit_cast<AttentionForward<T, T>>(p), float_bias_of(p.bias), host);
}

template <class T, class W>
void attention_backward(const AttentionBackward<T, W>& p, const Host& host) {
  backward_heads(bit_cast<AttentionBackward<T, T>>(p), float_bias_of(p.bias), host);
}

FASTFT_INSTANTIATE(attention_forward, AttentionForward)
FASTFT_INSTANTIATE(attention_backward, AttentionBackward)

}  // namespace FASTFT_NAMESPACE
