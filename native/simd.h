// Sixteen floats at a time and dot products of bf16 pairs, on whatever the level's compiler flags offer.
// Each level has its own copy in its own namespace: nothing here may be shared between levels by the linker,
// which is also why level code uses no standard library templates.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(MEMSERVE_NEON)
#include <arm_neon.h>
#endif

namespace memserve {
namespace MEMSERVE_LEVEL {
namespace {

constexpr int kLanes16 = 16;
constexpr float kMinusInfinity = -__builtin_inff();

#if defined(__AVX512BF16__)

constexpr int kMaxSums = 24;  // accumulators of a register block; the other 8 of 32 registers hold operands

using Floats = __m512;
using Pairs = __m512i;  // sixteen pairs of bf16

inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// 2^n for whole n; 0 below the range of normal numbers.
inline Floats power_of_two(Floats n) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}

// The first `count` lanes of x, the others replaced; whatever they held, NaN included, is gone.
inline Floats first_lanes(Floats x, int count, Floats others) {
  const __mmask16 kept = count >= kLanes16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
  return _mm512_mask_mov_ps(others, kept, x);
}

inline void store_bf16(uint16_t* to, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

inline Floats load_bf16(const uint16_t* from) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline Pairs load_pairs(const uint16_t* from) { return _mm512_loadu_si512(from); }
inline Pairs splat_pair(const uint16_t* from) {
  int pair;
  std::memcpy(&pair, from, sizeof pair);
  return _mm512_set1_epi32(pair);
}
inline Floats dot_pairs(Floats sum, Pairs a, Pairs b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// Pairs of int16 as well: what int8 becomes on its way into products, with 32-bit sums that are exact in any order.
using Ints = __m512i;

inline Pairs load_byte_pairs(const int8_t* from) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Ints no_ints() { return _mm512_setzero_si512(); }
// gcc 12 copies the sum before and after the intrinsic, which fills a register block with moves.
inline Ints dot_int_pairs(Ints sum, Pairs a, Pairs b) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
inline Floats floats_of(Ints x) { return _mm512_cvtepi32_ps(x); }
// Round to nearest even; numbers that fit.
inline void store_int16(uint16_t* to, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x)));
}
inline void store_int8(int8_t* to, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}

using Words = __m512i;  // sixteen of 32 bits

inline Words load_words(const unsigned char* from) { return _mm512_loadu_si512(from); }
inline __m128i load_bytes(const unsigned char* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}
inline Floats load_u8(const unsigned char* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_bytes(from)));
}
inline Floats load_s8(const unsigned char* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bytes(from)));
}
inline Floats load_f16(const unsigned char* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// Nibble `nibble` of each word. The permutation looks at the index's four lowest bits only, so nothing is masked.
inline Floats low_nibbles(Words words, int nibble) {
  const Floats numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(nibble == 0 ? words : _mm512_srli_epi32(words, 4 * nibble), numbers);
}

inline Floats signed_bytes(Words words, int byte) {
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 24 - 8 * byte), 24));
}

// Sixteen pairs (first[i], second[i]).
inline void store_bf16_pairs(uint16_t* to, Floats first, Floats second) {
  const __m512i places = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                          21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(places, halves));
}

#else

#if defined(__AVX2__)
constexpr int kNativeLanes = 8;
constexpr int kMaxSums = 6;
#elif defined(MEMSERVE_NEON)
constexpr int kNativeLanes = 4;
constexpr int kMaxSums = 6;  // of four registers each; the other 8 of 32 hold operands
#else
constexpr int kNativeLanes = 4;
constexpr int kMaxSums = 2;
#endif
constexpr int kParts = kLanes16 / kNativeLanes;

typedef float NativeFloats __attribute__((vector_size(kNativeLanes * 4)));
typedef int32_t NativeInts __attribute__((vector_size(kNativeLanes * 4)));
typedef uint32_t NativeWords __attribute__((vector_size(kNativeLanes * 4)));

struct Floats {
  NativeFloats part[kParts];
};
struct Pairs {
  NativeWords part[kParts];
};

