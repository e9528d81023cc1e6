// The two products of attention in vector registers: register blocks as of matrix products, with K blocks or value
// columns in place of column groups, for KV of any format.
#pragma once

#include "attention_bf16.h"
#include "attention_int8.h"

namespace memserve {
namespace MEMSERVE_LEVEL {
namespace {

// Dot products in vector registers. Vectors are (row, head) pairs, all heads of a group share each load.
template <class Format>
struct VectorProducts {
  using Kv = Format;
  using Stored = typename Kv::Stored;

  static void begin() {}
  static void end() {}

  template <int kVectors, int kColumns>
  using Sums = typename Kv::Sum[kVectors][kColumns];

  template <int kVectors, int kColumns>
  static inline __attribute__((always_inline)) void clear(Sums<kVectors, kColumns>& sums) {
#pragma GCC unroll 32
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 32
      for (int c = 0; c < kColumns; ++c) sums[v][c] = Kv::no_sum();
  }

  // sums[v][c] += one pair of vector v * the pairs of sixteen outputs at columns[c].
  template <int kVectors, int kColumns>
  static inline __attribute__((always_inline)) void take_pair(Sums<kVectors, kColumns>& sums, const uint16_t* vector,
                                                              size_t stride, const Stored* const (&columns)[kColumns],
                                                              size_t offset) {
    Pairs stored[kColumns];
#pragma GCC unroll 32
    for (int c = 0; c < kColumns; ++c) stored[c] = Kv::load_stored(columns[c] + offset);
#pragma GCC unroll 32
    for (int v = 0; v < kVectors; ++v) {
      const Pairs inputs = splat_pair(vector + static_cast<size_t>(v) * stride);
#pragma GCC unroll 32
      for (int c = 0; c < kColumns; ++c) sums[v][c] = Kv::dot(sums[v][c], inputs, stored[c]);
    }
  }

  template <int kVectors, int kBlocks>
  static __attribute__((noinline)) void score_block(const Scratch& s, int vector, const Pieces<Stored>& keys,
                                                    int block, int dim) {
    const Stored* columns[kBlocks];
    for (int c = 0; c < kBlocks; ++c) columns[c] = keys.blocks[block + c];
    Sums<kVectors, kBlocks> sums;
    clear<kVectors, kBlocks>(sums);
    const uint16_t* queries = s.queries_of(vector);
    for (int pair = 0; pair < dim / 2; pair += kChunkPairs)
#pragma GCC unroll 4
      for (int i = 0; i < kChunkPairs; ++i)
        take_pair<kVectors, kBlocks>(sums, queries + 2 * (pair + i), s.query_stride, columns,
                                     static_cast<size_t>(pair + i) * 2 * kBlockTokens);
#pragma GCC unroll 32
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 32
      for (int c = 0; c < kBlocks; ++c)
        store(s.scores_of(vector + v) + (block + c) * kBlockTokens, Kv::score_of(sums[v][c]));
  }

  template <int kVectors>
  static void score_vectors(const Scratch& s, int vector, const Pieces<Stored>& keys, int dim) {
    constexpr int kRoom = kMaxSums / kVectors;
    constexpr int kWide = kRoom >= 8 ? 8 : kRoom >= 4 ? 4 : kRoom >= 2 ? 2 : 1;
    int block = 0;
    for (; block + kWide <= keys.count; block += kWide) score_block<kVectors, kWide>(s, vector, keys, block, dim);
    for (; block < keys.count; ++block) score_block<kVectors, 1>(s, vector, keys, block, dim);
  }

  template <int kVectors, int kColumns>
  static __attribute__((noinline)) void weigh_block(const Scratch& s, int vector, const Pieces<Stored>& values,
                                                    int column, int dim) {
    Sums<kVectors, kColumns> sums;
    clear<kVectors, kColumns>(sums);
    const uint16_t* weights = s.weights_of(vector);
    for (int b = 0; b < values.count; ++b, weights += kBlockTokens) {
      const Stored* columns[kColumns];
      for (int c = 0; c < kColumns; ++c) columns[c] = values.blocks[b] + (column + c) * 2 * kLanes16;
#pragma GCC unroll 32
      for (int pair = 0; pair < kBlockTokens / 2; ++pair)
        take_pair<kVectors, kColumns>(sums, weights + 2 * pair, kSegmentTokens, columns,
                                      static_cast<size_t>(pair) * dim * 2);
    }
#pragma GCC unroll 32
    for (int v = 0; v < kVectors; ++v) {
      float* partial = s.segment_of(vector + v);
#pragma GCC unroll 32
      for (int c = 0; c < kColumns; ++c)
        store(values_of(partial) + (column + c) * kLanes16, Kv::values_of_sum(sums[v][c], partial));
    }
  }

  template <int kVectors>
  static void weigh_vectors(const Scratch& s, int vector, const Pieces<Stored>& values, int dim) {
    constexpr int kRoom = kMaxSums / kVectors;
    constexpr int kWide = kRoom >= 4 ? 4 : kRoom >= 2 ? 2 : 1;
    const int columns = dim / kLanes16;
    int column = 0;
    for (; column + kWide <= columns; column += kWide)
      weigh_block<kVectors, kWide>(s, vector, values, column, dim);
    for (; column < columns; ++column) weigh_block<kVectors, 1>(s, vector, values, column, dim);
  }

  template <int kVectors, class Take>
  static void choose(int vector, int count, Take take) {
    if constexpr (kVectors == 1) {
      take.template operator()<1>(vector);
    } else {
      if (count == kVectors) return take.template operator()<kVectors>(vector);
      choose<kVectors - 1>(vector, count, take);
    }
  }

  struct Score {
    const Scratch& s;
    const Pieces<Stored>& keys;
    int dim;
    template <int kVectors>
    void operator()(int vector) const {
      score_vectors<kVectors>(s, vector, keys, dim);
    }
  };

  struct Weigh {
    const Scratch& s;
    const Pieces<Stored>& values;
    int dim;
    template <int kVectors>
    void operator()(int vector) const {
      weigh_vectors<kVectors>(s, vector, values, dim);
    }
  };

  template <class Take>
  static void for_all_vectors(int vectors, Take take) {
    const int tiles = ceil_divide(vectors, kMostRows);
    for (int tile = 0; tile < tiles; ++tile) {
      const int begin = vectors * tile / tiles;
      choose<kMostRows>(begin, vectors * (tile + 1) / tiles - begin, take);
    }
  }

  static void score(const Attention& job, const Scratch& s, const Pieces<Stored>& keys) {
    for_all_vectors(job.vectors(), Score{s, keys, job.heads.dim});
  }

  static void weigh(const Attention& job, const Scratch& s, const Pieces<Stored>& values) {
    for_all_vectors(job.vectors(), Weigh{s, values, job.heads.dim});
  }
};

void attend_in_vectors(const Attention& job, void* memory) {
  if (job.heads.format == KvFormat::kInt8)
    attend<VectorProducts<Int8Kv>>(job, memory);
  else
    attend<VectorProducts<Bf16Kv>>(job, memory);
}

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
