// What is done row by row between the matrix products: RMS norm, bias and norm of heads, rotary embedding, writing K
// and V into their block.
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

// A head with its bias and norm, in `room` if the model has any of them. `bias` and `norm` may be null.
inline const float* prepared_head(float* room, const float* head, const float* bias, const float* norm, int dim,
                                  float epsilon) {
  if (bias == nullptr && norm == nullptr) return head;
  Floats squares = zeros();
  for (int i = 0; i < dim; i += kLanes16) {
    const Floats x = bias == nullptr ? load(head + i) : add(load(head + i), load(bias + i));
    squares = multiply_add(x, x, squares);
    store(room + i, x);
  }
  if (norm == nullptr) return room;
  const Floats scale = splat(1.0f / __builtin_sqrtf(sum_of_lanes(squares) / static_cast<float>(dim) + epsilon));
  for (int i = 0; i < dim; i += kLanes16) store(room + i, multiply(multiply(load(room + i), scale), load(norm + i)));
  return room;
}

void place_row(const PlaceRow& job) {
  const Heads& heads = job.heads;
  const HeadVectors& vectors = job.vectors;
  const int dim = heads.dim;
  const int first_key = heads.queries * dim;
  const int first_value = first_key + heads.kv * dim;
  float room[kMostHeadDim];
  const auto head_at = [&](int at, const float* norm) {
    const float* bias = vectors.bias == nullptr ? nullptr : vectors.bias + at;
    return prepared_head(room, job.qkv + at, bias, norm, dim, vectors.epsilon);
  };
  for (int h = 0; h < heads.queries; ++h)
    rotate_head(job.queries + h * dim, head_at(h * dim, vectors.q_norm), dim, job.cosines, job.sines);
  Bf16 rounded[kMostHeadDim];
  for (int h = 0; h < heads.kv; ++h) {
    rotate_head(rounded, head_at(first_key + h * dim, vectors.k_norm), dim, job.cosines, job.sines);
    place_keys(const_cast<Bf16*>(heads.keys(job.block, h)), job.slot, rounded, dim);
    const float* value = head_at(first_value + h * dim, nullptr);
    for (int i = 0; i < dim; i += kLanes16) store_bf16(rounded + i, load(value + i));
    place_values(const_cast<Bf16*>(heads.values(job.block, h)), job.slot, rounded, dim);
  }
}

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