template <class Result, class Function>
inline __attribute__((always_inline)) Result each_part(Function function) {
  Result result;
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) result.part[p] = function(p);
  return result;
}

inline NativeFloats native_multiply_add(NativeFloats a, NativeFloats b, NativeFloats c) {
#if defined(__FMA__)
  return reinterpret_cast<NativeFloats>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#elif defined(MEMSERVE_NEON)
  return reinterpret_cast<NativeFloats>(vfmaq_f32(reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(a),
                                                  reinterpret_cast<float32x4_t>(b)));
#else
  return a * b + c;
#endif
}

inline Floats splat(float x) {
  return each_part<Floats>([&](int) { return x - NativeFloats{}; });
}
inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }
inline Floats add(Floats a, Floats b) {
  return each_part<Floats>([&](int p) { return a.part[p] + b.part[p]; });
}
inline Floats subtract(Floats a, Floats b) {
  return each_part<Floats>([&](int p) { return a.part[p] - b.part[p]; });
}
inline Floats multiply(Floats a, Floats b) {
  return each_part<Floats>([&](int p) { return a.part[p] * b.part[p]; });
}
inline Floats divide(Floats a, Floats b) {
  return each_part<Floats>([&](int p) { return a.part[p] / b.part[p]; });
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return each_part<Floats>([&](int p) { return native_multiply_add(a.part[p], b.part[p], c.part[p]); });
}
inline Floats larger(Floats a, Floats b) {
  return each_part<Floats>([&](int p) { return a.part[p] > b.part[p] ? a.part[p] : b.part[p]; });
}
// Adding and subtracting 1.5 * 2^23 leaves no room for a fraction; right for |x| < 2^22.
inline Floats nearest(Floats x) {
  constexpr float kNoFraction = 12582912.0f;
  return each_part<Floats>([&](int p) { return (x.part[p] + kNoFraction) - kNoFraction; });
}

inline Floats power_of_two(Floats n) {
  return each_part<Floats>([&](int p) {
    const NativeInts exponent = __builtin_convertvector(n.part[p], NativeInts) + 127;
    return reinterpret_cast<NativeFloats>(exponent << 23);
  });
}

inline Floats first_lanes(Floats x, int count, Floats others) {
  float lanes[kLanes16];
  store(lanes, others);
  for (int i = 0; i < kLanes16 && i < count; ++i) std::memcpy(&lanes[i], reinterpret_cast<float*>(&x) + i, 4);
  return load(lanes);
}

