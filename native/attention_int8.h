// KV in int8 as attention takes it. Queries and weights become int16 with one float each, K and V are widened while
// they are loaded, and sums are integers: exact, so that they are the same in any order and on every level. None can
// overflow: head dimensions and the tokens of a segment are at most 256, and 256 * 127 * 32767 < 2^31.
//
// A token's scale of K multiplies its score, that of V its weight, before weights become int16 relative to the largest
// of their segment. Integers beyond a row's position may be anything, since their weight is 0; scales there are
// replaced before use. A number that is not finite makes all NaN that attends to its token: see rows.h for K and V.
#pragma once

#include "attention.h"

namespace memserve {
namespace MEMSERVE_LEVEL {
namespace {

constexpr float kLargestInt16 = 32767.0f;

struct Int8Kv {
  using Stored = int8_t;
  using Sum = Ints;

  static void gather_queries(const Attention& job, const Scratch& s) {
    const int dim = job.heads.dim;
    for (int v = 0; v < job.vectors(); ++v) {
      const Bf16* query = query_of(job, v);
      Floats largest = zeros(), broken = zeros();
      for (int i = 0; i < dim; i += kLanes16) {
        const Floats x = load_bf16(query + i);
        largest = larger(largest, absolute(x));
        broken = multiply_add(x, zeros(), broken);
      }
      const float nan_or_zero = sum_of_lanes(broken);
      const float top = nan_or_zero == 0.0f ? largest_lane(largest) : 0.0f;
      const Floats steps = splat(steps_of(top));
      for (int i = 0; i < dim; i += kLanes16)
        store_int16(s.queries_of(v) + i, top > 0.0f ? multiply(load_bf16(query + i), steps) : zeros());
      s.query_units[v] = top / kLargestInt16 + nan_or_zero;
    }
  }

  struct Segment : Stretch<int8_t> {
    int sound;  // tokens before the first one with a broken scale
  };

  static Segment find_segment(const Attention& job, const Scratch&, int index) {
    Segment found{stretch_of<int8_t>(job, index, kScaleBytes), kSegmentTokens};
    const int tokens = smaller(job.last_position() + 1 - index * kSegmentTokens, kSegmentTokens);
    Floats broken = zeros();
    for (int b = 0; b < found.values.count; ++b)
      broken = multiply_add(first_lanes(value_scales(found, b), visible_lanes(tokens, b), zeros()), zeros(), broken);
    if (sum_of_lanes(broken) == 0.0f) return found;
    for (found.sound = 0; is_sound(found, found.sound); ++found.sound) {
    }
    return found;
  }

  // Scores of one vector become weights: zero beyond its first `tokens` tokens.
  static void weights_of_scores(const Attention& job, const Scratch& s, const Segment& segment, int vector,
                                int tokens) {
    float* scores = s.scores_of(vector);
    float* partial = s.segment_of(vector);
    const int blocks = segment.keys.count;
    const int whole = tokens / kLanes16;
    const float unit = s.query_units[vector] * job.scale;
    const float top = scale_scores(scores, segment, tokens) * unit;
    const Floats units = splat(unit), minus_top = splat(-top);
    Floats sum = zeros(), largest = zeros();
    const auto weigh = [&](int b, Floats exponent, Floats scales) {
      const Floats weight = exp2(exponent);
      const Floats scaled = multiply(weight, scales);
      sum = add(sum, weight);
      largest = larger(largest, scaled);
      store(scores + b * kLanes16, scaled);
    };
    const auto exponents = [&](int b) { return multiply_add(load(scores + b * kLanes16), units, minus_top); };
    for (int b = 0; b < whole; ++b) weigh(b, exponents(b), value_scales(segment, b));
    for (int b = whole; b < blocks; ++b) {
      const int lanes = visible_lanes(tokens, b);
      weigh(b, first_lanes(exponents(b), lanes, splat(kMinusInfinity)),
            first_lanes(value_scales(segment, b), lanes, zeros()));
    }
    sum_of(partial) = sum_of_lanes(sum);
    largest_of(partial) = top;
    const bool sound = tokens <= segment.sound;
    const float most = largest_lane(largest);
    unit_of(partial) = sound ? most / kLargestInt16 : __builtin_nanf("");
    const Floats steps = splat(steps_of(most));
    for (int b = 0; b < blocks; ++b)
      store_int16(s.weights_of(vector) + b * kLanes16, sound ? multiply(load(scores + b * kLanes16), steps) : zeros());
  }

  static Sum no_sum() { return no_ints(); }
  static Pairs load_stored(const int8_t* from) { return load_byte_pairs(from); }
  static Sum dot(Sum sum, Pairs a, Pairs b) { return dot_int_pairs(sum, a, b); }
  static Floats score_of(Sum sum) { return floats_of(sum); }
  static Floats values_of_sum(Sum sum, float* partial) { return multiply(floats_of(sum), splat(unit_of(partial))); }

 private:
  // What multiplies numbers of up to `largest` to fill int16.
  static float steps_of(float largest) { return largest >= 0x1p-100f ? kLargestInt16 / largest : 0.0f; }

  static Floats scales_of(const int8_t* values) { return load(reinterpret_cast<const float*>(values - kScaleBytes)); }
  static Floats value_scales(const Segment& segment, int block) { return scales_of(segment.values.blocks[block]); }

  static bool is_sound(const Segment& segment, int token) {
    float scales[kLanes16];
    store(scales, value_scales(segment, token / kBlockTokens));
    return scales[token % kBlockTokens] * 0.0f == 0.0f;
  }

  // Scores get the scales of their tokens; returns the largest.
  static float scale_scores(float* scores, const Segment& segment, int tokens) {
    const Floats nothing = splat(kMinusInfinity);
    Floats largest = nothing;
    const auto scale = [&](int b) {
      const Floats score = multiply(load(scores + b * kLanes16), scales_of(segment.keys.blocks[b]));
      store(scores + b * kLanes16, score);
      return score;
    };
    const int whole = tokens / kLanes16;
    for (int b = 0; b < whole; ++b) largest = larger(largest, scale(b));
    if (tokens % kLanes16 != 0) largest = larger(largest, first_lanes(scale(whole), tokens % kLanes16, nothing));
    return largest_lane(largest);
  }
};

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
