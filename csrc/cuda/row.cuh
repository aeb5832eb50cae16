// What kernels whose warps take a row each have in common: the columns of a lane, dropout of them, a row that is looked at
// more than once, its moments, sums over rows.
#pragma once
#include <mma_sm80.cuh>  // dynamic_shared, pack
#include <type_traits>
#include <utility>

#include "device.cuh"
#include "philox.h"

namespace fastft::cuda {

constexpr int kRowsPerBlock = 4;  // warps, each of which takes a row
constexpr int kThreadsOfRows = kWarp * kRowsPerBlock;
template <class F, int n>
constexpr int kRowBlocks = sizeof(F) == 8 ? 1
                           : n == 1       ? 4
                                          : 6;  // of an SM, at least; fp64 is for gradcheck

// ---- what rows are stored as is told at run time: as types of the kernels it would make five of each, whose loops wait
// for memory. F is what they compute in, float or double; the latter is stored as itself.

enum Type : int { kFloat, kBf16, kF16 };
template <class F>
struct Any;  // in place of what F is made of; it has no size

struct Types {
  Type t, w;  // of activations and of parameters
};
template <class T>
constexpr Type kType = std::is_same_v<T, bf16>  ? kBf16
                       : std::is_same_v<T, f16> ? kF16
                                                : kFloat;
template <template <class, class> class Args, class T, class W>
Types types_of(const Args<T, W>&) {
  return {kType<T>, kType<W>};
}
template <template <class, class> class Args, class T, class W>
Args<Any<Compute<W>>, Any<Compute<W>>> erased(const Args<T, W>& p) {
  return bit_cast<Args<Any<Compute<W>>, Any<Compute<W>>>>(p);
}

// Elements side by side; A is Any<F> or constant.
template <class A>
struct Row;
template <class F>
struct Row<Any<F>> {
  Any<F>* data;  // null: there are none
  Type type;

  __device__ unsigned char* at(int64_t j) const {
    return reinterpret_cast<unsigned char*>(data) + j * (sizeof(F) == 8 ? 8 : type == kFloat ? 4 : 2);
  }
  __device__ Row from(int64_t j) const { return {data ? reinterpret_cast<Any<F>*>(at(j)) : nullptr, type}; }
};
template <class F>
struct Row<const Any<F>> : Row<Any<F>> {
  __device__ Row(const Any<F>* data, Type type) : Row<Any<F>>{const_cast<Any<F>*>(data), type} {}
  __device__ Row from(int64_t j) const { return {Row<Any<F>>::from(j).data, this->type}; }
};

template <class A>
__device__ Row<A> row_of(A* matrix, Type type, int64_t row, int64_t H) {
  return Row<A>{matrix, type}.from(row * H);
}
// Of F itself.
template <class F>
__device__ Row<Any<F>> row_of(F* data) {
  return {reinterpret_cast<Any<F>*>(data), kFloat};
}

// n neighbours from column j on, at a multiple of what they take.
template <class T, int n, class F>
__device__ void read_as(F (&values)[n], const void* from) {
  const Vector<T, n> x = *static_cast<const Vector<T, n>*>(from);
#pragma unroll
  for (int i = 0; i < n; ++i) values[i] = F(to_float(x.v[i]));
}
template <int n, class F>
__device__ void read(F (&values)[n], const Row<Any<F>>& from, int64_t j) {
  if (sizeof(F) == 8 || from.type == kFloat)
    read_as<F>(values, from.at(j));
  else if (from.type == kBf16)
    read_as<bf16>(values, from.at(j));
  else
    read_as<f16>(values, from.at(j));
}
template <class T, int n, class F>
__device__ void write_as(void* to, const F (&values)[n]) {
  Vector<T, n> x;
#pragma unroll
  for (int i = 0; i < n; ++i) x.v[i] = from_float<T>(Compute<T>(values[i]));
  *static_cast<Vector<T, n>*>(to) = x;
}
template <int n, class F>
__device__ void write(const Row<Any<F>>& to, int64_t j, const F (&values)[n]) {
  if (sizeof(F) == 8 || to.type == kFloat)
    write_as<F>(to.at(j), values);
  else if (to.type == kBf16)
    write_as<bf16>(to.at(j), values);
  else
    write_as<f16>(to.at(j), values);
}

template <class F>
__device__ F get(const Row<Any<F>>& row, int64_t j) {
  F one[1];
  read(one, row, j);
  return one[0];
}
template <class F>
__device__ void put(const Row<Any<F>>& row, int64_t j, F value) {
  const F one[] = {value};
  write(row, j, one);
}

// ---- columns: of each 256, a span, a lane has eight. They are neighbours, n = 8, where rows begin at multiples of 16 bytes,
// else those 32 apart, n = 1: the next lane's lie beside them.

constexpr int kOfLane = 8, kSpan = kWarp * kOfLane;

template <int n>
__device__ int column_of_lane(int i) {
  return i / n * (n * kWarp) + int(threadIdx.x) * n + i % n;
}

template <class F>
struct OfLane {
  F v[kOfLane];
};

// As they lie in memory: with n = 8 two numbers of 16 bits in a word.
template <class F, int n>
struct Stored {
  Bits<F> words[kOfLane];
  Type type;

