// Vec<T>: one register of the instruction set that this file is compiled for, on GCC's vector extension, so that +, *, <, ?: and
// fused multiply-add are the compiler's. All intrinsics of fastft are here and in gemm_tiles.h.
//
// Everything lives in FASTFT_NAMESPACE (fastft::cpu::<instruction set>): the linker merges equal inline functions, and a function that was
// compiled for AVX-512 must never be merged into another set's path. For the same reason: no std containers, algorithms or static initialisers here.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "numeric.h"

namespace FASTFT_NAMESPACE {

#if defined(FASTFT_ISA_AVX512) || defined(FASTFT_ISA_AVX512_BF16)
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(FASTFT_ISA_AVX2)
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif

template <class T, int kBytes = kVectorBytes>
struct VecOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

// Whether exponentials and activations of which a T is made may be as rough as a bf16.
template <class T>
constexpr bool kRough = sizeof(T) == 2;

template <>
struct Number<Vec<float>> {
  using Scalar = float;
  using Bits = Vec<uint32_t>;
};
template <>
struct Number<Vec<double>> {
  using Scalar = double;
  using Bits = Vec<uint64_t>;
};
#if defined(FASTFT_ISA_AVX512) || defined(FASTFT_ISA_AVX512_BF16)
template <>
FASTFT_INLINE Vec<float> times_two_to(Vec<float> x, Vec<float> n) {
  return _mm512_maskz_scalef_ps(0xffff, x, n);
}
// table[index % 16] of each lane; the table is aligned to a register.
inline Vec<float> lookup(const float* table, Vec<uint32_t> index) {
  return (Vec<float>)_mm512_permutexvar_ps((__m512i)index, _mm512_load_ps(table));
}
// The smaller one, or the larger, x if that is NaN. Beside a constant, GCC 12 makes a comparison and a copy of x > limit ? limit : x.
inline Vec<float> at_most(Vec<float> x, float limit) {
  return (Vec<float>)_mm512_min_ps(_mm512_set1_ps(limit), (__m512)x);
}
inline Vec<float> at_least_0(Vec<float> x) { return (Vec<float>)_mm512_max_ps(_mm512_setzero_ps(), (__m512)x); }

// 2^(j / 16)
alignas(64) constexpr float kSixteenths[16] = {
    1.f,         1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f, 1.29683959f, 1.35425556f,
    1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f, 1.68179286f, 1.75625217f, 1.83400810f, 1.91520655f};

// numeric.h's, with n = 16 i + j = round(16 x / ln 2): exp(x) f = p(r) 2^i (2^(j / 16) f), the last looked up, so that p
// is of degree 1 or 3, not of 3 or 5, with the same errors. i and j reach the exponent in one shift: n << 19 also adds
// j << 19, which has been taken off what is looked up.
template <bool kRough>
FASTFT_INLINE Vec<float> exp_by_lookup(Vec<float> x, Vec<float> f) {
  using C = ExpConstants<float>;
  const Vec<uint32_t> j = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Vec<uint32_t> table = (Vec<uint32_t>)((Vec<float>)_mm512_load_ps(kSixteenths) * f) - (j << 19);
  const Vec<float> t = x * (16 * C::log2_e) + C::magic, r = x - (t - C::magic) * (C::ln2 / 16);
  const Vec<float> p =
      kRough ? polynomial(r, 0.999960899f, 1.00011730f) : polynomial(r, 0.166662753f, 0.500019550f, 1.f, 1.f);
  const Vec<uint32_t> bits = (Vec<uint32_t>)t;
  return p * (Vec<float>)((Vec<uint32_t>)_mm512_permutexvar_epi32((__m512i)bits, (__m512i)table) + (bits << 19));
}
template <>
FASTFT_INLINE Vec<float> exp_times<true>(Vec<float> x, Vec<float> f) {
  return exp_by_lookup<true>(x, f);
}
template <>
FASTFT_INLINE Vec<float> exp_times<false>(Vec<float> x, Vec<float> f) {
  return exp_by_lookup<false>(x, f);
}
#elif defined(FASTFT_ISA_AVX2)
inline Vec<float> lookup(const float* table, Vec<uint32_t> index) {  // of 8
  return (Vec<float>)_mm256_permutevar8x32_ps(_mm256_load_ps(table), (__m256i)index);
}
inline Vec<float> at_most(Vec<float> x, float limit) {
  return (Vec<float>)_mm256_min_ps(_mm256_set1_ps(limit), (__m256)x);
}
inline Vec<float> at_least_0(Vec<float> x) { return (Vec<float>)_mm256_max_ps(_mm256_setzero_ps(), (__m256)x); }
#endif

// The products of the lower halves of x's lanes with a factor: philox.h's.
inline Vec<uint64_t> wide_product(Vec<uint64_t> x, uint32_t factor) {
  const Vec<uint64_t> other = Vec<uint64_t>{} + uint64_t(factor);
#if defined(FASTFT_ISA_AVX512) || defined(FASTFT_ISA_AVX512_BF16)
  return (Vec<uint64_t>)_mm512_mul_epu32((__m512i)x, (__m512i)other);
#elif defined(FASTFT_ISA_AVX2)
  return (Vec<uint64_t>)_mm256_mul_epu32((__m256i)x, (__m256i)other);
#elif defined(__SSE2__)
  return (Vec<uint64_t>)_mm_mul_epu32((__m128i)x, (__m128i)other);
#else
  return (x & uint64_t(0xffffffffu)) * other;
#endif
}

template <class T>
inline Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // x - 0: the compiler's broadcast, exact for -0 and NaN
}

