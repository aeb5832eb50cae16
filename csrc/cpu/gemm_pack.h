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

// One unit of depth for `outer` neighbours, from depth-major data: row p, or rows 2p and 2p + 1 interleaved. kWhole: `outer` is a whole number of
// registers; otherwise the last register is padded with zeros, and stored whole.
template <class Tile, bool kWhole, class T>
inline void interleave_units(typename Tile::Unit* out, const T* in, int64_t stride, bool has_next, int outer) {
  using Acc = typename Tile::Acc;
  constexpr int L = kLanes<Acc>;
  const auto units = [&](int j, auto... n) {
    if constexpr (Tile::kPair == 1) {
      (void)stride, (void)has_next;
      store(reinterpret_cast<Acc*>(out) + j, load(in + j, n...));
    } else {
      Vec<uint32_t> pair = load_bits(in + j, n...);
      if (has_next) pair |= load_bits(in + stride + j, n...) << 16;
      std::memcpy(out + j, &pair, sizeof pair);
    }
  };
  int j = 0;
  for (; j + L <= outer; j += L) units(j);
  if constexpr (!kWhole)
    if (j < outer) units(j, outer - j);
}

// ---- packing of B: units [from, to) of depth

// Depth-major: a few panels at a time, so that rows are read in long runs.
template <class Tile, class T>
void pack_panels(typename Tile::Unit* out, int64_t panel_size, Operand<T> b, int64_t K, int64_t col, int64_t cols,
                 int64_t from, int64_t to) {
  constexpr int N = kTileCols<Tile>, P = Tile::kPair, L = kLanes<typename Tile::Acc>;
  for (int64_t p = from; p < to; ++p) {
    const T* row = b.data + p * P * b.stride + col;
    const bool has_next = P * p + 1 < K;
    typename Tile::Unit* o = out + p * N;
    int64_t j = 0;
    for (; j + N <= cols; j += N, o += panel_size) interleave_units<Tile, true>(o, row + j, b.stride, has_next, N);
    if (j < cols) {
      interleave_units<Tile, false>(o, row + j, b.stride, has_next, int(cols - j));
      for (int64_t k = ceil_div(cols - j, L) * L; k < N; ++k) o[k] = 0;
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

// out[p * kTileCols + j] = rows(j)[p] of L x L units.
template <class Tile, class Rows>
inline void transpose_square(typename Tile::Unit* out, const Rows& rows) {
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
  for (int i = 0; i < L; ++i) std::memcpy(out + i * kTileCols<Tile>, &row[i], sizeof row[i]);
}

// Depth is contiguous: transposed, L columns by L units of depth at a time, through registers.
template <class Tile, class T>
void pack_transposed(typename Tile::Unit* out, Operand<T> b, int64_t K, int64_t col, int cols, int64_t from,
                     int64_t to) {
  using Unit = typename Tile::Unit;
  constexpr int N = kTileCols<Tile>, P = Tile::kPair, L = kLanes<Unit>;
  for (int j0 = 0; j0 < N; j0 += L) {
    const int live = cols - j0 < 0 ? 0 : cols - j0 < L ? cols - j0 : L;
    const T* const in = b.data + (col + j0) * b.stride;
    for (int64_t p = from; p < to; p += L) {
      const int64_t units = to - p < L ? to - p : L;
      const int64_t left = K - p * P, elements = left < units * P ? left : units * P;
      Unit* const o = out + p * N + j0;
      if (live == L && elements == L * P) {
        transpose_square<Tile>(o, [&](int j) { return load_units<Tile>(in + j * b.stride + p * P); });
        continue;
      }
      Unit square[L * L] = {};
      for (int j = 0; j < live; ++j) copy_units<Tile>(square + j * L, in + j * b.stride + p * P, elements);
      if (units == L)
        transpose_square<Tile>(o, [&](int j) {
          Vec<Unit> row;
          std::memcpy(&row, square + j * L, sizeof row);
          return row;
        });
      else
        for (int64_t q = 0; q < units; ++q)
          for (int j = 0; j < L; ++j) o[q * N + j] = square[j * L + q];
    }
  }
}

}  // namespace FASTFT_NAMESPACE