  __device__ OfLane<F> values() const {
    OfLane<F> x;
    if (sizeof(F) == 8 || type == kFloat) {
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) x.v[i] = bit_cast<F>(words[i]);
    } else if (type == kBf16) {
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) x.v[i] = to_float(bf16{half(i)});
    } else {
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) x.v[i] = to_float(f16{half(i)});
    }
    return x;
  }

 private:
  __device__ uint16_t half(int i) const { return uint16_t(n == 1 ? words[i] : words[i / 2] >> i % 2 * 16); }
};

// How many columns of a span from `first` on a row of H has.
__device__ inline int columns_left(int64_t first, int64_t H) { return H - first < kSpan ? int(H - first) : kSpan; }

using Words = Vector<uint32_t, 4>;

// Elements of a lane with n = 1. Their type is looked at once, or each had an address of its own in registers.
template <class E, class Word>
__device__ void read_each(Word (&words)[kOfLane], const unsigned char* from, int left) {
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int j = column_of_lane<1>(i);
    if (j < left) words[i] = reinterpret_cast<const E*>(from)[j];
  }
}
template <class E, class F>
__device__ void write_each(unsigned char* to, const F (&values)[kOfLane], int left) {
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int j = column_of_lane<1>(i);
    if (j < left) reinterpret_cast<E*>(to)[j] = from_float<E>(Compute<E>(values[i]));
  }
}

// Columns from `first` on of a row of H elements, a multiple of n; zeros behind its end, and without a row.
template <int n, class F>
__device__ Stored<F, n> load(const Row<const Any<F>>& row, int64_t first, int64_t H) {
  Stored<F, n> x = {};
  x.type = row.type;
  const int left = row.data ? columns_left(first, H) : 0;
  if constexpr (n == 1) {
    const unsigned char* const from = row.at(first);
    if (sizeof(F) == 8 || row.type == kFloat)
      read_each<Bits<F>>(x.words, from, left);
    else
      read_each<uint16_t>(x.words, from, left);
  } else if (column_of_lane<n>(0) < left) {
    const Words* const at = reinterpret_cast<const Words*>(row.at(first + column_of_lane<n>(0)));
    const Words low = at[0];
    Words high = {};
    if (row.type == kFloat) high = at[1];
#pragma unroll
    for (int i = 0; i < 4; ++i) x.words[i] = low.v[i], x.words[i + 4] = high.v[i];
  }
  return x;
}