#if defined(FASTFT_ISA_AVX512) || defined(FASTFT_ISA_AVX512_BF16)
inline Vec<float> sqrt(Vec<float> x) { return (Vec<float>)_mm512_sqrt_ps((__m512)x); }
inline Vec<double> sqrt(Vec<double> x) { return (Vec<double>)_mm512_sqrt_pd((__m512d)x); }
#elif defined(FASTFT_ISA_AVX2)
inline Vec<float> sqrt(Vec<float> x) { return (Vec<float>)_mm256_sqrt_ps((__m256)x); }
inline Vec<double> sqrt(Vec<double> x) { return (Vec<double>)_mm256_sqrt_pd((__m256d)x); }
#elif defined(__SSE2__)
inline Vec<float> sqrt(Vec<float> x) { return (Vec<float>)_mm_sqrt_ps((__m128)x); }
inline Vec<double> sqrt(Vec<double> x) { return (Vec<double>)_mm_sqrt_pd((__m128d)x); }
#else
inline Vec<float> sqrt(Vec<float> x) {
  return by_lane(x, [](float v) { return __builtin_sqrtf(v); });
}
inline Vec<double> sqrt(Vec<double> x) {
  return by_lane(x, [](double v) { return __builtin_sqrt(v); });
}
#endif

// ---- bf16 <-> f32, the scalar conversions are in common/numeric.h

// Rounds each lane to bf16, left in the upper half of the lane.
inline Vec<uint32_t> round_bf16(Vec<float> x) {
  const Vec<uint32_t> bits = (Vec<uint32_t>)x;
  return x != x ? (bits | 0x400000u) : bits + 0x7fffu + ((bits >> 16) & 1u);
}

using HalfBits = typename VecOf<uint16_t, kVectorBytes / 2>::type;  // as many uint16_t as Vec<float> has lanes

// GCC 12 makes 4 to 6 instructions of either conversion.
#if defined(FASTFT_ISA_AVX512) || defined(FASTFT_ISA_AVX512_BF16)
inline Vec<uint32_t> widen(HalfBits bits) { return (Vec<uint32_t>)_mm512_cvtepu16_epi32((__m256i)bits); }
inline HalfBits upper_halves(Vec<uint32_t> bits) { return (HalfBits)_mm512_cvtepi32_epi16((__m512i)(bits >> 16)); }
#elif defined(FASTFT_ISA_AVX2)
inline Vec<uint32_t> widen(HalfBits bits) { return (Vec<uint32_t>)_mm256_cvtepu16_epi32((__m128i)bits); }
inline HalfBits upper_halves(Vec<uint32_t> bits) {
  const __m256i halves = (__m256i)(bits >> 16);
  return (HalfBits)_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x88));
}
#else
inline Vec<uint32_t> widen(HalfBits bits) { return __builtin_convertvector(bits, Vec<uint32_t>); }
inline HalfBits upper_halves(Vec<uint32_t> bits) { return __builtin_convertvector(bits >> 16, HalfBits); }
#endif

inline HalfBits to_bf16(Vec<float> x) {
#if defined(FASTFT_ISA_AVX512_BF16)
  // The instruction rounds likewise, in fewer operations, but takes denormals for zeros.
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)x, 0x20) == 0, 1)) return (HalfBits)_mm512_cvtneps_pbh((__m512)x);
#endif
  return upper_halves(round_bf16(x));
}

