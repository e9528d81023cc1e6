// The machine's limits as this level's instructions see them: loads as fast as they go, dot products from registers.
#pragma once

#include "gemm_int8.h"
#include "kernels.h"
#include "simd.h"

namespace memserve {
namespace MEMSERVE_LEVEL {
namespace {

constexpr size_t kReadStreams = 8;

// Several places at once, as matrix products read their weights: one stream alone leaves bandwidth unused.
uint64_t read_memory(const void* from, size_t bytes) {
  constexpr size_t kStep = 4 * kLanes16;  // floats of a stream's turn
  const size_t per_stream = bytes / sizeof(float) / kReadStreams / kStep * kStep;
  const auto* words = static_cast<const float*>(from);
  Floats seen[4] = {zeros(), zeros(), zeros(), zeros()};
  for (size_t at = 0; at < per_stream; at += kStep)
    for (size_t stream = 0; stream < kReadStreams; ++stream) {
      const float* here = words + stream * per_stream + at;
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        __builtin_prefetch(here + 4 * kStep + v * kLanes16, 0, 2);
        seen[v] = larger(seen[v], load(here + v * kLanes16));
      }
    }
  const float sum = first_lane(add(add(seen[0], seen[1]), add(seen[2], seen[3])));
  uint32_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  return bits;
}

// The compiler must not see what lies behind the pointer, or it computes the constant sums itself.
template <class Value>
inline const Value* hidden_from_compiler(const Value* values) {
  __asm__ volatile("" : "+r"(values)::"memory");
  return values;
}

double run_dots(int64_t rounds, float* sink) {
  constexpr int kRows = kMaxSums / 2;
  float zeroed[kMaxSums * kLanes16] = {};
  const float* start = hidden_from_compiler(zeroed);
  Sums<kRows, 2> sums;
#pragma GCC unroll 32
  for (int i = 0; i < kRows * 2; ++i) sums[i / 2][i % 2] = load(start + i * kLanes16);
  const auto* operands = reinterpret_cast<const Bf16*>(start);
  const Pairs input = splat_pair(operands);
  const Pairs weights[2] = {load_pairs(operands), load_pairs(operands + 32)};
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 32
    for (int i = 0; i < kRows * 2; ++i) sums[i / 2][i % 2] = dot_pairs(sums[i / 2][i % 2], input, weights[i % 2]);
#pragma GCC unroll 32
  for (int i = 0; i < kRows * 2; ++i) *sink += first_lane(sums[i / 2][i % 2]);
  return 64.0 * kRows * 2 * static_cast<double>(rounds);
}

double run_int8_dots(int64_t rounds, float* sink) {
  float zeroed[kMaxDots * kLanes16] = {};
  const auto* start = hidden_from_compiler(reinterpret_cast<const unsigned char*>(zeroed));
  Ints sums[kMaxDots];
#pragma GCC unroll 16
  for (int i = 0; i < kMaxDots; ++i) std::memcpy(&sums[i], start + 64 * i, sizeof sums[i]);
  const WeightQuads weights[2] = {low_halves(start), high_halves(start + 64)};
  for (int64_t round = 0; round < rounds; ++round) {
    // Read anew, or the products of levels that need several instructions would be computed once.
    start = hidden_from_compiler(start);
    const InputQuad input = splat_quad(reinterpret_cast<const int8_t*>(start));
#pragma GCC unroll 16
    for (int i = 0; i < kMaxDots; ++i) sums[i] = dot_quads<Weights::kNibbles>(sums[i], weights[i % 2], input);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kMaxDots; ++i) *sink += first_lane(floats_of(sums[i]));
  return 128.0 * kMaxDots * static_cast<double>(rounds);
}

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