template <int n, class F>
__device__ void store(const Row<Any<F>>& row, int64_t first, int64_t H, const OfLane<F>& values) {
  const int left = columns_left(first, H);
  if constexpr (n == 1) {
    unsigned char* const to = row.at(first);
    if (sizeof(F) == 8 || row.type == kFloat)
      write_each<F>(to, values.v, left);
    else if (row.type == kBf16)
      write_each<bf16>(to, values.v, left);
    else
      write_each<f16>(to, values.v, left);
  } else if (column_of_lane<n>(0) < left) {
    Words* const at = reinterpret_cast<Words*>(row.at(first + column_of_lane<n>(0)));
    const auto& v = values.v;
    if (row.type == kFloat) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        at[i] = {{bit_cast<uint32_t>(v[4 * i]), bit_cast<uint32_t>(v[4 * i + 1]), bit_cast<uint32_t>(v[4 * i + 2]),
                  bit_cast<uint32_t>(v[4 * i + 3])}};
    } else if (row.type == kBf16) {
      *at = {{pack<bf16>(v[0], v[1]), pack<bf16>(v[2], v[3]), pack<bf16>(v[4], v[5]), pack<bf16>(v[6], v[7])}};
    } else {
      *at = {{pack<f16>(v[0], v[1]), pack<f16>(v[2], v[3]), pack<f16>(v[4], v[5]), pack<f16>(v[6], v[7])}};
    }
  }
}

// body(n as a type) for rows of H elements; aligned: whether the first of all begin at multiples of 16 bytes.
template <class F, class Body>
void with_neighbours(int64_t H, bool aligned, const Body& body) {
  constexpr int n = sizeof(F) == 8 ? 1 : kOfLane;
  if (n > 1 && aligned && H % n == 0)
    body(std::integral_constant<int, n>());
  else
    body(std::integral_constant<int, 1>());
}

// ---- dropout (philox.h): each lane makes one of a span's calls, whose bits, of eight slots, wait in shared memory

constexpr int kCallsOfSpan = kSpan / kDropoutGroup * kDropoutLanes;
static_assert(kCallsOfSpan == kWarp, "a call for each lane");

// Drops elements of the span from column `first` on; `calls` (kCallsOfSpan) are the warp's.
template <int n, class F, class Args>
__device__ void drop(OfLane<F>& values, uint8_t* calls, const Args& p, int64_t row, int64_t first) {
  if (!p.seed) return;
  const int64_t number = row * dropout_pitch(p.H) + first;
  const DropoutCall numbers(*p.seed, p.use, dropout_call(number) + threadIdx.x);
  uint32_t kept = 0;
#pragma unroll
  for (int slot = 0; slot < kDropoutGroup / kDropoutLanes; ++slot)
    kept |= uint32_t(numbers.number(slot) >= uint32_t(p.threshold)) << slot;
  __syncwarp();  // the last span's have been read
  calls[threadIdx.x] = uint8_t(kept >> dropout_slot(number));
  __syncwarp();
  const F scale = F(dropout_scale(p.threshold));
#pragma unroll
  for (int i = 0; i < kOfLane; i += n) {
    const int j = column_of_lane<n>(i), slot = j % kDropoutGroup / kDropoutLanes;
    const auto bits =
        *reinterpret_cast<const Vector<uint8_t, n>*>(calls + j / kDropoutGroup * kDropoutLanes + j % kDropoutLanes);
#pragma unroll
    for (int e = 0; e < n; ++e) values.v[i + e] *= bits.v[e] >> slot & 1 ? scale : F(0);
  }
}

// ---- what a lane keeps in shared memory, in parts of 16 bytes: lanes' lie side by side

template <class Made>
constexpr int kParts = sizeof(Made) / sizeof(Words);
template <class Made>
struct Parts {
  Words of[kParts<Made>];
};
template <class Made>
__device__ void keep(Words* place, const Made& made) {
  const auto parts = bit_cast<Parts<Made>>(made);
#pragma unroll
  for (int i = 0; i < kParts<Made>; ++i) place[i * kWarp] = parts.of[i];
}
template <class Made>
__device__ Made recall(const Words* place) {
  Parts<Made> parts;
#pragma unroll
  for (int i = 0; i < kParts<Made>; ++i) parts.of[i] = place[i * kWarp];
  return bit_cast<Made>(parts);
}

// ---- a row: what make(first) gives for each span, kept in shared memory by the lane that made it, as far as kHeldBytes
// reach (2048 columns of fp32, 1024 where there are two of them), and made again of the others. Registers would hold a
// row only where all loops over it are unrolled: four times the code, and half the warps.

constexpr int64_t kHeldBytes = 8 << 10;

