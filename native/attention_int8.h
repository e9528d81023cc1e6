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

  static Segment<int8_t> find_segment(const Attention& job, const Scratch&, int index) {
    return segment_of<int8_t>(job, index, kScaleBytes);
  }

  // Scores of one vector become weights: zero beyond its first `tokens` tokens.
  static void weights_of_scores(const Attention& job, const Scratch& s, const Segment<int8_t>& segment, int vector,
                                int tokens) {
    float* scores = s.scores_of(vector);
    float* partial = s.segment_of(vector);
    const int blocks = segment.keys.count;
    const float top = scale_scores(scores, segment.keys, tokens, s.query_units[vector] * job.scale);
    const Floats tops = splat(top);
    Floats sum = zeros(), weighted = zeros(), largest = zeros();
    for (int b = 0; b < blocks; ++b) {
      const int lanes = visible_lanes(tokens, b);
      float* at = scores + b * kLanes16;
      const Floats weight = exp2(first_lanes(subtract(load(at), tops), lanes, splat(kMinusInfinity)));
      const Floats scaled = multiply(weight, first_lanes(load(scales_of(segment.values.blocks[b])), lanes, zeros()));
      sum = add(sum, weight);
      weighted = add(weighted, scaled);
      largest = larger(largest, scaled);
      store(at, scaled);
    }
    sum_of(partial) = sum_of_lanes(sum);
    largest_of(partial) = top;
    const bool finite = sum_of_lanes(weighted) * 0.0f == 0.0f;
    const float most = finite ? largest_lane(largest) : 0.0f;
    unit_of(partial) = finite ? most / kLargestInt16 : __builtin_nanf("");
    const Floats steps = splat(steps_of(most));
    for (int b = 0; b < blocks; ++b)
      store_int16(s.weights_of(vector) + b * kLanes16, finite ? multiply(load(scores + b * kLanes16), steps) : zeros());
  }

  static Sum no_sum() { return no_ints(); }
  static Pairs load_stored(const int8_t* from) { return load_byte_pairs(from); }
  static Sum dot(Sum sum, Pairs a, Pairs b) { return dot_int_pairs(sum, a, b); }
  static Floats score_of(Sum sum) { return floats_of(sum); }
  static Floats values_of_sum(Sum sum, float* partial) { return multiply(floats_of(sum), splat(unit_of(partial))); }

 private:
  // What multiplies numbers of up to `largest` to fill int16.
  static float steps_of(float largest) { return largest >= 0x1p-100f ? kLargestInt16 / largest : 0.0f; }

  static const float* scales_of(const int8_t* values) {
    return reinterpret_cast<const float*>(values - kScaleBytes);
  }

  // Sums of integers become scores; returns the largest.
  static float scale_scores(float* scores, const Pieces<int8_t>& keys, int tokens, float unit) {
    const Floats units = splat(unit);
    const Floats nothing = splat(kMinusInfinity);
    Floats largest = nothing;
    for (int b = 0; b * kLanes16 < tokens; ++b) {
      float* at = scores + b * kLanes16;
      const Floats score = multiply(load(at), multiply(load(scales_of(keys.blocks[b])), units));
      store(at, score);
      largest = larger(largest, first_lanes(score, visible_lanes(tokens, b), nothing));
    }
    return largest_lane(largest);
  }
};

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
