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
inline void rotate_head(float* to, const float* head, int dim, const float* cosines, const float* sines) {
  const int half = dim / 2;
  for (int i = 0; i < half; ++i) {
    to[i] = head[i] * cosines[i] - head[i + half] * sines[i];
    to[i + half] = head[i + half] * cosines[i] + head[i] * sines[i];
  }
}

inline void round_head(Bf16* to, const float* head, int dim) {
  for (int i = 0; i < dim; i += kLanes16) store_bf16(to + i, load(head + i));
}

// Returns the scale of to[i] = round(head[i] / scale): largest / 127; 0 for a head that is nothing but zeros, or too
// small for a scale; NaN, and zeros, for one with a number that is not finite.
inline float quantise_head(int8_t* to, const float* head, int dim) {
  constexpr float kSmallestNormal = 0x1p-126f;
  Floats largest = zeros(), broken = zeros();
  for (int i = 0; i < dim; i += kLanes16) {
    const Floats x = load(head + i);
    largest = larger(largest, absolute(x));
    broken = multiply_add(x, zeros(), broken);
  }
  const float scale = largest_lane(largest) / 127.0f + sum_of_lanes(broken);
  if (!(scale >= kSmallestNormal)) {
    std::memset(to, 0, static_cast<size_t>(dim));
    return scale != scale ? scale : 0.0f;
  }
  const Floats inverse = splat(1.0f / scale);
  for (int i = 0; i < dim; i += kLanes16) store_int8(to + i, multiply(load(head + i), inverse));
  return scale;
}

template <class Element>
inline void place_keys(unsigned char* block, int slot, const Element* key, int dim) {
  for (int i = 0; i < dim; i += 2)
    std::memcpy(block + (i * kBlockTokens + 2 * slot) * sizeof(Element), key + i, 2 * sizeof(Element));
}

template <class Element>
inline void place_values(unsigned char* block, int slot, const Element* value, int dim) {
  unsigned char* pair = block + (static_cast<size_t>(slot / 2) * dim * 2 + slot % 2) * sizeof(Element);
  for (int i = 0; i < dim; ++i) std::memcpy(pair + 2 * i * sizeof(Element), value + i, sizeof(Element));
}

struct PlacedHead {
  unsigned char* keys;    // of the head, in the row's block
  unsigned char* values;
  int slot;
  int dim;
};

inline void place_bf16(const PlacedHead& to, const float* key, const float* value) {
  Bf16 rounded[kMostHeadDim];
  round_head(rounded, key, to.dim);
  place_keys(to.keys, to.slot, rounded, to.dim);
  round_head(rounded, value, to.dim);
  place_values(to.values, to.slot, rounded, to.dim);
}

inline void place_int8(const PlacedHead& to, const float* key, const float* value) {
  int8_t keys[kMostHeadDim], values[kMostHeadDim];
  const float key_scale = quantise_head(keys, key, to.dim);
  const float value_scale = quantise_head(values, value, to.dim);
  // Softmax would skip a score of NaN; a weight cannot.
  const float both = value_scale + 0.0f * key_scale;
  const size_t at = static_cast<size_t>(to.slot) * sizeof(float);
  std::memcpy(to.keys + at, &key_scale, sizeof key_scale);
  std::memcpy(to.values + at, &both, sizeof both);
  place_keys(to.keys + kScaleBytes, to.slot, keys, to.dim);
  place_values(to.values + kScaleBytes, to.slot, values, to.dim);
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
  float turned[kMostHeadDim];
  for (int h = 0; h < heads.queries; ++h) {
    rotate_head(turned, head_at(h * dim, vectors.q_norm), dim, job.cosines, job.sines);
    round_head(job.queries + h * dim, turned, dim);
  }
  const auto place = heads.format == KvFormat::kInt8 ? place_int8 : place_bf16;
  for (int h = 0; h < heads.kv; ++h) {
    rotate_head(turned, head_at(first_key + h * dim, vectors.k_norm), dim, job.cosines, job.sines);
    const float* value = head_at(first_value + h * dim, nullptr);
    place({heads.keys(job.block, h), heads.values(job.block, h), job.slot, dim}, turned, value);
  }
}

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