template <class Made>
__host__ __device__ int64_t spans_held(int64_t H) {
  constexpr int64_t most = kHeldBytes / int64_t(sizeof(Made) * kWarp);
  return ceil_div(H, kSpan) < most ? ceil_div(H, kSpan) : most;
}
template <class Made>
__host__ __device__ int64_t bytes_held(int64_t H) {
  return spans_held<Made>(H) * int64_t(sizeof(Made) * kWarp);
}

// The block's dynamic shared memory: the calls of dropout, and what is held of its rows.
constexpr int64_t kCallsOfBlock = kRowsPerBlock * kCallsOfSpan;
__device__ inline uint8_t* calls_of_warp() { return dynamic_shared() + threadIdx.y * kCallsOfSpan; }
template <class Made>
size_t shared_for(int64_t H) {
  return size_t(kCallsOfBlock + kRowsPerBlock * bytes_held<Made>(H));
}

template <class Make>
struct HeldRow {
  using Made = decltype(std::declval<Make>()(int64_t()));

  int64_t H, held;
  Make make;
  Words* memory;

  __device__ HeldRow(int64_t H, const Make& make)
      : H(H),
        held(spans_held<Made>(H) * kSpan),
        make(make),
        memory(reinterpret_cast<Words*>(dynamic_shared() + kCallsOfBlock + threadIdx.y * bytes_held<Made>(H)) +
               threadIdx.x) {}

  // Goes over the spans kPasses times: body(pass, made, first) for each, end(pass) behind the last. In one loop, so that
  // there is one copy of what makes a span.
  template <int kPasses, class Body, class End>
  __device__ void passes(const Body& body, const End& end) const {
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll 1
      for (int64_t first = 0; first < H; first += kSpan) {
        Words* const place = memory + first / kSpan * (kParts<Made> * kWarp);
        Made made;
        if (pass > 0 && first < held) {
          made = recall<Made>(place);
        } else {
          made = make(first);
          if (first < held) keep(place, made);
        }
        body(pass, made, first);
      }
      end(pass);
    }
  }
};

template <class F>
struct RowMoments {
  F about, shift, rstd;  // the mean is about + shift
};

// The moments of a row, and output((h - mean) rstd, h, first) for each span.
// `about` is off by its rounding; the mean of differences to it corrects both moments. Each span is summed by itself, since
// of a long row a lane would add thousands of numbers one by one.
template <int n, class F, class Row, class Output>
__device__ RowMoments<F> normalize(const Row& row, double eps, const Output& output) {
  F total = 0, squares = 0;  // the first pass' and the second's sums
  RowMoments<F> m = {};
  const F H = F(row.H);
  row.template passes<3>(
      [&](int pass, const OfLane<F>& h, int64_t first) {
        if (pass == 0) {
          F of_span = 0;
#pragma unroll
          for (int i = 0; i < kOfLane; ++i) of_span += h.v[i];  // zeros behind the end
          total += of_span;
        } else if (pass == 1) {
          const int left = columns_left(first, row.H);
          F of_span = 0, squares_of_span = 0;
#pragma unroll
          for (int i = 0; i < kOfLane; ++i) {
            const F d = column_of_lane<n>(i) < left ? h.v[i] - m.about : F(0);
            of_span += d;
            squares_of_span += d * d;
          }
          total += of_span;
          squares += squares_of_span;
        } else {
          OfLane<F> normal;
#pragma unroll
          for (int i = 0; i < kOfLane; ++i) normal.v[i] = (h.v[i] - m.about - m.shift) * m.rstd;
          output(normal, h, first);
        }
      },
      [&](int pass) {
        if (pass > 1) return;
        const F mean = warp_reduce(total, Sum()) / H;
        total = 0;
        if (pass == 0) {
          m.about = mean;
        } else {
          m.shift = mean;
          m.rstd = F(1) / sqrt(warp_reduce(squares, Sum()) / H - mean * mean + F(eps));
        }
      });
  return m;
}

// What the backward needs of a row: n = (h - mean) rstd, and the gradient of it, g.
template <class F>
struct NormalAndGradient {
  OfLane<F> n, g;
};

