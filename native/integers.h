// Sixteen 32-bit sums, and dot products of four 8-bit numbers for each of them. All of it is exact, so that every level
// gives the same numbers; no sum of this project's products comes near 2^31.
#pragma once

#include "simd.h"

namespace memserve {
namespace MEMSERVE_LEVEL {
namespace {

// What is multiplied: kNibbles 0 to 15, kSigned -128 to 127; inputs are -127 to 127.
enum class Weights { kNibbles, kSigned };

#if defined(__AVX512VNNI__)

constexpr int kMaxDots = 12;  // of a register block; as many float sums and 8 operands fill the 32 registers

using Dots = Ints;
using InputQuad = __m512i;   // the same four inputs sixteen times
using WeightQuads = __m512i;  // four weights of each of sixteen outputs, unsigned

inline Dots splat_int(int32_t x) { return _mm512_set1_epi32(x); }
inline InputQuad splat_quad(const int8_t* from) {
  int quad;
  std::memcpy(&quad, from, sizeof quad);
  return _mm512_set1_epi32(quad);
}
inline WeightQuads low_halves(const unsigned char* line) {
  return _mm512_and_si512(_mm512_loadu_si512(line), _mm512_set1_epi8(15));
}
inline WeightQuads high_halves(const unsigned char* line) {
  return _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(line), 4), _mm512_set1_epi8(15));
}
// The instruction's weights are unsigned: 128 more, which the sum's start takes off.
inline WeightQuads signed_quads(const unsigned char* line) {
  return _mm512_xor_si512(_mm512_loadu_si512(line), _mm512_set1_epi8(-128));
}
template <Weights kWeights>
inline Dots first_sum(int32_t bias) {
  return kWeights == Weights::kSigned ? splat_int(bias) : splat_int(0);
}
template <Weights>
inline Dots dot_quads(Dots sum, WeightQuads weights, InputQuad inputs) {
  return _mm512_dpbusd_epi32(sum, weights, inputs);
}

// Sixteen numbers below 128 rounded to the nearest whole one, ties to even; returns their sum.
inline int32_t store_rounded(int8_t* to, Floats x) {
  const Ints whole = _mm512_cvtps_epi32(x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(whole));
  return _mm512_reduce_add_epi32(whole);
}

#elif defined(__AVX2__)

constexpr int kMaxDots = 4;

struct Dots {
  __m256i part[kParts];
};
using WeightQuads = Dots;
using InputQuad = __m256i;

inline Dots splat_int(int32_t x) {
  return each_part<Dots>([&](int) { return _mm256_set1_epi32(x); });
}
inline Floats floats_of(Dots x) {
  return each_part<Floats>([&](int p) { return reinterpret_cast<NativeFloats>(_mm256_cvtepi32_ps(x.part[p])); });
}
inline InputQuad splat_quad(const int8_t* from) {
  int quad;
  std::memcpy(&quad, from, sizeof quad);
  return _mm256_set1_epi32(quad);
}
inline __m256i line_part(const unsigned char* line, int p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line) + p);
}
inline WeightQuads low_halves(const unsigned char* line) {
  return each_part<Dots>([&](int p) { return _mm256_and_si256(line_part(line, p), _mm256_set1_epi8(15)); });
}
inline WeightQuads high_halves(const unsigned char* line) {
  return each_part<Dots>([&](int p) {
    return _mm256_and_si256(_mm256_srli_epi16(line_part(line, p), 4), _mm256_set1_epi8(15));
  });
}
inline WeightQuads signed_quads(const unsigned char* line) {
  return each_part<Dots>([&](int p) { return line_part(line, p); });
}
template <Weights>
inline Dots first_sum(int32_t) {
  return splat_int(0);
}
// The instruction saturates sums of two products at 16 bits: 2 * 15 * 127 and, with the weights' signs moved to the
// inputs, 2 * 128 * 127 stay below.
template <Weights kWeights>
inline Dots dot_quads(Dots sum, WeightQuads weights, InputQuad inputs) {
  return each_part<Dots>([&](int p) {
    const __m256i w = weights.part[p];
    const __m256i pairs = kWeights == Weights::kNibbles
                              ? _mm256_maddubs_epi16(w, inputs)
                              : _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(inputs, w));
    return _mm256_add_epi32(sum.part[p], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  });
}

#elif defined(__ARM_FEATURE_DOTPROD)

constexpr int kMaxDots = 4;

using Dots = Ints;
struct WeightQuads {
  int8x16_t part[kParts];
};
using InputQuad = int8x16_t;

