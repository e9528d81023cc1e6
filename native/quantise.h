// Inputs of integer products: 32 at a time in 8 bits, value = nearest(input * (127 / largest)), scale = largest / 127.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace memserve {
namespace MEMSERVE_LEVEL {
namespace {

constexpr uint16_t kSignless = 0x7fff;
constexpr uint16_t kBf16Infinity = 0x7f80;
constexpr uint16_t kNegligible = (127 - 100) << 7;  // 2^-100 in bf16; less than that has no finite 127 / largest

inline float float_of_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A group that has no values: `scale` 0, or NaN, which makes every output of the row NaN and of no other.
inline void put_constant_group(InputGroup& group, float scale) {
  std::memset(&group, 0, sizeof group);
  group.scale = scale;
  group.sum = scale;
}

constexpr int kHalfGroup = kDepthMultiple / 2;

// Sixteen values; returns their sum.
inline int32_t quantise_half(int8_t* values, const uint16_t* input, Floats inverse) {
  const Floats whole = nearest(multiply(load_bf16(input), inverse));
  store_int8(values, whole);
  return static_cast<int32_t>(sum_of_lanes(whole));
}

inline int16_t largest_of(const uint16_t* input) {
  int16_t largest = 0;
  for (int i = 0; i < kDepthMultiple; ++i) {
    const int16_t size = static_cast<int16_t>(input[i] & kSignless);
    largest = size > largest ? size : largest;
  }
  return largest;
}

inline void quantise_group(InputGroup& group, const uint16_t* input) {
  const int16_t largest = largest_of(input);
  if (largest >= kBf16Infinity) return put_constant_group(group, __builtin_nanf(""));
  if (largest < kNegligible) return put_constant_group(group, 0.0f);
  const float most = float_of_bf16(static_cast<uint16_t>(largest));
  const Floats inverse = splat(127.0f / most);
  const int32_t first = quantise_half(group.values, input, inverse);
  const int32_t second = quantise_half(group.values + kHalfGroup, input + kHalfGroup, inverse);
  group.scale = most / 127.0f;
  group.sum = group.scale * static_cast<float>(first + second);
  group.bias[0] = -128 * first;
  group.bias[1] = -128 * second;
}

void quantise(const Quantise& job) {
  for (int at = 0; at < job.depth; at += kDepthMultiple)
    quantise_group(job.groups[at / kDepthMultiple], job.input + at);
}

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