// Calls body(dh, first) for each span of dh = rstd (g - avg(g) - n avg(g n)).
template <class F, class Row, class Body>
__device__ void norm_backward(const Row& row, F rstd, const Body& body) {
  F g_mean = 0, gn_mean = 0;  // sums, until the first pass ends
  row.template passes<2>(
      [&](int pass, const NormalAndGradient<F>& x, int64_t first) {
        if (pass == 0) {
          F g_of_span = 0, gn_of_span = 0;
#pragma unroll
          for (int i = 0; i < kOfLane; ++i) {
            g_of_span += x.g.v[i];
            gn_of_span += x.g.v[i] * x.n.v[i];  // g is zero behind the end
          }
          g_mean += g_of_span;
          gn_mean += gn_of_span;
          return;
        }
        OfLane<F> dh;
#pragma unroll
        for (int i = 0; i < kOfLane; ++i) dh.v[i] = (x.g.v[i] - g_mean - x.n.v[i] * gn_mean) * rstd;
        body(dh, first);
      },
      [&](int pass) {
        if (pass > 0) return;
        g_mean = warp_reduce(g_mean, Sum()) / F(row.H);
        gn_mean = warp_reduce(gn_mean, Sum()) / F(row.H);
      });
}

// ---- sums over rows, of two things: a block of kSumWarps warps takes kSumRows rows and a span

constexpr int kSumWarps = 8;
inline int64_t sum_blocks(int64_t M, int64_t H) { return ceil_div(M, kSumRows) * ceil_div(H, kSpan); }

// The sum over the warps of what each has, by all threads: store(column, sum) for the columns of a span.
template <int n, class F, class Store>
__device__ void add_warps(F (&of_warps)[kSumWarps][kSpan], const OfLane<F>& own, const Store& store) {
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) of_warps[threadIdx.y][column_of_lane<n>(i)] = own.v[i];
  __syncthreads();
  const int column = threadIdx.y * kWarp + threadIdx.x;
  F sum = 0;
#pragma unroll
  for (int warp = 0; warp < kSumWarps; ++warp) sum += of_warps[warp][column];
  store(column, sum);
}
static_assert(kSumWarps * kWarp == kSpan, "a column for each thread");

// partial[chunk] = sums over the chunk's rows of what add(sums, row, first) adds to both. All threads of a block call it.
template <int n, class F, class Add>
__device__ void sum_rows(F* partial, int64_t M, int64_t H, const Add& add) {
  const int64_t spans = ceil_div(H, kSpan), chunk = blockIdx.x / spans, first = blockIdx.x % spans * kSpan;
  const int64_t end = (chunk + 1) * kSumRows < M ? (chunk + 1) * kSumRows : M;
  OfLane<F> sums[2] = {};
#pragma unroll 1
  for (int64_t row = chunk * kSumRows + threadIdx.y; row < end; row += kSumWarps) add(sums, row, first);
  __shared__ F of_warps[2][kSumWarps][kSpan];
#pragma unroll
  for (int which = 0; which < 2; ++which)
    add_warps<n>(of_warps[which], sums[which], [&](int column, F sum) {
      if (first + column < H) partial[(chunk * 2 + which) * H + first + column] = sum;
    });
}

// ---- launches of kernels of (p, types): a row to a warp, which holds `Made` of it, or sums over rows

template <class Made, class Args>
void launch_rows(void (*kernel)(Args, Types), const Args& p, Types types, Stream stream) {
  launch(kernel, grid_of(ceil_div(p.M, kRowsPerBlock)), dim3(kWarp, kRowsPerBlock), shared_for<Made>(p.H), stream, p,
         types);
}
template <class Args>
void launch_sums(void (*kernel)(Args, Types), const Args& p, Types types, Stream stream) {
  launch(kernel, grid_of(sum_blocks(p.M, p.H)), dim3(kWarp, kSumWarps), 0, stream, p, types);
}

// dw and db of a type, each of which may be null, from partial (chunks, 2, H): layer_norm.cu.
template <class F>
void add_partial_sums(Any<F>* dw, Any<F>* db, Type type, const F* partial, int64_t chunks, int64_t H, Stream stream);

}  // namespace fastft::cuda

template <>
struct fastft::StatisticOf<fastft::cuda::Any<double>> {
  using type = double;
};
