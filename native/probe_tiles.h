// The peak of tile registers: dot products whose operands never leave them.
#pragma once

#include "probe.h"
#include "tile.h"

namespace memserve {
namespace MEMSERVE_LEVEL {
namespace {

double run_tile_dots(int64_t rounds, float* sink) {
  alignas(64) float operands[kTileRows * 16] = {};
  begin_tiles();
  load_tile<kInputTile>(operands, 64);
  load_tile<kWeightTile>(operands, 64);
  zero_tile<0>();
  zero_tile<1>();
  zero_tile<2>();
  zero_tile<3>();
  for (int64_t i = 0; i < rounds; ++i) {
    dot_tiles<0, kInputTile, kWeightTile>();
    dot_tiles<1, kInputTile, kWeightTile>();
    dot_tiles<2, kInputTile, kWeightTile>();
    dot_tiles<3, kInputTile, kWeightTile>();
  }
  store_tile<0>(operands, 64);
  *sink += operands[0];
  end_tiles();
  return 4.0 * 2 * 16 * 16 * 32 * static_cast<double>(rounds);
}

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
