// Matrix products in tile registers. All rows, prefill and decode, go through tiles: a tile's row does not see the
// others, and every output takes its inputs 32 at a time in order, so the result does not depend on the batch.
#pragma once

#include "gemm.h"
#include "kernels.h"
#include "tile.h"

namespace memserve {
namespace MEMSERVE_LEVEL {
namespace {

constexpr int kTileDepth = 32;
constexpr int kTileColumns = 4;  // column groups of a row of tiles: 1 x 4 for few rows, 2 x 2 for many
constexpr size_t kSumsStride = kTileColumns * kGroupColumns;

struct TileSums {
  alignas(64) float rows[2 * kTileRows][kSumsStride];
};

// Tile r * kWide + c holds the sums of row tile r and column group c.
template <int kTall, int kWide>
inline void take_tile_step(const Matmul& job, const Bf16* input, const Panel& panel, int step) {
  const Bf16* weights = panel.values + static_cast<size_t>(step) * kStepValues;
  const size_t group_size = panel.stride;
  const size_t row_bytes = job.input_stride * sizeof(Bf16);
  load_tile<kInputTile>(input, row_bytes);
  load_tile<kWeightTile>(weights, 64);
  dot_tiles<kSumTile, kInputTile, kWeightTile>();
  if constexpr (kTall == 2) {
    load_tile<kInputTile>(input + kTileRows * job.input_stride, row_bytes);
    dot_tiles<kSumTile + kWide, kInputTile, kWeightTile>();
  }
  if constexpr (kTall == 2 && kWide == 2) {
    load_tile<kWeightTile>(weights + group_size, 64);
    dot_tiles<kSumTile + 3, kInputTile, kWeightTile>();
    load_tile<kInputTile>(input, row_bytes);
    dot_tiles<kSumTile + 1, kInputTile, kWeightTile>();
  }
  if constexpr (kTall == 1 && kWide >= 2) {
    load_tile<kWeightTile>(weights + group_size, 64);
    dot_tiles<kSumTile + 1, kInputTile, kWeightTile>();
  }
  if constexpr (kTall == 1 && kWide == 4) {
    load_tile<kWeightTile>(weights + 2 * group_size, 64);
    dot_tiles<kSumTile + 2, kInputTile, kWeightTile>();
    load_tile<kWeightTile>(weights + 3 * group_size, 64);
    dot_tiles<kSumTile + 3, kInputTile, kWeightTile>();
  }
}

template <int kTall, int kWide, int kIndex>
inline void store_sums(TileSums& sums) {
  if constexpr (kIndex < kTall * kWide) {
    float* to = &sums.rows[kIndex / kWide * kTileRows][kIndex % kWide * kGroupColumns];
    store_tile<kSumTile + kIndex>(to, kSumsStride * sizeof(float));
    store_sums<kTall, kWide, kIndex + 1>(sums);
  }
}

inline void emit_tile_row(const Matmul& job, int row, int group, int width, const float* sums) {
  if (job.output == Output::kGate)
    for (int c = 0; c < width; c += 2)
      emit_gated(job, row, group + c, load(sums + c * kGroupColumns), load(sums + (c + 1) * kGroupColumns));
  else
    for (int c = 0; c < width; ++c) emit_floats(job, row, group + c, load(sums + c * kGroupColumns));
}

template <int kTall, int kWide>
void multiply_tiles(const Matmul& job, int row, int rows, int group, const Panel& panel, Prefetch& prefetch) {
  zero_tile<0>();
  zero_tile<1>();
  zero_tile<2>();
  zero_tile<3>();
  const Bf16* input = job.input + static_cast<size_t>(row) * job.input_stride;
  for (int step = 0; step < job.weights.depth / kTileDepth; ++step) {
    prefetch.take_chunk();
    take_tile_step<kTall, kWide>(job, input + step * kTileDepth, panel, step);
  }
  TileSums sums;
  store_sums<kTall, kWide, 0>(sums);
  for (int r = 0; r < rows; ++r) emit_tile_row(job, row + r, group, kWide, sums.rows[r]);
}

inline void multiply_few_rows(const Matmul& job, int row, int rows, int group, int width, const Panel& panel,
                              Prefetch& prefetch) {
  if (width == 4) return multiply_tiles<1, 4>(job, row, rows, group, panel, prefetch);
  if (width == 2) return multiply_tiles<1, 2>(job, row, rows, group, panel, prefetch);
  multiply_tiles<1, 1>(job, row, rows, group, panel, prefetch);
}

inline void multiply_row_tiles(const Matmul& job, int row, int rows, int group, int width, const Panel& panel,
                              Prefetch& prefetch) {
  if (rows <= kTileRows) return multiply_few_rows(job, row, rows, group, width, panel, prefetch);
  if (width == 2) return multiply_tiles<2, 2>(job, row, rows, group, panel, prefetch);
  multiply_tiles<2, 1>(job, row, rows, group, panel, prefetch);
}

void matmul_in_tiles(const Matmul& job, Range rows, Range groups, void* scratch) {
  const int tall = rows.size() <= kTileRows ? kTileRows : 2 * kTileRows;
  const int widest = tall == kTileRows ? 4 : 2;
  const int tiles = ceil_divide(rows.size(), tall);
  const int steps = tiles * (job.weights.depth / kTileDepth);
  const int lines_per_group = static_cast<int>(job.weights.group_bytes() / 64);
  begin_tiles();
  for (int group = groups.begin; group < groups.end;) {
    const int left = groups.end - group;
    const int width = left >= widest ? widest : left >= 2 ? 2 : 1;
    const bool fetches = tiles > 1 && left > width;
    Prefetch prefetch(fetches ? job.weights.group(group + width) : nullptr, lines_per_group * width, steps);
    const Panel panel = job.weights.format == Format::kBf16
                            ? panel_of(job.weights, group)
                            : expanded_panel(job.weights, {group, group + width}, scratch);
    for (int row = rows.begin; row < rows.end; row += tall)
      multiply_row_tiles(job, row, smaller(tall, rows.end - row), group, width, panel, prefetch);
    group += width;
  }
  end_tiles();
}

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
