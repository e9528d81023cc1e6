// Paged causal attention that reads K and V in place, in the pool's blocks.
//
// Canonical order, per (row, head): the context is cut into segments of kSegmentTokens from position 0 on. A segment
// gives its largest score, the sum of exp2(score - largest), and the values weighted by those, rounded to bf16; the
// segments are merged in ascending order by one formula. A row alone, in a tile of rows, or with its segments spread
// over threads goes through the same steps. `Products` supplies the two dot products
// (attention_vectors.h or attention_tiles.h).
//
// Memory beyond a row's position may hold anything, NaN included. Scores there are replaced before use; of values, the
// last block is read through a copy with zeros beyond the last row's position, since 0 * NaN is NaN.
#pragma once

#include "gemm.h"
#include "kernels.h"
#include "simd.h"

namespace memserve {
namespace MEMSERVE_LEVEL {
namespace {

constexpr size_t kCacheLine = 64;

// What one thread needs while it attends, carved out of one piece of memory.
struct Scratch {
  Bf16* queries;   // [vectors][query_stride]
  float* scores;   // [vectors][kSegmentTokens]
  Bf16* weights;   // [vectors][kSegmentTokens]
  float* segment;  // [vectors][partial_size]
  float* merged;   // [vectors][partial_size]
  Bf16* last_values;  // [kBlockTokens / 2][dim][2]
  size_t bytes;
  int query_stride;

  Scratch(const Heads& heads, void* memory) : bytes(0) {
    // Tiles take 16 vectors at a time, hence the rounding up.
    const size_t vectors = static_cast<size_t>(kQueryRows) * heads.group();
    const size_t partial = static_cast<size_t>(heads.dim) + Attention::kLanesOfPartial;
    query_stride = ceil_divide(heads.dim, kDepthMultiple) * kDepthMultiple;
    queries = take<Bf16>(memory, vectors * query_stride);
    scores = take<float>(memory, vectors * kSegmentTokens);
    weights = take<Bf16>(memory, vectors * kSegmentTokens);
    segment = take<float>(memory, vectors * partial);
    merged = take<float>(memory, vectors * partial);
    last_values = take<Bf16>(memory, static_cast<size_t>(kBlockTokens) * heads.dim);
  }

