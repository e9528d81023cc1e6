// Dot products of four 8-bit numbers for each of sixteen 32-bit sums. All of it is exact, so that every level gives the
// same numbers; no sum of this project's products comes near 2^31.
#pragma once

#include "simd.h"

namespace memserve {
namespace MEMSERVE_LEVEL {
namespace {

// What is multiplied: kNibbles 0 to 15, kSigned -128 to 127; inputs are -127 to 127.
enum class Weights { kNibbles, kSigned };

#if defined(__AVX512VNNI__)

constexpr int kMaxDots = 12;  // of a register block; as many float sums and 8 operands fill the 32 registers

using InputQuad = __m512i;    // the same four inputs sixteen times
using WeightQuads = __m512i;  // four weights of each of sixteen outputs, unsigned

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
inline Ints first_sum(int32_t bias) {
  return _mm512_set1_epi32(kWeights == Weights::kSigned ? bias : 0);
}
template <Weights>
inline Ints dot_quads(Ints sum, WeightQuads weights, InputQuad inputs) {
  return _mm512_dpbusd_epi32(sum, weights, inputs);
}

#else

template <Weights>
inline Ints first_sum(int32_t) {
  return no_ints();
}

constexpr int kMaxDots = 4;

#if defined(__AVX2__)

struct WeightQuads {
  __m256i part[kParts];
};
using InputQuad = __m256i;

inline InputQuad splat_quad(const int8_t* from) {
  int quad;
  std::memcpy(&quad, from, sizeof quad);
  return _mm256_set1_epi32(quad);
}
inline WeightQuads signed_quads(const unsigned char* line) {
  return each_part<WeightQuads>(
      [&](int p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line) + p); });
}
inline WeightQuads low_halves(const unsigned char* line) {
  const WeightQuads both = signed_quads(line);
  return each_part<WeightQuads>([&](int p) { return _mm256_and_si256(both.part[p], _mm256_set1_epi8(15)); });
}
inline WeightQuads high_halves(const unsigned char* line) {
  const WeightQuads both = signed_quads(line);
  return each_part<WeightQuads>(
      [&](int p) { return _mm256_and_si256(_mm256_srli_epi16(both.part[p], 4), _mm256_set1_epi8(15)); });
}
// The instruction saturates sums of two products at 16 bits: 2 * 15 * 127 and, with the weights' signs moved to the
// inputs, 2 * 128 * 127 stay below.
template <Weights kWeights>
inline Ints dot_quads(Ints sum, const WeightQuads& weights, InputQuad inputs) {
  return each_part<Ints>([&](int p) {
    const __m256i w = weights.part[p];
    const __m256i pairs = kWeights == Weights::kNibbles
                              ? _mm256_maddubs_epi16(w, inputs)
                              : _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(inputs, w));
    return sum.part[p] + reinterpret_cast<NativeInts>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  });
}

#elif defined(__ARM_FEATURE_DOTPROD)

struct WeightQuads {
  int8x16_t part[kParts];
};
using InputQuad = int8x16_t;

inline InputQuad splat_quad(const int8_t* from) {
  int32_t quad;
  std::memcpy(&quad, from, sizeof quad);
  return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}
inline WeightQuads signed_quads(const unsigned char* line) {
  return each_part<WeightQuads>([&](int p) { return vreinterpretq_s8_u8(vld1q_u8(line + 16 * p)); });
}
inline WeightQuads low_halves(const unsigned char* line) {
  return each_part<WeightQuads>(
      [&](int p) { return vreinterpretq_s8_u8(vandq_u8(vld1q_u8(line + 16 * p), vdupq_n_u8(15))); });
}
inline WeightQuads high_halves(const unsigned char* line) {
  return each_part<WeightQuads>([&](int p) { return vreinterpretq_s8_u8(vshrq_n_u8(vld1q_u8(line + 16 * p), 4)); });
}
template <Weights>
inline Ints dot_quads(Ints sum, const WeightQuads& weights, InputQuad inputs) {
  return each_part<Ints>([&](int p) {
    return reinterpret_cast<NativeInts>(vdotq_s32(reinterpret_cast<int32x4_t>(sum.part[p]), weights.part[p], inputs));
  });
}

#else

// First and third, second and fourth of four 8-bit numbers, as pairs of 16 bits.
struct Quads {
  Pairs even;
  Pairs odd;
};
using WeightQuads = Quads;
using InputQuad = Quads;

template <class Function>
inline Quads widened(Function function) {
  const auto shorts = [&](int p) { return reinterpret_cast<NativeShorts>(function(p)); };
  return {each_part<Pairs>([&](int p) { return reinterpret_cast<NativeWords>((shorts(p) << 8) >> 8); }),
          each_part<Pairs>([&](int p) { return reinterpret_cast<NativeWords>(shorts(p) >> 8); })};
}
inline InputQuad splat_quad(const int8_t* from) {
  uint32_t quad;
  std::memcpy(&quad, from, sizeof quad);
  return widened([&](int) { return quad - NativeWords{}; });
}
inline WeightQuads signed_quads(const unsigned char* line) {
  const Words words = load_words(line);
  return widened([&](int p) { return words.part[p]; });
}
inline WeightQuads low_halves(const unsigned char* line) {
  const Words words = load_words(line);
  return widened([&](int p) { return words.part[p] & 0x0f0f0f0fu; });
}
inline WeightQuads high_halves(const unsigned char* line) {
  const Words words = load_words(line);
  return widened([&](int p) { return (words.part[p] >> 4) & 0x0f0f0f0fu; });
}
template <Weights>
inline Ints dot_quads(Ints sum, const WeightQuads& weights, const InputQuad& inputs) {
  return dot_int_pairs(dot_int_pairs(sum, weights.even, inputs.even), weights.odd, inputs.odd);
}

#endif
#endif

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
