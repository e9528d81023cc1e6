#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace memserve {
namespace {

constexpr int kSuperInputs = kNestedSteps * kDepthMultiple;  // of a block of ggml's K types

struct BlockShape {
  const char* name;
  int values;
  int bytes;
};

BlockShape shape_of(Stored stored) {
  switch (stored) {
    case Stored::kQ4_0: return {"Q4_0", 32, 18};
    case Stored::kQ4_1: return {"Q4_1", 32, 20};
    case Stored::kQ8_0: return {"Q8_0", 32, 34};
    case Stored::kQ4_K: return {"Q4_K", kSuperInputs, 144};
    case Stored::kQ6_K: return {"Q6_K", kSuperInputs, 210};
    case Stored::kF32: break;
  }
  return {"F32", 1, 4};
}

// 32 inputs of one output: weight = value * scale + minimum, both multiplied by `fine` in nested formats.
struct Step {
  int8_t values[kDepthMultiple];
  uint16_t scale;    // f16
  uint16_t minimum;  // f16
  uint8_t fine[2];   // of scale and minimum; of scale for either half in kEightNested
};

uint16_t u16_at(const unsigned char* from) {
  uint16_t value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

constexpr uint16_t kSign = 0x8000;
constexpr uint16_t kInfinity = 0x7c00;

bool is_finite(uint16_t half) { return (half & kInfinity) != kInfinity; }

// -8 times a number in f16, which only its exponent shows; small numbers shift instead.
uint16_t minus_eight_times(uint16_t half) {
  const uint16_t sign = (half & kSign) ^ kSign;
  uint32_t magnitude = half & 0x7fffu;
  for (int doubling = 0; doubling < 3; ++doubling) magnitude = magnitude < 0x400 ? 2 * magnitude : magnitude + 0x400;
  return static_cast<uint16_t>(sign | std::min<uint32_t>(magnitude, kInfinity));
}

void split_nibbles(Step& step, const unsigned char* packed) {
  for (int i = 0; i < kDepthMultiple / 2; ++i) {
    step.values[i] = static_cast<int8_t>(packed[i] & 15);
    step.values[i + kDepthMultiple / 2] = static_cast<int8_t>(packed[i] >> 4);
  }
}

Step read_q4_0(const unsigned char* block) {
  Step step{};
  step.scale = u16_at(block);
  step.minimum = minus_eight_times(step.scale);
  split_nibbles(step, block + 2);
  return step;
}

Step read_q4_1(const unsigned char* block) {
  Step step{};
  step.scale = u16_at(block);
  step.minimum = u16_at(block + 2);
  split_nibbles(step, block + 4);
  return step;
}

Step read_q8_0(const unsigned char* block) {
  Step step{};
  step.scale = u16_at(block);
  std::memcpy(step.values, block + 2, kDepthMultiple);
  return step;
}

// Scales and minima have six bits, spread over twelve bytes.
Step read_q4_k(const unsigned char* block, int index) {
  Step step{};
  step.scale = u16_at(block);
  step.minimum = u16_at(block + 2) ^ kSign;
  const unsigned char *low = block + 4, *mid = block + 8, *high = block + 12;
  const int i = index % 4;
  step.fine[0] = index < 4 ? low[i] & 63 : (high[i] & 15) | (low[i] >> 2 & 48);
  step.fine[1] = index < 4 ? mid[i] & 63 : high[i] >> 4 | (mid[i] >> 2 & 48);
  const unsigned char* packed = block + 16 + index / 2 * kDepthMultiple;
  for (int v = 0; v < kDepthMultiple; ++v) step.values[v] = packed[v] >> (4 * (index % 2)) & 15;
  return step;
}

Step read_q6_k(const unsigned char* block, int index) {
  Step step{};
  step.scale = u16_at(block + 208);
  const int half = index / 4, group = index % 4;
  const unsigned char* low = block + half * 64 + group % 2 * 32;
  const unsigned char* high = block + 128 + half * 32;
  for (int v = 0; v < kDepthMultiple; ++v)
    step.values[v] =
        static_cast<int8_t>(((low[v] >> (4 * (group / 2)) & 15) | (high[v] >> (2 * group) & 3) << 4) - 32);
  std::memcpy(step.fine, block + 192 + 2 * index, 2);
  return step;
}

// Nearest f16, ties to even, of a number from 0 to the largest f16.
uint16_t half_of(float x) {
  uint32_t bits;
  // The product has its exponent moved to f16's, so that numbers too small for it lose their last bits here.
  const float moved = x * 0x1p-112f;
  std::memcpy(&bits, &moved, sizeof bits);
  return static_cast<uint16_t>((bits + 0xfffu + (bits >> 13 & 1u)) >> 13);
}

float float_of_half(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 13;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x * 0x1p112f;
}

// Eight bits and one scale per step, as ggml's Q8_0.
Step quantise(const float* values) {
  Step step{};
  float largest = 0.0f;
  for (int i = 0; i < kDepthMultiple; ++i) largest = std::max(largest, std::fabs(values[i]));
  step.scale = largest < 127 * 65504.0f ? half_of(largest / 127.0f) : kInfinity;
  const float scale = float_of_half(step.scale);
  if (scale == 0.0f) return step;
  for (int i = 0; i < kDepthMultiple; ++i)
    step.values[i] = static_cast<int8_t>(std::clamp(std::nearbyint(values[i] / scale), -127.0f, 127.0f));
  return step;
}

Step read_floats(const float* row, int inputs, int index) {
  float values[kDepthMultiple] = {};
  const int begin = index * kDepthMultiple;
  std::copy(row + begin, row + std::min(begin + kDepthMultiple, inputs), values);
  return quantise(values);
}

Step read_step(Stored stored, const unsigned char* row, int inputs, int index) {
  const BlockShape shape = shape_of(stored);
  const unsigned char* block = row + static_cast<size_t>(index * kDepthMultiple / shape.values) * shape.bytes;
  switch (stored) {
    case Stored::kQ4_0: return read_q4_0(block);
    case Stored::kQ4_1: return read_q4_1(block);
    case Stored::kQ8_0: return read_q8_0(block);
    case Stored::kQ4_K: return read_q4_k(block, index % kNestedSteps);
    case Stored::kQ6_K: return read_q6_k(block, index % kNestedSteps);
    case Stored::kF32: break;
  }
  return read_floats(reinterpret_cast<const float*>(row), inputs, index);
}

void put_u16(unsigned char* to, int column, uint16_t value) {
  std::memcpy(to + column * sizeof value, &value, sizeof value);
}

void put_nibbles(unsigned char* to, int column, const int8_t* values) {
  for (int i = 0; i < kDepthMultiple; ++i) {
    const NibblePlace place = nibble_of(i, column);
    to[place.word * 4 + place.nibble / 2] |= static_cast<unsigned char>(values[i] << (4 * (place.nibble % 2)));
  }
}

void put_bytes(unsigned char* to, int column, const int8_t* values) {
  for (int i = 0; i < kDepthMultiple; ++i)
    to[i / 4 * 4 * kGroupColumns + 4 * column + i % 4] = static_cast<unsigned char>(values[i]);
}

void put_step(const PackedMatrix& matrix, int group, int index, int column, const Step& step) {
  constexpr size_t kHalves = kGroupColumns * sizeof(uint16_t);
  auto* at = const_cast<unsigned char*>(matrix.step(group, index));
  auto* header = const_cast<unsigned char*>(matrix.header(group, index));
  const bool nested = header_bytes(matrix.format) > 0;
  const bool four = matrix.format == Format::kFour || matrix.format == Format::kFourNested;
  unsigned char* scales = nested ? header : at;
  put_u16(scales, column, step.scale);
  if (four) put_u16(scales + kHalves, column, step.minimum);
  if (nested) {
    at[column] = step.fine[0];
    at[kGroupColumns + column] = step.fine[1];
  }
  unsigned char* weights = at + step_bytes(matrix.format) - (four ? kStepValues / 2 : kStepValues);
  if (four)
    put_nibbles(weights, column, step.values);
  else
    put_bytes(weights, column, step.values);
}

Bf16 round_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<Bf16>((bits >> 16) | 0x40u);
  return static_cast<Bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

void pack_floats(Bf16* to, int column, const float* row, int inputs) {
  for (int i = 0; i < inputs; ++i)
    to[static_cast<size_t>(i / 2) * 2 * kGroupColumns + 2 * column + i % 2] = round_to_bf16(row[i]);
}

}  // namespace

size_t MatrixSource::row_bytes() const {
  const BlockShape shape = shape_of(stored);
  return static_cast<size_t>(inputs / shape.values) * shape.bytes;
}

SourceRows::SourceRows(const MatrixSource& first) : name(first.name), stored(first.stored), inputs(first.inputs) {
  append(first);
}

void SourceRows::append(const MatrixSource& source) {
  for (int row = 0; row < source.rows; ++row) rows.push_back(source.row(row));
}

Stored stored_type(const std::string& name) {
  for (Stored stored : {Stored::kQ4_0, Stored::kQ4_1, Stored::kQ8_0, Stored::kQ4_K, Stored::kQ6_K})
    if (name == shape_of(stored).name) return stored;
  throw std::invalid_argument("blocks of type " + name + " have no packed form");
}

int block_values(Stored stored) { return shape_of(stored).values; }

Format packed_format(Stored stored, Keep keep) {
  switch (stored) {
    case Stored::kF32: return keep == Keep::kInt8 ? Format::kEight : Format::kBf16;
    case Stored::kQ4_0:
    case Stored::kQ4_1: return Format::kFour;
    case Stored::kQ8_0: return Format::kEight;
    case Stored::kQ4_K: return Format::kFourNested;
    case Stored::kQ6_K: return Format::kEightNested;
  }
  return Format::kBf16;
}

bool pack_group(const PackedMatrix& matrix, int group, const SourceRows& source) {
  const int first = group * kGroupColumns;
  const int count = std::min(kGroupColumns, matrix.columns - first);
  bool finite = true;
  for (int column = 0; column < count; ++column) {
    const unsigned char* row = source.rows[static_cast<size_t>(first + column)];
    if (matrix.format == Format::kBf16) {
      auto* to = reinterpret_cast<Bf16*>(const_cast<unsigned char*>(matrix.group(group)));
      pack_floats(to, column, reinterpret_cast<const float*>(row), source.inputs);
      continue;
    }
    for (int index = 0; index < matrix.steps(); ++index) {
      const Step step = read_step(source.stored, row, source.inputs, index);
      finite = finite && is_finite(step.scale) && is_finite(step.minimum);
      put_step(matrix, group, index, column, step);
    }
  }
  return finite;
}

}  // namespace memserve
