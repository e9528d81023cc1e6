// The machine's limits as this level's instructions see them: loads as fast as they go, dot products from registers.
#pragma once

#include "gemm.h"
#include "kernels.h"
#include "simd.h"

namespace memserve {
namespace MEMSERVE_LEVEL {
namespace {

constexpr int kReadStreams = 8;

uint64_t read_memory(const void* from, size_t bytes) {
  const auto* words = static_cast<const Bf16*>(from);
  Floats seen[kReadStreams];
  for (Floats& s : seen) s = zeros();
  constexpr size_t kStep = kReadStreams * 64 / sizeof(Bf16);
  for (size_t at = 0; at + kStep <= bytes / sizeof(Bf16); at += kStep) {
    __builtin_prefetch(words + at + 2 * kStep);
    __builtin_prefetch(words + at + 2 * kStep + kStep / 2);
#pragma GCC unroll 8
    for (int s = 0; s < kReadStreams; ++s) {
      const Pairs x = load_pairs(words + at + s * 32);
      seen[s] = larger(seen[s], reinterpret_cast<const Floats&>(x));
    }
  }
  float sum = 0.0f;
  for (const Floats& s : seen) sum += first_lane(s);
  uint32_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  return bits;
}

double run_dots(int64_t rounds, float* sink) {
  constexpr int kRows = kMaxSums / 2;
  alignas(64) Bf16 operands[64] = {};
  Sums<kRows, 2> sums;
  clear<kRows, 2>(sums);
  Pairs input = splat_pair(operands);
  Pairs weights[2] = {load_pairs(operands), load_pairs(operands + 32)};
  for (int64_t i = 0; i < rounds; ++i) {
    __asm__ volatile("" : "+m"(*sink));  // keeps the rounds apart without touching the registers
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) sums[r][c] = dot_pairs(sums[r][c], input, weights[c]);
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < 2; ++c) *sink += first_lane(sums[r][c]);
  return 64.0 * kRows * 2 * static_cast<double>(rounds);
}

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