 private:
  template <class Element>
  Element* take(void* memory, size_t count) {
    auto* at = reinterpret_cast<Element*>(reinterpret_cast<uintptr_t>(memory) + bytes);
    bytes += (count * sizeof(Element) + kCacheLine - 1) / kCacheLine * kCacheLine;
    return at;
  }
};

size_t attention_scratch(const Heads& heads) { return Scratch(heads, nullptr).bytes; }

// Layout of a partial result: sum at 0, largest at 1, values from kLanesOfPartial on.
inline float& sum_of(float* partial) { return partial[0]; }
inline float& largest_of(float* partial) { return partial[1]; }
inline float* values_of(float* partial) { return partial + Attention::kLanesOfPartial; }

// K or V pieces of one segment's blocks.
struct Pieces {
  const Bf16* blocks[kSegmentBlocks];
  int count;
};

// Scores of one vector become weights, in bf16: zero beyond its first `tokens` tokens.
inline void weights_of_scores(const float* scores, Bf16* weights, int tokens, int blocks, float scale, float* partial) {
  const Floats scales = splat(scale);
  const Floats nothing = splat(kMinusInfinity);
  const int whole = tokens / kLanes16;
  Floats largest = nothing;
  for (int b = 0; b < whole; ++b) largest = larger(largest, load(scores + b * kLanes16));
  if (tokens % kLanes16 != 0)
    largest = larger(largest, first_lanes(load(scores + whole * kLanes16), tokens % kLanes16, nothing));
  const float top = largest_lane(largest) * scale;
  const Floats minus_top = splat(-top);
  Floats sum = zeros();
  for (int b = 0; b < blocks; ++b) {
    Floats exponent = multiply_add(load(scores + b * kLanes16), scales, minus_top);
    if (b >= whole) exponent = first_lanes(exponent, tokens > b * kLanes16 ? tokens - b * kLanes16 : 0, nothing);
    const Floats weight = exp2(exponent);
    sum = add(sum, weight);
    store_bf16(weights + b * kLanes16, weight);
  }
  sum_of(partial) = sum_of_lanes(sum);
  largest_of(partial) = top;
}

inline void fill_weights_with_zeros(Bf16* weights, int blocks) {
  std::memset(weights, 0, sizeof(Bf16) * static_cast<size_t>(blocks) * kBlockTokens);
}

// merged = merged and segment together, both relative to the larger of their largest scores.
inline void merge(float* merged, float* segment, int dim) {
  const float before = largest_of(merged);
  const float added = largest_of(segment);
  const float top = before > added ? before : added;
  const Floats keep = exp2(splat(before - top));
  const Floats take = exp2(splat(added - top));
  sum_of(merged) = first_lane(multiply_add(splat(sum_of(segment)), take, multiply(splat(sum_of(merged)), keep)));
  largest_of(merged) = top;
  float* to = values_of(merged);
  const float* from = values_of(segment);
  for (int i = 0; i < dim; i += kLanes16)
    store(to + i, multiply_add(load(from + i), take, multiply(load(to + i), keep)));
}

// Merging the first segment into nothing multiplies zeros by 0 and the segment by exactly 1.
inline void start_merging(float* merged, int dim) {
  std::memset(merged, 0, sizeof(float) * (static_cast<size_t>(dim) + Attention::kLanesOfPartial));
  largest_of(merged) = kMinusInfinity;
}

inline void write_output(const Attention& job, int vector, float* merged) {
  const int group = job.heads.group();
  const int head = job.kv_head * group + vector % group;
  Bf16* out = job.output + static_cast<size_t>(vector / group) * job.output_stride + head * job.heads.dim;
  const Floats scale = splat(1.0f / sum_of(merged));
  for (int i = 0; i < job.heads.dim; i += kLanes16) store_bf16(out + i, multiply(load(values_of(merged) + i), scale));
}

inline void gather_queries(const Attention& job, const Scratch& s) {
  const int group = job.heads.group();
  const size_t dim = static_cast<size_t>(job.heads.dim);
  for (int v = 0; v < job.vectors(); ++v) {
    const Bf16* from = job.queries + static_cast<size_t>(v / group) * job.queries_stride +
                       static_cast<size_t>(job.kv_head * group + v % group) * dim;
    std::memcpy(s.queries + static_cast<size_t>(v) * s.query_stride, from, dim * sizeof(Bf16));
  }
}

// V of the block that holds the last row's position, without what lies beyond it.
inline const Bf16* cleaned_values(const Attention& job, const Scratch& s, const Bf16* block) {
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

struct SegmentPieces {
  Pieces keys;
  Pieces values;
};

inline SegmentPieces pieces_of(const Attention& job, const Scratch& s, int segment) {
  const int first = segment * kSegmentBlocks;
  const int last = job.last_position() / kBlockTokens;
  SegmentPieces pieces;
  pieces.keys.count = pieces.values.count = smaller(kSegmentBlocks, last + 1 - first);
  for (int b = 0; b < pieces.keys.count; ++b) {
    const uint64_t block = job.blocks[first + b];
    const Bf16* values = job.heads.values(block, job.kv_head);
    pieces.keys.blocks[b] = job.heads.keys(block, job.kv_head);
    pieces.values.blocks[b] = first + b == last ? cleaned_values(job, s, values) : values;
  }
  return pieces;
}

// Pool blocks are scattered, so the hardware cannot guess where the next piece lies.
inline void prefetch_pieces(const Pieces& pieces, size_t bytes) {
  for (int b = 0; b < pieces.count; ++b)
    for (size_t at = 0; at < bytes; at += kCacheLine)
      __builtin_prefetch(reinterpret_cast<const char*>(pieces.blocks[b]) + at, 0, 2);
}

// How many of a segment's tokens a vector may see.
inline int visible_tokens(const Attention& job, int vector, int segment) {
  const int position = job.first_position + vector / job.heads.group();
  const int seen = position + 1 - segment * kSegmentTokens;
  return seen < 0 ? 0 : smaller(seen, kSegmentTokens);
}

template <class Products>
void attend_segment(const Attention& job, const Scratch& s, int segment) {
  const SegmentPieces pieces = pieces_of(job, s, segment);
  const size_t partial = job.partial_size();
  prefetch_pieces(pieces.values, job.heads.head_bytes());
  Products::score(job, s, pieces.keys);
  for (int v = 0; v < job.vectors(); ++v) {
    const size_t at = static_cast<size_t>(v) * kSegmentTokens;
    const int tokens = visible_tokens(job, v, segment);
    if (tokens == 0)
      fill_weights_with_zeros(s.weights + at, pieces.keys.count);
    else
      weights_of_scores(s.scores + at, s.weights + at, tokens, pieces.keys.count, job.scale, s.segment + v * partial);
  }
  Products::weigh(job, s, pieces.values);
}

template <class Products>
void attend_and_output(const Attention& job, const Scratch& s) {
  const size_t partial = job.partial_size();
  for (int v = 0; v < job.vectors(); ++v) start_merging(s.merged + v * partial, job.heads.dim);
  for (int segment = 0; segment < job.all_segments(); ++segment) {
    attend_segment<Products>(job, s, segment);
    for (int v = 0; v < job.vectors(); ++v)
      if (visible_tokens(job, v, segment) > 0) merge(s.merged + v * partial, s.segment + v * partial, job.heads.dim);
  }
  for (int v = 0; v < job.vectors(); ++v) write_output(job, v, s.merged + v * partial);
}

template <class Products>
void attend_partially(const Attention& job, const Scratch& s) {
  const size_t size = job.partial_size() * job.vectors();
  for (int segment = job.segments.begin; segment < job.segments.end; ++segment) {
    attend_segment<Products>(job, s, segment);
    std::memcpy(job.partials + segment * size, s.segment, size * sizeof(float));
  }
}

template <class Products>
void attend(const Attention& job, void* memory) {
  const Scratch scratch(job.heads, memory);
  Products::begin();
  gather_queries(job, scratch);
  if (job.partials == nullptr)
    attend_and_output<Products>(job, scratch);
  else
    attend_partially<Products>(job, scratch);
  Products::end();
}

void merge_partials(const Attention& job, void* memory) {
  const Scratch scratch(job.heads, memory);
  const size_t partial = job.partial_size();
  const size_t size = partial * job.vectors();
  for (int v = 0; v < job.vectors(); ++v) {
    start_merging(scratch.merged, job.heads.dim);
    for (int segment = 0; segment < job.all_segments(); ++segment)
      if (visible_tokens(job, v, segment) > 0)
        merge(scratch.merged, job.partials + segment * size + v * partial, job.heads.dim);
    write_output(job, v, scratch.merged);
  }
}

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
