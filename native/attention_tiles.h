// The two products of attention in tile registers: sixteen vectors at a time, K and V tiles straight from the pool.
#pragma once

#include "attention_vectors.h"
#include "gemm_tiles.h"
#include "tile.h"

namespace memserve {
namespace MEMSERVE_LEVEL {
namespace {

// Needs a head dimension that is a multiple of 32, so that no K tile reaches into the next head.
struct TileProducts {
  using Kv = Bf16Kv;

  static void begin() { begin_tiles(); }
  static void end() { end_tiles(); }

  template <int kBlocks>
  static void score_blocks(const Scratch& s, int vector, const Pieces<Bf16>& keys, int block, int dim) {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
    for (int d = 0; d < dim; d += 2 * kTileRows) {
      const Bf16* queries = s.queries + static_cast<size_t>(vector) * s.query_stride + d;
      load_tile<kInputTile>(queries, s.query_stride * sizeof(Bf16));
      take_key_tile<kBlocks, 0>(keys, block, d);
    }
    store_scores<kBlocks, 0>(s.scores + static_cast<size_t>(vector) * kSegmentTokens + block * kBlockTokens);
  }

  static void score(const Attention& job, const Scratch& s, const Pieces<Bf16>& keys) {
    for (int vector = 0; vector < job.vectors(); vector += kTileRows) {
      int block = 0;
      for (; block + 4 <= keys.count; block += 4) score_blocks<4>(s, vector, keys, block, job.heads.dim);
      for (; block < keys.count; ++block) score_blocks<1>(s, vector, keys, block, job.heads.dim);
    }
  }

  template <int kColumns>
  static void weigh_columns(const Scratch& s, int vector, const Pieces<Bf16>& values, int column, int dim, size_t partial) {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
    for (int b = 0; b < values.count; ++b) {
      load_tile<kHalfInputTile>(s.weights + static_cast<size_t>(vector) * kSegmentTokens + b * kBlockTokens,
                                kSegmentTokens * sizeof(Bf16));
      take_value_tile<kColumns, 0>(values.blocks[b] + column * 2 * kGroupColumns, dim);
    }
    store_values<kColumns, 0>(values_of(s.segment + vector * partial) + column * kGroupColumns, partial);
  }

  static void weigh(const Attention& job, const Scratch& s, const Pieces<Bf16>& values) {
    const int columns = job.heads.dim / kGroupColumns;
    for (int vector = 0; vector < job.vectors(); vector += kTileRows) {
      int column = 0;
      for (; column + 4 <= columns; column += 4)
        weigh_columns<4>(s, vector, values, column, job.heads.dim, job.partial_size());
      for (; column < columns; ++column)
        weigh_columns<1>(s, vector, values, column, job.heads.dim, job.partial_size());
    }
  }

 private:
  template <int kBlocks, int kIndex>
  static void take_key_tile(const Pieces<Bf16>& keys, int block, int d) {
    if constexpr (kIndex < kBlocks) {
      load_tile<kWeightTile>(keys.blocks[block + kIndex] + static_cast<size_t>(d) * kBlockTokens, 64);
      dot_tiles<kSumTile + kIndex, kInputTile, kWeightTile>();
      take_key_tile<kBlocks, kIndex + 1>(keys, block, d);
    }
  }

  template <int kBlocks, int kIndex>
  static void store_scores(float* scores) {
    if constexpr (kIndex < kBlocks) {
      store_tile<kSumTile + kIndex>(scores + kIndex * kBlockTokens, kSegmentTokens * sizeof(float));
      store_scores<kBlocks, kIndex + 1>(scores);
    }
  }

  template <int kColumns, int kIndex>
  static void take_value_tile(const Bf16* values, int dim) {
    if constexpr (kIndex < kColumns) {
      load_tile<kHalfWeightTile>(values + kIndex * 2 * kGroupColumns, static_cast<size_t>(dim) * 2 * sizeof(Bf16));
      dot_tiles<kSumTile + kIndex, kHalfInputTile, kHalfWeightTile>();
      take_value_tile<kColumns, kIndex + 1>(values, dim);
    }
  }

  template <int kColumns, int kIndex>
  static void store_values(float* values, size_t stride) {
    if constexpr (kIndex < kColumns) {
      store_tile<kSumTile + kIndex>(values + kIndex * kGroupColumns, stride * sizeof(float));
      store_values<kColumns, kIndex + 1>(values, stride);
    }
  }
};

// Tiles would have to multiply int8 by two bytes of each int16, and to put the sums together again.
void attend_in_tiles(const Attention& job, void* memory) {
  if (job.heads.format == KvFormat::kBf16 && job.heads.dim % kTileDepth == 0)
    attend<TileProducts>(job, memory);
  else
    attend_in_vectors(job, memory);
}

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