inline Vec<uint16_t> to_bf16(Vec<float> low, Vec<float> high) {
#if defined(FASTFT_ISA_AVX512_BF16)
  if (__builtin_expect((_mm512_fpclass_ps_mask((__m512)low, 0x20) | _mm512_fpclass_ps_mask((__m512)high, 0x20)) == 0,
                       1))
    return (Vec<uint16_t>)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#endif
  Vec<uint16_t> upper;  // of each lane
  for (int i = 0; i < 2 * kLanes<float>; ++i) upper[i] = uint16_t(2 * i + 1);
  return __builtin_shuffle((Vec<uint16_t>)round_bf16(low), (Vec<uint16_t>)round_bf16(high), upper);
}

// ---- unaligned loads and stores of a whole register
inline Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<uint32_t> load_bits(const bf16* p) {  // of bf16, in the lower half of each lane
  HalfBits h;
  std::memcpy(&h, p, sizeof h);
  return widen(h);
}
inline Vec<uint32_t> load_bits(const float* p) { return round_bf16(load(p)) >> 16; }
inline Vec<float> load(const bf16* p) { return (Vec<float>)(load_bits(p) << 16); }
inline void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, Vec<float> v) {
  const HalfBits h = to_bf16(v);
  std::memcpy(p, &h, sizeof h);
}

// ---- the first n lanes, 0 < n <= lanes; missing lanes read as zero
#if defined(FASTFT_ISA_AVX512) || defined(FASTFT_ISA_AVX512_BF16)
inline Vec<float> load(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
inline Vec<double> load(const double* p, int n) { return _mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p); }
inline HalfBits load_half_bits(const bf16* p, int n) {
  return (HalfBits)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
}
inline void store(float* p, Vec<float> v, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v); }
inline void store(double* p, Vec<double> v, int n) { _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), v); }
inline void store_half_bits(bf16* p, HalfBits v, int n) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)v);
}
#else
template <class V, class T>
inline V load_some(const T* p, int n) {
  T buffer[sizeof(V) / sizeof(T)] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  V v;
  std::memcpy(&v, buffer, sizeof v);
  return v;
}
template <class T, class V>
inline void store_some(T* p, V v, int n) {
  T buffer[sizeof(V) / sizeof(T)];
  std::memcpy(buffer, &v, sizeof v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}
inline Vec<float> load(const float* p, int n) { return load_some<Vec<float>>(p, n); }
inline Vec<double> load(const double* p, int n) { return load_some<Vec<double>>(p, n); }
inline HalfBits load_half_bits(const bf16* p, int n) { return load_some<HalfBits>(p, n); }
inline void store(float* p, Vec<float> v, int n) { store_some(p, v, n); }
inline void store(double* p, Vec<double> v, int n) { store_some(p, v, n); }
inline void store_half_bits(bf16* p, HalfBits v, int n) { store_some(p, v, n); }
#endif
inline Vec<uint32_t> load_bits(const bf16* p, int n) { return widen(load_half_bits(p, n)); }
inline Vec<uint32_t> load_bits(const float* p, int n) { return round_bf16(load(p, n)) >> 16; }
inline Vec<float> load(const bf16* p, int n) { return (Vec<float>)(load_bits(p, n) << 16); }
inline void store(bf16* p, Vec<float> v, int n) { store_half_bits(p, to_bf16(v), n); }

// ---- logits as they lie in memory: kLanes<T> of them, which widen to kParts registers of their Compute<T>. Of bf16, the
// even ones are the first part and the odd ones the second: no lane moves, on no instruction set.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<8> {
  using type = uint64_t;
};
template <class T>
using Words = Vec<typename WordOf<sizeof(T)>::type>;
template <class T>
constexpr int kParts = sizeof(Compute<T>) / sizeof(T);

