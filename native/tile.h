// Eight tile registers of up to 16 rows x 64 bytes: AMX intrinsics, or the same in plain C++ for tests.
// Shapes are fixed: 0-3 sums, 4 and 5 operands of 16 rows x 64 bytes, 6 of 16 rows x 32 bytes, 7 of 8 rows x 64 bytes.
#pragma once

#include "kernels.h"
#include "simd.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace memserve {
namespace MEMSERVE_LEVEL {
namespace {

constexpr int kTileRows = 16;
constexpr int kTiles = 8;
constexpr int kSumTile = 0;       // the first of four
constexpr int kInputTile = 4;     // 16 rows x 32 bf16
constexpr int kWeightTile = 5;    // 16 pairs x 16 columns
constexpr int kHalfInputTile = 6;   // 16 rows x 16 bf16
constexpr int kHalfWeightTile = 7;  // 8 pairs x 16 columns

struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 32, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 8};
};

#if defined(__AMX_BF16__)

inline void begin_tiles() {
  const TileShapes shapes;
  // gcc 12 declares only 8 of the 64 bytes that the instruction reads; without this the other stores vanish.
  __asm__ volatile("" ::"m"(shapes) : "memory");
  _tile_loadconfig(&shapes);
}
inline void end_tiles() { _tile_release(); }

// gcc's intrinsics paste the register's number from the source text, which a template parameter is not.
template <int kTile>
inline void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
inline void load_tile(const void* from, size_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void store_tile(float* to, size_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kSum, int kInput, int kWeights>
inline void dot_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kInput), "i"(kWeights));
}

#else

struct EmulatedTile {
  unsigned char bytes[kTileRows][64];
};

inline EmulatedTile& emulated_tile(int index) {
  static thread_local EmulatedTile tiles[kTiles];
  return tiles[index];
}

inline void begin_tiles() {
  for (int t = 0; t < kTiles; ++t) std::memset(&emulated_tile(t), 0xff, sizeof(EmulatedTile));  // NaN
}
inline void end_tiles() {}

template <int kTile>
inline void zero_tile() {
  std::memset(&emulated_tile(kTile), 0, sizeof(EmulatedTile));
}
template <int kTile>
inline void load_tile(const void* from, size_t stride) {
  const TileShapes shapes;
  for (int r = 0; r < shapes.rows[kTile]; ++r)
    std::memcpy(emulated_tile(kTile).bytes[r], static_cast<const char*>(from) + r * stride, shapes.row_bytes[kTile]);
}
template <int kTile>
inline void store_tile(float* to, size_t stride) {
  for (int r = 0; r < kTileRows; ++r)
    std::memcpy(reinterpret_cast<char*>(to) + r * stride, emulated_tile(kTile).bytes[r], 64);
}

inline float float_of(const unsigned char* bf16) {
  const uint32_t bits = (static_cast<uint32_t>(bf16[0]) << 16) | (static_cast<uint32_t>(bf16[1]) << 24);
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Intel's definition of TDPBF16PS: first and second of the pairs are summed apart, then added to the sum.
template <int kSum, int kInput, int kWeights>
inline void dot_tiles() {
  const TileShapes shapes;
  for (int r = 0; r < kTileRows; ++r)
    for (int c = 0; c < kGroupColumns; ++c) {
      float parts[2] = {0.0f, 0.0f};
      for (int pair = 0; pair < shapes.row_bytes[kInput] / 4; ++pair)
        for (int half = 0; half < 2; ++half)
          parts[half] += float_of(&emulated_tile(kInput).bytes[r][4 * pair + 2 * half]) *
                         float_of(&emulated_tile(kWeights).bytes[pair][4 * c + 2 * half]);
      float sum;
      unsigned char* at = &emulated_tile(kSum).bytes[r][4 * c];
      std::memcpy(&sum, at, sizeof sum);
      sum += parts[0] + parts[1];
      std::memcpy(at, &sum, sizeof sum);
    }
}

#endif

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
