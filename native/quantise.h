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

inline void quantise_group(InputGroup& group, const uint16_t* input) {
  int16_t largest = 0;
  for (int i = 0; i < kDepthMultiple; ++i) {
    const int16_t size = static_cast<int16_t>(input[i] & kSignless);
    largest = size > largest ? size : largest;
  }
  if (largest >= kBf16Infinity) return put_constant_group(group, __builtin_nanf(""));
  if (largest < kNegligible) return put_constant_group(group, 0.0f);
  const float most = float_of_bf16(static_cast<uint16_t>(largest));
  const float inverse = 127.0f / most;
  int32_t sums[2] = {0, 0};
  for (int i = 0; i < kDepthMultiple; ++i) {
    // Adding 1.5 * 2^23 rounds to the nearest whole number, ties to even, which are then the lowest bits.
    constexpr float kWhole = 12582912.0f;
    constexpr int32_t kWholeBits = 0x4b400000;
    const float shifted = float_of_bf16(input[i]) * inverse + kWhole;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    group.values[i] = static_cast<int8_t>(bits - kWholeBits);
    sums[i / (kDepthMultiple / 2)] += bits - kWholeBits;
  }
  group.scale = most / 127.0f;
  group.sum = group.scale * static_cast<float>(sums[0] + sums[1]);
  group.bias[0] = -128 * sums[0];
  group.bias[1] = -128 * sums[1];
}

void quantise(const Quantise& job) {
  for (int at = 0; at < job.depth; at += kDepthMultiple)
    quantise_group(job.groups[at / kDepthMultiple], job.input + at);
}

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