template <class T>
inline Words<T> load_words(const T* p) {
  Words<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store_words(T* p, Words<T> v) {
  std::memcpy(p, &v, sizeof v);
}
template <class T>
inline Vec<Compute<T>> part(Words<T> words, int i) {
  if constexpr (kParts<T> == 1) {
    return (Vec<Compute<T>>)words;
  } else {
    const Vec<uint32_t> pairs = (Vec<uint32_t>)words;
    return (Vec<float>)(i == 0 ? pairs << 16 : pairs & 0xffff0000u);
  }
}
// Rounds numbers (no NaN) to nearest; a tie, one result in 65536, goes away from zero.
template <class T>
inline Words<T> join(const Vec<Compute<T>> (&parts)[kParts<T>]) {
  if constexpr (kParts<T> == 1) {
    return (Words<T>)parts[0];
  } else {
    const Vec<uint32_t> even = (Vec<uint32_t>)parts[0] + 0x8000u, odd = (Vec<uint32_t>)parts[1] + 0x8000u;
    return (Words<T>)((odd & 0xffff0000u) | (even >> 16));
  }
}

// Past the caches, to an aligned address: memory that is written and not read need not be fetched. streamed() comes
// after the last, before another thread may read.
template <class T, class V>
inline void stream(T* p, V v) {
#if defined(FASTFT_ISA_AVX512) || defined(FASTFT_ISA_AVX512_BF16)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(FASTFT_ISA_AVX2)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
  std::memcpy(p, &v, sizeof v);
#endif
}
inline void stream_lanes(float* p, Vec<float> v) { stream(p, v); }
inline void stream_lanes(double* p, Vec<double> v) { stream(p, v); }
inline void stream_lanes(bf16* p, Vec<float> v) {  // half a line or less: the next has the rest
  const HalfBits bits = to_bf16(v);
#if defined(FASTFT_ISA_AVX512) || defined(FASTFT_ISA_AVX512_BF16)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)bits);
#elif defined(FASTFT_ISA_AVX2)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)bits);
#else
  std::memcpy(p, &bits, sizeof bits);
#endif
}
inline void streamed() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Outputs from this size on are streamed: whoever reads them is another core half of the time, which takes longer to have them from this one's cache
// than from memory (products of 64 rows gain 1 to 20 %).
constexpr int64_t kStreamBytes = 256 << 10;

// Whether a matrix of whole registers' rows, from an aligned address on, is large enough to be streamed.
template <class T>
bool streams(const T* data, int64_t rows, int64_t cols) {
  const int64_t row_bytes = cols * int64_t(sizeof(T));
  return data && rows * row_bytes >= kStreamBytes && (int64_t(uintptr_t(data)) | row_bytes) % kVectorBytes == 0;
}

// A register, to p; with `past_caches` p is aligned.
template <class T, class V>
inline void put_register(T* p, V v, bool past_caches) {
  if (past_caches)
    stream(p, v);
  else
    std::memcpy(p, &v, sizeof v);
}

// Registers that lie side by side.
template <class F, class V, int kCount>
inline void put(F* p, const V (&v)[kCount], bool past_caches) {
  static_assert(sizeof(V) == kLanes<F> * sizeof(F));
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) put_register(p + i * kLanes<F>, v[i], past_caches);
}
template <int kCount>
inline void put(bf16* p, const Vec<float> (&v)[kCount], bool past_caches) {
  static_assert(kCount % 2 == 0);
#pragma GCC unroll 4
  for (int i = 0; i < kCount; i += 2) put_register(p + i * kLanes<float>, to_bf16(v[i], v[i + 1]), past_caches);
}

// Calls body(j, load/store pair) over n elements: whole registers, then one partial register.
//   for_lanes<T>(n, [&](int64_t j, auto load, auto store) { store(y + j, f(load(x + j))); });
// Two copies of body; one copy with a branch in each load and store was 2x slower.
template <class F, class Body>
inline __attribute__((always_inline)) void for_lanes(int64_t n, const Body& body) {
  constexpr int L = kLanes<F>;
  int64_t j = 0;
  for (; j + L <= n; j += L) body(j, [](const auto* p) { return load(p); }, [](auto* p, Vec<F> v) { store(p, v); });
  if (const int rest = int(n - j))
    body(j, [rest](const auto* p) { return load(p, rest); }, [rest](auto* p, Vec<F> v) { store(p, v, rest); });
}

// The same where `store` streams if `past_caches` says so: n is then whole registers, and so is where it stores.
template <class F, class Body>
inline __attribute__((always_inline)) void for_lanes(int64_t n, bool past_caches, const Body& body) {
  if (!past_caches) return for_lanes<F>(n, body);
  for (int64_t j = 0; j < n; j += kLanes<F>)
    body(j, [](const auto* p) { return load(p); }, [](auto* p, Vec<F> v) { stream_lanes(p, v); });
}

// 0, 1, 2 ...
template <class F>
inline Bits<Vec<F>> lanes() {
  Bits<Vec<F>> lane;
  for (int i = 0; i < kLanes<F>; ++i) lane[i] = i;
  return lane;
}