// Round to nearest even, as the hardware does; NaN keeps its sign and stays NaN.
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
inline void store_bf16(uint16_t* to, Floats x) {
  for (int p = 0; p < kParts; p += 2) {
    const bfloat16x8_t low = vcvtq_low_bf16_f32(reinterpret_cast<float32x4_t>(x.part[p]));
    const bfloat16x8_t both = vcvtq_high_bf16_f32(low, reinterpret_cast<float32x4_t>(x.part[p + 1]));
    vst1q_bf16(reinterpret_cast<bfloat16_t*>(to) + p * kNativeLanes, both);
  }
}
#else
inline void store_bf16(uint16_t* to, Floats x) {
  uint32_t bits[kLanes16];
  std::memcpy(bits, &x, sizeof bits);
  for (int i = 0; i < kLanes16; ++i) {
    const bool is_nan = (bits[i] & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = (bits[i] + 0x7fffu + ((bits[i] >> 16) & 1u)) >> 16;
    to[i] = static_cast<uint16_t>(is_nan ? (bits[i] >> 16) | 0x40u : rounded);
  }
}
#endif

inline Floats load_bf16(const uint16_t* from) {
  uint32_t bits[kLanes16];
  for (int i = 0; i < kLanes16; ++i) bits[i] = static_cast<uint32_t>(from[i]) << 16;
  Floats x;
  std::memcpy(&x, bits, sizeof x);
  return x;
}

inline Pairs load_pairs(const uint16_t* from) {
  Pairs x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline Pairs splat_pair(const uint16_t* from) {
  uint32_t pair;
  std::memcpy(&pair, from, sizeof pair);
  return each_part<Pairs>([&](int) { return pair - NativeWords{}; });
}
inline NativeFloats first_of_pair(NativeWords x) { return reinterpret_cast<NativeFloats>(x << 16); }
inline NativeFloats second_of_pair(NativeWords x) { return reinterpret_cast<NativeFloats>(x & 0xffff0000u); }
inline Floats dot_pairs(Floats sum, Pairs a, Pairs b) {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return each_part<Floats>([&](int p) {
    return reinterpret_cast<NativeFloats>(vbfdotq_f32(reinterpret_cast<float32x4_t>(sum.part[p]),
                                                      reinterpret_cast<bfloat16x8_t>(a.part[p]),
                                                      reinterpret_cast<bfloat16x8_t>(b.part[p])));
  });
#else
  return each_part<Floats>([&](int p) {
    const NativeFloats first = native_multiply_add(first_of_pair(a.part[p]), first_of_pair(b.part[p]), sum.part[p]);
    return native_multiply_add(second_of_pair(a.part[p]), second_of_pair(b.part[p]), first);
  });
#endif
}

// Pairs of int16 as well: what int8 becomes on its way into products, with 32-bit sums that are exact in any order.
struct Ints {
  NativeInts part[kParts];
};
typedef int8_t NativeBytePairs __attribute__((vector_size(kNativeLanes * 2)));
typedef int16_t NativeShorts __attribute__((vector_size(kNativeLanes * 4)));

inline Pairs load_byte_pairs(const int8_t* from) {
  return each_part<Pairs>([&](int p) {
    NativeBytePairs bytes;
    std::memcpy(&bytes, from + p * 2 * kNativeLanes, sizeof bytes);
    return reinterpret_cast<NativeWords>(__builtin_convertvector(bytes, NativeShorts));
  });
}
inline Ints no_ints() { return Ints{}; }
inline NativeInts native_dot_int_pairs(NativeWords a, NativeWords b) {
#if defined(__AVX2__)
  return reinterpret_cast<NativeInts>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<NativeInts>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  const NativeInts first = (reinterpret_cast<NativeInts>(a << 16) >> 16) * (reinterpret_cast<NativeInts>(b << 16) >> 16);
  return first + (reinterpret_cast<NativeInts>(a) >> 16) * (reinterpret_cast<NativeInts>(b) >> 16);
#endif
}
inline Ints dot_int_pairs(Ints sum, Pairs a, Pairs b) {
  return each_part<Ints>([&](int p) { return sum.part[p] + native_dot_int_pairs(a.part[p], b.part[p]); });
}
inline Floats floats_of(Ints x) {
  return each_part<Floats>([&](int p) { return __builtin_convertvector(x.part[p], NativeFloats); });
}
// Round to nearest even; numbers that fit.
template <class Element>
inline void store_whole(Element* to, Floats x) {
  float lanes[kLanes16];
  store(lanes, nearest(x));
  for (int i = 0; i < kLanes16; ++i) to[i] = static_cast<Element>(static_cast<int32_t>(lanes[i]));
}
inline void store_int16(uint16_t* to, Floats x) { store_whole(to, x); }
inline void store_int8(int8_t* to, Floats x) { store_whole(to, x); }

using Words = Pairs;

inline Words load_words(const unsigned char* from) {
  Words x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
typedef int8_t NativeSignedBytes __attribute__((vector_size(kNativeLanes)));
typedef uint8_t NativeUnsignedBytes __attribute__((vector_size(kNativeLanes)));
typedef uint16_t NativeHalves __attribute__((vector_size(kNativeLanes * 2)));

template <class Vector>
inline Vector native_part(const unsigned char* from, int p) {
  Vector x;
  std::memcpy(&x, from + static_cast<size_t>(p) * sizeof x, sizeof x);
  return x;
}
inline Floats load_s8(const unsigned char* from) {
  return each_part<Floats>(
      [&](int p) { return __builtin_convertvector(native_part<NativeSignedBytes>(from, p), NativeFloats); });
}
inline Floats load_u8(const unsigned char* from) {
  return each_part<Floats>(
      [&](int p) { return __builtin_convertvector(native_part<NativeUnsignedBytes>(from, p), NativeFloats); });
}
// Finite numbers only. The exponent is moved by a multiplication, which also makes small numbers normal ones.
inline Floats load_f16(const unsigned char* from) {
#if defined(MEMSERVE_NEON)
  return each_part<Floats>([&](int p) {
    uint16_t halves[kNativeLanes];
    std::memcpy(halves, from + p * sizeof halves, sizeof halves);
    return reinterpret_cast<NativeFloats>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves))));
  });
