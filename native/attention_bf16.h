// KV in bf16 as attention takes it: products of bf16 pairs, weights rounded to bf16.
#pragma once

#include "attention.h"

namespace memserve {
namespace MEMSERVE_LEVEL {
namespace {

struct Bf16Kv {
  using Stored = Bf16;
  using Sum = Floats;

  static void gather_queries(const Attention& job, const Scratch& s) {
    for (int v = 0; v < job.vectors(); ++v)
      std::memcpy(s.queries_of(v), query_of(job, v), static_cast<size_t>(job.heads.dim) * sizeof(Bf16));
  }

  static Stretch<Bf16> find_segment(const Attention& job, const Scratch& s, int index) {
    Stretch<Bf16> found = stretch_of<Bf16>(job, index, 0);
    const int last = job.last_position() / kBlockTokens - index * kSegmentBlocks;
    if (last < kSegmentBlocks) found.values.blocks[last] = cleaned_values(job, s, found.values.blocks[last]);
    return found;
  }

  // Scores of one vector become weights: zero beyond its first `tokens` tokens.
  static void weights_of_scores(const Attention& job, const Scratch& s, const Stretch<Bf16>& segment, int vector,
                                int tokens) {
    const float* scores = s.scores_of(vector);
    Bf16* weights = s.weights_of(vector);
    float* partial = s.segment_of(vector);
    const Floats scales = splat(job.scale);
    const Floats nothing = splat(kMinusInfinity);
    const int whole = tokens / kLanes16;
    Floats largest = nothing;
    for (int b = 0; b < whole; ++b) largest = larger(largest, load(scores + b * kLanes16));
    if (tokens % kLanes16 != 0)
      largest = larger(largest, first_lanes(load(scores + whole * kLanes16), tokens % kLanes16, nothing));
    const float top = largest_lane(largest) * job.scale;
    const Floats minus_top = splat(-top);
    Floats sum = zeros();
    for (int b = 0; b < segment.keys.count; ++b) {
      Floats exponent = multiply_add(load(scores + b * kLanes16), scales, minus_top);
      if (b >= whole) exponent = first_lanes(exponent, visible_lanes(tokens, b), nothing);
      const Floats weight = exp2(exponent);
      sum = add(sum, weight);
      store_bf16(weights + b * kLanes16, weight);
    }
    sum_of(partial) = sum_of_lanes(sum);
    largest_of(partial) = top;
  }

  static Sum no_sum() { return zeros(); }
  static Pairs load_stored(const Bf16* from) { return load_pairs(from); }
  static Sum dot(Sum sum, Pairs a, Pairs b) { return dot_pairs(sum, a, b); }
  static Floats score_of(Sum sum) { return sum; }
  static Floats values_of_sum(Sum sum, float*) { return sum; }

 private:
  // V of the block that holds the last row's position, without what lies beyond it: 0 * NaN is NaN.
  static const Bf16* cleaned_values(const Attention& job, const Scratch& s, const Bf16* block) {
    const int dim = job.heads.dim;
    const int tokens = job.last_position() % kBlockTokens + 1;
    const size_t row = 2 * static_cast<size_t>(dim);
    const size_t whole = static_cast<size_t>(tokens / 2) * row;
    std::memcpy(s.last_values, block, whole * sizeof(Bf16));
    std::memset(s.last_values + whole, 0, (kBlockTokens / 2 * row - whole) * sizeof(Bf16));
    if (tokens % 2 != 0)
      for (size_t i = 0; i < row; i += 2) s.last_values[whole + i] = block[whole + i];
    return s.last_values;
  }
};

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