// The larger one; `otherwise` where x is NaN.
template <class V>
inline V larger(V x, V otherwise) {
  return x > otherwise ? x : otherwise;
}

// op over all lanes, given in every lane: halves are folded, then quarters, so the order is the same for everybody.
template <class F, class Op>
inline Vec<F> fold_lanes(typename VecOf<F>::type v, const Op& op) {
  const Bits<Vec<F>> lane = lanes<F>();
#pragma GCC unroll 4
  for (int distance = kLanes<F> / 2; distance; distance /= 2)
    v = op(v, __builtin_shuffle(v, lane ^ unsigned(distance)));
  return v;
}
template <class F>
inline Vec<F> sum_lanes(typename VecOf<F>::type v) {
  return fold_lanes<F>(v, [](Vec<F> a, Vec<F> b) { return a + b; });
}
template <class F>
inline Vec<F> max_lanes(typename VecOf<F>::type v) {
  return fold_lanes<F>(v, [](Vec<F> a, Vec<F> b) { return larger(a, b); });
}

// As fold_lanes for as many registers as a register has lanes: the result of register r is in lane r. Half the registers
// are left after each step, whose lanes come from two of them: 3 operations for each register, not 2 log2(lanes).
template <class F, int kDistance = 1, class Op>
inline Vec<F> fold_rows(typename VecOf<F>::type (&v)[kLanes<F>], const Op& op) {
  constexpr int L = kLanes<F>;
  if constexpr (kDistance == L) {
    return v[0];
  } else {
    const Bits<Vec<F>> lane = lanes<F>(), own = lane + (lane & unsigned(kDistance)) / unsigned(kDistance) * unsigned(L);
#pragma GCC unroll 8
    for (int r = 0; r < L; r += 2 * kDistance)
      v[r] = op(__builtin_shuffle(v[r], v[r + kDistance], own),
                __builtin_shuffle(v[r], v[r + kDistance], own ^ unsigned(kDistance)));
    return fold_rows<F, 2 * kDistance>(v, op);
  }
}

// ---- threads. Tasks are handed out one by one and in order (gemm's may wait for one before), since cores differ in speed; results may depend on the task,
// never on the worker.
// body(task, worker) with worker < host.threads, for scratch memory per worker.
template <class Body>
inline void parallel_for(const Host& host, int64_t tasks, const Body& body) {
  if (tasks <= 0) return;
  if (tasks == 1 || host.threads == 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  struct Shared {
    const Body& body;
    int64_t tasks, next;
  } shared{body, tasks, 0};
  const int64_t workers = host.threads < tasks ? host.threads : tasks;
  host.parallel_for(
      workers,
      [](void* context, int64_t begin, int64_t end) {
        Shared& s = *static_cast<Shared*>(context);
        for (int64_t worker = begin; worker < end; ++worker)
          for (int64_t task; (task = __atomic_fetch_add(&s.next, 1, __ATOMIC_RELAXED)) < s.tasks;)
            s.body(task, int(worker));
      },
      &shared);
}

template <class T>
inline T* scratch(const Host& host, int64_t elements) {
  return static_cast<T*>(host.scratch(host.scratch_owner, size_t(elements) * sizeof(T)));
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Declarations of every kernel in this instruction set's namespace, and the line that instantiates one at the end of its file.
#define FASTFT_DECLARE(name, Args) \
  template <class T, class W>      \
  void name(const Args<T, W>&, const Host&);
FASTFT_KERNELS(FASTFT_DECLARE)
double peak_f32(double seconds, const Host&);
double peak_bf16(double seconds, const Host&);
double tile_f32(double seconds, const Host&);
double tile_bf16(double seconds, const Host&);
int64_t gemm_tasks(const GemmQuery&, int phase, double* work, int64_t capacity);

#if defined(FASTFT_ISA_AVX512_BF16)  // its fp32 and fp64 are avx512's: table.cpp
#define FASTFT_INSTANTIATE(name, Args)                                  \
  template void name<bf16, bf16>(const Args<bf16, bf16>&, const Host&); \
  template void name<bf16, float>(const Args<bf16, float>&, const Host&);
#else
#define FASTFT_INSTANTIATE(name, Args)                                      \
  template void name<float, float>(const Args<float, float>&, const Host&); \
  template void name<bf16, bf16>(const Args<bf16, bf16>&, const Host&);     \
  template void name<bf16, float>(const Args<bf16, float>&, const Host&);   \
  template void name<double, double>(const Args<double, double>&, const Host&);
#endif

}  // namespace FASTFT_NAMESPACE
