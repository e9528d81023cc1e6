// What is done row by row between the matrix products: RMS norm, rotary embedding, writing K and V into their block.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace memserve {
namespace MEMSERVE_LEVEL {
namespace {

void normalise(const Normalise& job) {
  Floats squares = zeros();
  for (int i = 0; i < job.padded; i += kLanes16) {
    const Floats x = load(job.input + i);
    squares = multiply_add(x, x, squares);
  }
  const float mean = sum_of_lanes(squares) / static_cast<float>(job.size);
  const Floats scale = splat(1.0f / __builtin_sqrtf(mean + job.epsilon));
  for (int i = 0; i < job.padded; i += kLanes16)
    store_bf16(job.output + i, multiply(multiply(load(job.input + i), scale), load(job.weight + i)));
}

constexpr int kMostHeadDim = 256;

// Half-split ("neox") rotation: dimension i turns together with dimension i + dim / 2.
inline void rotate_head(Bf16* to, const float* head, int dim, const float* cosines, const float* sines) {
  const int half = dim / 2;
  float turned[kMostHeadDim];
  for (int i = 0; i < half; ++i) {
    turned[i] = head[i] * cosines[i] - head[i + half] * sines[i];
    turned[i + half] = head[i + half] * cosines[i] + head[i] * sines[i];
  }
  for (int i = 0; i < dim; i += kLanes16) store_bf16(to + i, load(turned + i));
}

inline void place_keys(Bf16* block, int slot, const Bf16* key, int dim) {
  for (int i = 0; i < dim; i += 2) std::memcpy(block + i * kBlockTokens + 2 * slot, key + i, 2 * sizeof(Bf16));
}

inline void place_values(Bf16* block, int slot, const Bf16* value, int dim) {
  Bf16* pair = block + static_cast<size_t>(slot / 2) * dim * 2 + slot % 2;
  for (int i = 0; i < dim; ++i) pair[2 * i] = value[i];
}

void place_row(const PlaceRow& job) {
  const Heads& heads = job.heads;
  const int dim = heads.dim;
  for (int h = 0; h < heads.queries; ++h)
    rotate_head(job.queries + h * dim, job.qkv + h * dim, dim, job.cosines, job.sines);
  const float* keys = job.qkv + heads.queries * dim;
  const float* values = keys + heads.kv * dim;
  Bf16 rounded[kMostHeadDim];
  for (int h = 0; h < heads.kv; ++h) {
    rotate_head(rounded, keys + h * dim, dim, job.cosines, job.sines);
    place_keys(const_cast<Bf16*>(heads.keys(job.block, h)), job.slot, rounded, dim);
    for (int i = 0; i < dim; i += kLanes16) store_bf16(rounded + i, load(values + h * dim + i));
    place_values(const_cast<Bf16*>(heads.values(job.block, h)), job.slot, rounded, dim);
  }
}

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
