// The two products of attention in vector registers: the same register blocks as matrix products, with K blocks or
// value columns in place of column groups.
#pragma once

#include "attention.h"
#include "gemm.h"

namespace memserve {
namespace MEMSERVE_LEVEL {
namespace {

// Dot products in vector registers. Vectors are (row, head) pairs, all heads of a group share each load.
struct VectorProducts {
  static void begin() {}
  static void end() {}

  template <int kVectors, int kBlocks>
  static __attribute__((noinline)) void score_block(const Scratch& s, int vector, const Pieces& keys, int block,
                                                    int dim) {
    const Bf16* columns[kBlocks];
    for (int c = 0; c < kBlocks; ++c) columns[c] = keys.blocks[block + c];
    Sums<kVectors, kBlocks> sums;
    clear<kVectors, kBlocks>(sums);
    Prefetch nothing(nullptr, 0, 1);
    const Bf16* queries = s.queries + static_cast<size_t>(vector) * s.query_stride;
    multiply_block<kVectors, kBlocks>(sums, queries, s.query_stride, columns, dim / 2, nothing);
    for (int v = 0; v < kVectors; ++v)
      for (int c = 0; c < kBlocks; ++c)
        store(s.scores + static_cast<size_t>(vector + v) * kSegmentTokens + (block + c) * kBlockTokens, sums[v][c]);
  }

  template <int kVectors>
  static void score_vectors(const Scratch& s, int vector, const Pieces& keys, int dim) {
    constexpr int kRoom = kMaxSums / kVectors;
    constexpr int kWide = kRoom >= 8 ? 8 : kRoom >= 4 ? 4 : kRoom >= 2 ? 2 : 1;
    int block = 0;
    for (; block + kWide <= keys.count; block += kWide) score_block<kVectors, kWide>(s, vector, keys, block, dim);
    for (; block < keys.count; ++block) score_block<kVectors, 1>(s, vector, keys, block, dim);
  }

  template <int kVectors, int kColumns>
  static __attribute__((noinline)) void weigh_block(const Scratch& s, int vector, const Pieces& values, int column,
                                                    int dim, size_t partial) {
    Sums<kVectors, kColumns> sums;
    clear<kVectors, kColumns>(sums);
    const Bf16* weights = s.weights + static_cast<size_t>(vector) * kSegmentTokens;
    for (int b = 0; b < values.count; ++b, weights += kBlockTokens) {
      const Bf16* columns[kColumns];
      for (int c = 0; c < kColumns; ++c) columns[c] = values.blocks[b] + (column + c) * 2 * kLanes16;
#pragma GCC unroll 32
      for (int pair = 0; pair < kBlockTokens / 2; ++pair)
        take_pair<kVectors, kColumns>(sums, weights + 2 * pair, kSegmentTokens, columns,
                                      static_cast<size_t>(pair) * dim * 2);
    }
    for (int v = 0; v < kVectors; ++v)
      for (int c = 0; c < kColumns; ++c)
        store(values_of(s.segment + static_cast<size_t>(vector + v) * partial) + (column + c) * kLanes16, sums[v][c]);
  }

  template <int kVectors>
  static void weigh_vectors(const Scratch& s, int vector, const Pieces& values, int dim, size_t partial) {
    constexpr int kRoom = kMaxSums / kVectors;
    constexpr int kWide = kRoom >= 4 ? 4 : kRoom >= 2 ? 2 : 1;
    const int columns = dim / kLanes16;
    int column = 0;
    for (; column + kWide <= columns; column += kWide)
      weigh_block<kVectors, kWide>(s, vector, values, column, dim, partial);
    for (; column < columns; ++column) weigh_block<kVectors, 1>(s, vector, values, column, dim, partial);
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
    const Pieces& keys;
    int dim;
    template <int kVectors>
    void operator()(int vector) const {
      score_vectors<kVectors>(s, vector, keys, dim);
    }
  };

  struct Weigh {
    const Scratch& s;
    const Pieces& values;
    int dim;
    size_t partial;
    template <int kVectors>
    void operator()(int vector) const {
      weigh_vectors<kVectors>(s, vector, values, dim, partial);
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

  static void score(const Attention& job, const Scratch& s, const Pieces& keys) {
    for_all_vectors(job.vectors(), Score{s, keys, job.heads.dim});
  }

  static void weigh(const Attention& job, const Scratch& s, const Pieces& values) {
    for_all_vectors(job.vectors(), Weigh{s, values, job.heads.dim, job.partial_size()});
  }
};

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
