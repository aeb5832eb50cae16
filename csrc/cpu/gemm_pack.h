// Packing of a product's right side B into panels [kTileCols columns][depth] of the register tiles' units.
#pragma once
#include "gemm_tiles.h"

namespace FASTFT_NAMESPACE {

// A matrix operand as it lies in memory. The rows of A and the columns of B are its "outer" dimension, K is its depth.
template <class T>
struct Operand {
  const T* data;
  int64_t stride;    // elements between neighbours in the dimension that is not contiguous
  bool depth_major;  // false: depth is contiguous (x, and w in the forward); true: the outer dimension is
};

// Whether of a tile's rows so many bytes apart more than 7 lines share one of L1's sets of 8 (4096 bytes to a way): 4096 /
// aliasing rows differ in their sets.
constexpr bool rows_share_sets(int64_t bytes) {
  const int64_t aliasing = bytes & -bytes;
  return aliasing * kTileRows > 7 * 4096;
}

// The tile that multiplies activations of dtype T (with parameters of either dtype, which are converted when packed).
template <class T>
struct TileFor {
  using type = TileF32;
};
template <>
struct TileFor<double> {
  using type = TileF64;
};
#if defined(FASTFT_ISA_AVX512_BF16)
template <>
struct TileFor<bf16> {
  using type = TileBf16Dot;
};
#endif

// ---- conversion of stored elements to units

// Units along contiguous elements: unit i is element i, or elements 2i and 2i + 1.
template <class Tile, class T>
inline void copy_units(typename Tile::Unit* out, const T* in, int64_t elements) {
  if constexpr (Tile::kPair == 1) {
    for_lanes<typename Tile::Acc>(elements, [&](int64_t j, auto load, auto store) { store(out + j, load(in + j)); });
  } else if constexpr (sizeof(T) == 2) {
    std::memcpy(out, in, size_t(elements) * 2);
    if (elements & 1) reinterpret_cast<bf16*>(out)[elements] = bf16{0};
  } else {
    bf16* out16 = reinterpret_cast<bf16*>(out);
    for_lanes<float>(elements, [&](int64_t j, auto load, auto store) { store(out16 + j, load(in + j)); });
    if (elements & 1) out16[elements] = bf16{0};
  }
}

// A register of them.
template <class Tile, class T>
inline Vec<typename Tile::Unit> load_units(const T* in) {
  if constexpr (Tile::kPair == 1) {
    return load(in);
  } else {
    Vec<typename Tile::Unit> units;
    if constexpr (sizeof(T) == 2)
      std::memcpy(&units, in, sizeof units);
    else
      copy_units<Tile>(reinterpret_cast<typename Tile::Unit*>(&units), in, 2 * kLanes<typename Tile::Unit>);
    return units;
  }
}

// ---- packing into panels [depth][kStride], `panel_size` units apart: units [from, to) of depth. What other cores read is written past the caches (the
// caller ends with streamed()): fetching first what is overwritten takes twice the time, and taking it from another core's cache longer than from memory.

// One unit of depth for a register of neighbours, or for the first n, from depth-major data: row p, or rows 2p and 2p + 1 interleaved.
template <class Tile, class T, class... Some>
inline Vec<typename Tile::Unit> interleave_units(const T* in, int64_t stride, bool has_next, Some... n) {
  if constexpr (Tile::kPair == 1) {
    (void)stride, (void)has_next;
    return load(in, n...);
  } else {
    Vec<uint32_t> pair = load_bits(in, n...);
    if (has_next) pair |= load_bits(in + stride, n...) << 16;
    return pair;
  }
}

// Steps of depth that one panel gets at a time. The next ones are asked for: AVX2's weight gradients gain 0.5 to 2 %; AVX-512 packs little, and gains nothing.
constexpr int kRunDepth = 8;

// Depth-major: panels [first, last) of kWidth of the `outer` columns each, so many that rows are read in long runs. Columns past the last are zeros;
// between kWidth and kStride is anything.
template <class Tile, int kWidth, int kStride, class T>
void pack_panels(typename Tile::Unit* out, int64_t panel_size, Operand<T> b, int64_t K, int64_t outer, int64_t first,
                 int64_t last, int64_t from, int64_t to, bool past_caches) {
  constexpr int P = Tile::kPair, L = kLanes<typename Tile::Acc>;
  for (int64_t begin = from; begin < to; begin += kRunDepth) {
    const int64_t end = begin + kRunDepth < to ? begin + kRunDepth : to;
    for (int64_t panel = first; panel < last; ++panel)
#pragma GCC unroll 4
      for (int j = 0; j < kStride; j += L) {
        const int64_t col = panel * kWidth + j, left = outer - col;
        const auto steps = [&](auto past_caches, const auto& units) {
          typename Tile::Unit* o = out + panel * panel_size + begin * kStride + j;
          const T* in = b.data + begin * P * b.stride + col;
          for (int64_t p = begin; p < end; ++p, o += kStride, in += P * b.stride) {
            if (kSmallTiles && past_caches) __builtin_prefetch(in + kRunDepth * P * b.stride);
            put_register(o, units(in, P * p + 1 < K), past_caches);
          }
        };
        const auto whole = [&](const T* in, bool) { return interleave_units<Tile>(in, b.stride, true); };
        if (left >= L && P * end <= K)
          past_caches ? steps(std::true_type{}, whole) : steps(std::false_type{}, whole);
        else
          steps(past_caches, [&](const T* in, bool has_next) {
            return left >= L  ? interleave_units<Tile>(in, b.stride, has_next)
                   : left > 0 ? interleave_units<Tile>(in, b.stride, has_next, int(left))
                              : Vec<typename Tile::Unit>{};
          });
      }
  }
}

// L x L units: log2(L) rounds of perfect shuffles between the halves of a list of registers.
template <int L, class V>
struct Interleave;
template <class V>
struct Interleave<2, V> {
  static V low(V a, V b) { return __builtin_shufflevector(a, b, 0, 2); }
  static V high(V a, V b) { return __builtin_shufflevector(a, b, 1, 3); }
};
template <class V>
struct Interleave<4, V> {
  static V low(V a, V b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
  static V high(V a, V b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
};
template <class V>
struct Interleave<8, V> {
  static V low(V a, V b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
  static V high(V a, V b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
};
template <class V>
struct Interleave<16, V> {
  static V low(V a, V b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  }
  static V high(V a, V b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
};

// put(p, register) gets rows(j)[p] in lane j, of L x L units.
template <class Tile, class Rows, class Put>
inline void transpose_square(const Rows& rows, const Put& put) {
  using Unit = typename Tile::Unit;
  constexpr int L = kLanes<Unit>;
  Vec<Unit> row[L], next[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) row[i] = rows(i);
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = Interleave<L, Vec<Unit>>::low(row[i], row[i + L / 2]);
      next[2 * i + 1] = Interleave<L, Vec<Unit>>::high(row[i], row[i + L / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) row[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) put(i, row[i]);
}

// Depth is contiguous: transposed, L columns by L units of depth at a time, through registers.
template <class Tile, class T>
void pack_transposed(typename Tile::Unit* out, Operand<T> b, int64_t K, int64_t col, int cols, int64_t from, int64_t to,
                     bool past_caches) {
  using Unit = typename Tile::Unit;
  constexpr int N = kTileCols<Tile>, P = Tile::kPair, L = kLanes<Unit>;
  constexpr int kLine = N * int(sizeof(Unit)) < 64 ? N : 64 / int(sizeof(Unit));  // of units: written at a time
  const auto square = [&](int64_t p, int j0) {
    const int64_t units = to - p < L ? to - p : L;
    const int64_t left = K - p * P, elements = left < units * P ? left : units * P;
    const int live = cols - j0 < 0 ? 0 : cols - j0 < L ? cols - j0 : L;
    const T* const in = b.data + (col + j0) * b.stride + p * P;
    Unit* const o = out + p * N + j0;
    const auto put = [&](int q, Vec<Unit> row) { put_register(o + q * N, row, past_caches); };
    if (live == L && elements == L * P)
      return transpose_square<Tile>([&](int j) { return load_units<Tile>(in + j * b.stride); }, put);
    Unit padded[L * L] = {};
    for (int j = 0; j < live; ++j) copy_units<Tile>(padded + j * L, in + j * b.stride, elements);
    transpose_square<Tile>(
        [&](int j) {
          Vec<Unit> row;
          std::memcpy(&row, padded + j * L, sizeof row);
          return row;
        },
        [&](int q, Vec<Unit> row) {
          if (q < units) put(q, row);
        });
  };
  for (int line = 0; line < N; line += kLine)
    for (int64_t p = from; p < to; p += L)
      for (int j0 = line; j0 < line + kLine; j0 += L) square(p, j0);
}

}  // namespace FASTFT_NAMESPACE
