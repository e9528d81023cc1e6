// Packed weights of any format as bf16, in the order in which products take them. Products of a value and its scale
// are exact in float32 (at most 24 bits), so that every level gives the same bf16 numbers, fused or not.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace memserve {
namespace MEMSERVE_LEVEL {
namespace {

// Of one step: per output a scale for inputs 0-15 and one for 16-31, and a minimum.
struct StepScales {
  Floats scales[2];
  Floats minima;
};

template <Format kFormat>
inline __attribute__((always_inline)) StepScales scales_of(const unsigned char* header, const unsigned char* step) {
  constexpr int kHalves = kGroupColumns * 2;  // bytes of one f16 per output
  if constexpr (kFormat == Format::kFour) {
    const Floats scales = load_f16(step);
    return {{scales, scales}, load_f16(step + kHalves)};
  } else if constexpr (kFormat == Format::kEight) {
    const Floats scales = load_f16(step);
    return {{scales, scales}, zeros()};
  } else if constexpr (kFormat == Format::kFourNested) {
    const Floats scales = multiply(load_f16(header), load_u8(step));
    return {{scales, scales}, multiply(load_f16(header + kHalves), load_u8(step + kGroupColumns))};
  } else {
    const Floats all = load_f16(header);
    return {{multiply(all, load_s8(step)), multiply(all, load_s8(step + kGroupColumns))}, zeros()};
  }
}

inline __attribute__((always_inline)) void expand_nibbles(const unsigned char* nibbles, const StepScales& scales,
                                                          Bf16* to) {
  const auto weight = [&](Words words, int input) {
    return multiply_add(low_nibbles(words, nibble_of(input, 0).nibble), scales.scales[0], scales.minima);
  };
#pragma GCC unroll 4
  for (int line = 0; line < 4; ++line) {
    const Words words = load_words(nibbles + 64 * line);
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair)
      store_bf16_pairs(to + (line * 4 + pair) * 2 * kGroupColumns, weight(words, 2 * pair), weight(words, 2 * pair + 1));
  }
}

inline __attribute__((always_inline)) void expand_bytes(const unsigned char* bytes, const StepScales& scales,
                                                        Bf16* to) {
#pragma GCC unroll 8
  for (int line = 0; line < 8; ++line) {
    const Words words = load_words(bytes + 64 * line);
    const Floats scale = scales.scales[line / 4];
#pragma GCC unroll 2
    for (int pair = 0; pair < 2; ++pair)
      store_bf16_pairs(to + (line * 2 + pair) * 2 * kGroupColumns, multiply(signed_bytes(words, 2 * pair), scale),
                       multiply(signed_bytes(words, 2 * pair + 1), scale));
  }
}

template <Format kFormat>
inline __attribute__((always_inline)) void expand_step(const unsigned char* header, const unsigned char* step,
                                                       Bf16* to) {
  const StepScales scales = scales_of<kFormat>(header, step);
  constexpr bool kNibbles = kFormat == Format::kFour || kFormat == Format::kFourNested;
  constexpr size_t kWeights = kNibbles ? kStepValues / 2 : kStepValues;
  const unsigned char* weights = step + step_bytes(kFormat) - kWeights;
  if constexpr (kNibbles)
    expand_nibbles(weights, scales, to);
  else
    expand_bytes(weights, scales, to);
}

// Steps `steps` of the column groups `groups`, group after group with `stride` elements between them.
// A single step means that more calls follow, so the same step of the next groups is fetched meanwhile: the
// hardware sees only short streams.
template <Format kFormat>
__attribute__((noinline)) void expand_format(const PackedMatrix& matrix, Range groups, Range steps, Bf16* to,
                                             size_t stride) {
  const bool fetches = steps.size() == 1;
  const size_t ahead = matrix.group_bytes() * static_cast<size_t>(groups.size());
  for (int group = groups.begin; group < groups.end; ++group) {
    Bf16* out = to + static_cast<size_t>(group - groups.begin) * stride;
    for (int step = steps.begin; step < steps.end; ++step, out += kStepValues) {
      const unsigned char* from = matrix.step(group, step);
      for (size_t line = 0; fetches && line < step_bytes(kFormat); line += 64)
        __builtin_prefetch(from + ahead + line, 0, 2);
      expand_step<kFormat>(matrix.header(group, step), from, out);
    }
  }
}

inline void expand_steps(const PackedMatrix& matrix, Range groups, Range steps, Bf16* to, size_t stride) {
  switch (matrix.format) {
    case Format::kFour: return expand_format<Format::kFour>(matrix, groups, steps, to, stride);
    case Format::kEight: return expand_format<Format::kEight>(matrix, groups, steps, to, stride);
    case Format::kFourNested: return expand_format<Format::kFourNested>(matrix, groups, steps, to, stride);
    case Format::kEightNested: return expand_format<Format::kEightNested>(matrix, groups, steps, to, stride);
    case Format::kBf16: break;
  }
  for (int group = groups.begin; group < groups.end; ++group)
    std::memcpy(to + static_cast<size_t>(group - groups.begin) * stride, matrix.step(group, steps.begin),
                static_cast<size_t>(steps.size()) * step_bytes(Format::kBf16));
}

void expand_group(const PackedMatrix& matrix, int group, Bf16* to) {
  expand_steps(matrix, {group, group + 1}, {0, matrix.steps()}, to, 0);
}

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