inline Dots splat_int(int32_t x) {
  return each_part<Dots>([&](int) { return x - NativeInts{}; });
}
inline InputQuad splat_quad(const int8_t* from) {
  int32_t quad;
  std::memcpy(&quad, from, sizeof quad);
  return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}
inline WeightQuads low_halves(const unsigned char* line) {
  return each_part<WeightQuads>(
      [&](int p) { return vreinterpretq_s8_u8(vandq_u8(vld1q_u8(line + 16 * p), vdupq_n_u8(15))); });
}
inline WeightQuads high_halves(const unsigned char* line) {
  return each_part<WeightQuads>([&](int p) { return vreinterpretq_s8_u8(vshrq_n_u8(vld1q_u8(line + 16 * p), 4)); });
}
inline WeightQuads signed_quads(const unsigned char* line) {
  return each_part<WeightQuads>([&](int p) { return vreinterpretq_s8_u8(vld1q_u8(line + 16 * p)); });
}
template <Weights>
inline Dots first_sum(int32_t) {
  return splat_int(0);
}
template <Weights>
inline Dots dot_quads(Dots sum, WeightQuads weights, InputQuad inputs) {
  return each_part<Dots>([&](int p) {
    return reinterpret_cast<NativeInts>(vdotq_s32(reinterpret_cast<int32x4_t>(sum.part[p]), weights.part[p], inputs));
  });
}

#else

constexpr int kMaxDots = 4;

typedef int16_t NativeShorts __attribute__((vector_size(kNativeLanes * 4)));

using Dots = Ints;
// First and third, second and fourth of four 8-bit numbers, in 16 bits.
struct WeightQuads {
  NativeShorts even[kParts];
  NativeShorts odd[kParts];
};
struct InputQuad {
  NativeShorts even;
  NativeShorts odd;
};

inline Dots splat_int(int32_t x) {
  return each_part<Dots>([&](int) { return x - NativeInts{}; });
}
inline InputQuad splat_quad(const int8_t* from) {
  uint32_t quad;
  std::memcpy(&quad, from, sizeof quad);
  const NativeShorts both = reinterpret_cast<NativeShorts>(quad - NativeWords{});
  return {(both << 8) >> 8, both >> 8};
}
template <class Function>
inline WeightQuads each_weight_part(const unsigned char* line, Function function) {
  const Words words = load_words(line);
  WeightQuads result;
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) {
    const NativeShorts both = reinterpret_cast<NativeShorts>(function(words.part[p]));
    result.even[p] = (both << 8) >> 8;
    result.odd[p] = both >> 8;
  }
  return result;
}
inline WeightQuads low_halves(const unsigned char* line) {
  return each_weight_part(line, [](NativeWords x) { return x & 0x0f0f0f0fu; });
}
inline WeightQuads high_halves(const unsigned char* line) {
  return each_weight_part(line, [](NativeWords x) { return (x >> 4) & 0x0f0f0f0fu; });
}
inline WeightQuads signed_quads(const unsigned char* line) {
  return each_weight_part(line, [](NativeWords x) { return x; });
}
template <Weights>
inline Dots first_sum(int32_t) {
  return splat_int(0);
}
// Two products, each at most 128 * 127, fit 16 bits; the four do not.
template <Weights>
inline Dots dot_quads(Dots sum, const WeightQuads& weights, InputQuad inputs) {
  return each_part<Ints>([&](int p) {
    const NativeShorts pairs = weights.even[p] * inputs.even + weights.odd[p] * inputs.odd;
    const NativeInts both = reinterpret_cast<NativeInts>(pairs);
    return sum.part[p] + ((both << 16) >> 16) + (both >> 16);
  });
}

#endif

#if !defined(__AVX512VNNI__)

// Sixteen numbers below 128 rounded to the nearest whole one, ties to even; returns their sum.
inline int32_t store_rounded(int8_t* to, Floats x) {
  int32_t sum = 0;
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) {
    // Adding 1.5 * 2^23 leaves the whole number in the lowest bits.
    const NativeInts whole = reinterpret_cast<NativeInts>(x.part[p] + 12582912.0f) - 0x4b400000;
    const NativeBytes bytes = __builtin_convertvector(whole, NativeBytes);
    std::memcpy(to + p * kNativeLanes, &bytes, sizeof bytes);
    for (int i = 0; i < kNativeLanes; ++i) sum += whole[i];
  }
  return sum;
}

#endif

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
