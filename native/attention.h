// Paged causal attention that reads K and V in place, in the pool's blocks.
//
// Canonical order, per (row, head): the context is cut into segments of kSegmentTokens from position 0 on. A segment
// gives its largest score, the sum of exp2(score - largest), and the values weighted by those, rounded to 16 bits; the
// segments are merged in ascending order by one formula. A row alone, in a tile of rows, or with its segments spread
// over threads goes through the same steps. `Products` supplies the two dot products (attention_vectors.h or
// attention_tiles.h), and its `Kv` what the format of KV asks for (attention_bf16.h or attention_int8.h).
//
// Memory beyond a row's position may hold anything, NaN included, and is never used: scores there are replaced, and a
// format sees to its values.
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
  uint16_t* queries;   // [vectors][query_stride]; bf16 or int16, as the format multiplies
  float* query_units;  // [vectors]; of int16
  float* scores;       // [vectors][kSegmentTokens]
  uint16_t* weights;   // [vectors][kSegmentTokens]; like queries
  float* segment;  // [vectors][partial_size]
  float* merged;   // [vectors][partial_size]
  Bf16* last_values;  // [kBlockTokens / 2][dim][2]
  size_t bytes;
  size_t partial_size;
  int query_stride;

  Scratch(const Heads& heads, void* memory) : bytes(0) {
    // Tiles take 16 vectors at a time, hence the rounding up.
    const size_t vectors = static_cast<size_t>(kQueryRows) * heads.group();
    const size_t partial = static_cast<size_t>(heads.dim) + Attention::kLanesOfPartial;
    query_stride = ceil_divide(heads.dim, kDepthMultiple) * kDepthMultiple;
    queries = take<uint16_t>(memory, vectors * query_stride);
    query_units = take<float>(memory, vectors);
    scores = take<float>(memory, vectors * kSegmentTokens);
    weights = take<uint16_t>(memory, vectors * kSegmentTokens);
    segment = take<float>(memory, vectors * partial);
    merged = take<float>(memory, vectors * partial);
    last_values = take<Bf16>(memory, static_cast<size_t>(kBlockTokens) * heads.dim);
    partial_size = partial;
  }

  uint16_t* queries_of(int vector) const { return queries + static_cast<size_t>(vector) * query_stride; }
  float* scores_of(int vector) const { return scores + static_cast<size_t>(vector) * kSegmentTokens; }
  uint16_t* weights_of(int vector) const { return weights + static_cast<size_t>(vector) * kSegmentTokens; }
  float* segment_of(int vector) const { return segment + static_cast<size_t>(vector) * partial_size; }

 private:
  template <class Element>
  Element* take(void* memory, size_t count) {
    auto* at = reinterpret_cast<Element*>(reinterpret_cast<uintptr_t>(memory) + bytes);
    bytes += (count * sizeof(Element) + kCacheLine - 1) / kCacheLine * kCacheLine;
    return at;
  }
};

size_t attention_scratch(const Heads& heads) { return Scratch(heads, nullptr).bytes; }

// Layout of a partial result: sum at 0, largest at 1, what an integer weight stands for at 2, values from
// kLanesOfPartial on.
inline float& sum_of(float* partial) { return partial[0]; }
inline float& largest_of(float* partial) { return partial[1]; }
inline float& unit_of(float* partial) { return partial[2]; }
inline float* values_of(float* partial) { return partial + Attention::kLanesOfPartial; }

// Stored K or V of one head in the blocks of a segment.
template <class Stored>
struct Pieces {
  const Stored* blocks[kSegmentBlocks];
  int count;
};

template <class Stored>
struct Stretch {
  Pieces<Stored> keys;
  Pieces<Stored> values;
};

// `skip`: bytes in front of a head's values.
template <class Stored>
inline Stretch<Stored> stretch_of(const Attention& job, int index, size_t skip) {
  const int first = index * kSegmentBlocks;
  const int last = job.last_position() / kBlockTokens;
  Stretch<Stored> found;
  found.keys.count = found.values.count = smaller(kSegmentBlocks, last + 1 - first);
  for (int b = 0; b < found.keys.count; ++b) {
    const uint64_t block = job.blocks[first + b];
    found.keys.blocks[b] = reinterpret_cast<const Stored*>(job.heads.keys(block, job.kv_head) + skip);
    found.values.blocks[b] = reinterpret_cast<const Stored*>(job.heads.values(block, job.kv_head) + skip);
  }
  return found;
}

// How many tokens of a segment's block are among its first `tokens`; not limited to the block's own.
inline int visible_lanes(int tokens, int block) {
  const int left = tokens - block * kBlockTokens;
  return left < 0 ? 0 : left;
}

inline void fill_weights_with_zeros(uint16_t* weights, int blocks) {
  std::memset(weights, 0, sizeof(uint16_t) * static_cast<size_t>(blocks) * kBlockTokens);
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

inline const Bf16* query_of(const Attention& job, int vector) {
  const int group = job.heads.group();
  return job.queries + static_cast<size_t>(vector / group) * job.queries_stride +
         static_cast<size_t>(job.kv_head * group + vector % group) * static_cast<size_t>(job.heads.dim);
}

// Pool blocks are scattered, so the hardware cannot guess where the next piece lies.
inline void prefetch_values(const Attention& job, int segment, int blocks) {
  for (int b = 0; b < blocks; ++b) {
    const unsigned char* values = job.heads.values(job.blocks[segment * kSegmentBlocks + b], job.kv_head);
    for (size_t at = 0; at < job.heads.head_bytes(); at += kCacheLine) __builtin_prefetch(values + at, 0, 2);
  }
}

// How many of a segment's tokens a vector may see.
inline int visible_tokens(const Attention& job, int vector, int segment) {
  const int position = job.first_position + vector / job.heads.group();
  const int seen = position + 1 - segment * kSegmentTokens;
  return seen < 0 ? 0 : smaller(seen, kSegmentTokens);
}

template <class Products>
void attend_segment(const Attention& job, const Scratch& s, int index) {
  using Kv = typename Products::Kv;
  const auto segment = Kv::find_segment(job, s, index);
  prefetch_values(job, index, segment.values.count);
  Products::score(job, s, segment.keys);
  for (int v = 0; v < job.vectors(); ++v) {
    const int tokens = visible_tokens(job, v, index);
    if (tokens == 0)
      fill_weights_with_zeros(s.weights_of(v), segment.keys.count);
    else
      Kv::weights_of_scores(job, s, segment, v, tokens);
  }
  Products::weigh(job, s, segment.values);
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
  Products::Kv::gather_queries(job, scratch);
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