#else
  return each_part<Floats>([&](int p) {
    const NativeWords half = __builtin_convertvector(native_part<NativeHalves>(from, p), NativeWords);
    return reinterpret_cast<NativeFloats>((half & 0x8000u) << 16 | (half & 0x7fffu) << 13) * 0x1p112f;
  });
#endif
}
inline Floats low_nibbles(Words words, int nibble) {
  return each_part<Floats>([&](int p) {
    return __builtin_convertvector(reinterpret_cast<NativeInts>((words.part[p] >> (4 * nibble)) & 15u), NativeFloats);
  });
}
inline Floats signed_bytes(Words words, int byte) {
  return each_part<Floats>([&](int p) {
    return __builtin_convertvector(reinterpret_cast<NativeInts>(words.part[p] << (24 - 8 * byte)) >> 24, NativeFloats);
  });
}

// Sixteen pairs (first[i], second[i]); finite numbers only.
inline void store_bf16_pairs(uint16_t* to, Floats first, Floats second) {
  const auto rounded = [](NativeFloats x) {
    const NativeWords bits = reinterpret_cast<NativeWords>(x);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
  };
  const Pairs pairs = each_part<Pairs>(
      [&](int p) { return rounded(first.part[p]) >> 16 | (rounded(second.part[p]) & 0xffff0000u); });
  std::memcpy(to, &pairs, sizeof pairs);
}

#endif

inline Floats zeros() { return splat(0.0f); }

// Lanes are combined in one fixed tree, so that the result does not depend on the compiler.
template <class Combine>
inline float combine_lanes(Floats x, Combine combine) {
  float lanes[kLanes16];
  store(lanes, x);
  for (int half = kLanes16 / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
  return lanes[0];
}
#if defined(__AVX512BF16__)
// The same tree in registers.
inline float sum_of_lanes(Floats x) {
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), upper);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#else
inline float sum_of_lanes(Floats x) {
  return combine_lanes(x, [](float a, float b) { return a + b; });
}
#endif
inline float largest_lane(Floats x) {
  return combine_lanes(x, [](float a, float b) { return a > b ? a : b; });
}

// 2^x for x <= 127; 0 for x < -126.5, -inf included. Minimax polynomial of 2^f on [-1/2, 1/2], relative error 1e-7.
inline Floats exp2(Floats x) {
  const Floats clamped = larger(x, splat(-127.0f));
  const Floats whole = nearest(clamped);
  const Floats f = subtract(clamped, whole);
  Floats p = splat(1.32647273e-3f);
  p = multiply_add(p, f, splat(9.67151299e-3f));
  p = multiply_add(p, f, splat(5.55073358e-2f));
  p = multiply_add(p, f, splat(2.40222424e-1f));
  p = multiply_add(p, f, splat(6.93147004e-1f));
  p = multiply_add(p, f, splat(1.0f));
  return multiply(p, power_of_two(whole));
}

inline Floats absolute(Floats x) { return larger(x, subtract(zeros(), x)); }

inline float first_lane(Floats x) {
  float lanes[kLanes16];
  store(lanes, x);
  return lanes[0];
}

inline uint16_t bf16_of(float x) {
  uint16_t lanes[kLanes16];
  store_bf16(lanes, splat(x));
  return lanes[0];
}

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
