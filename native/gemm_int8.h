// Matrix products of 8-bit integers: inputs of quantise.h times weights of 4 and 8 bits where they lie packed.
// The dot product of a group of 32 inputs (16, where weights have a scale for each 16) is an exact integer. An output
// takes the groups in order, every operation rounded to float32 and none fused:
//
//     out += float(dot) * (weight scale * input scale);   then, for weights with a minimum,   out += minimum * input sum
//
// so that one row and five hundred, any register block and any level give the same bits.
#pragma once

#include "gemm.h"
#include "integers.h"

namespace memserve {
namespace MEMSERVE_LEVEL {
namespace {

template <Format kFormat>
struct IntegerFormat {
  static constexpr bool kNested = header_bytes(kFormat) > 0;
  static constexpr Weights kWeights = kFormat == Format::kFour || kFormat == Format::kFourNested ? Weights::kNibbles
                                                                                                : Weights::kSigned;
  static constexpr bool kHasMinima = kWeights == Weights::kNibbles;
  static constexpr int kParts = kFormat == Format::kEightNested ? 2 : 1;  // of a step, with a scale each
  static constexpr int kQuads = 8 / kParts;
  static constexpr size_t kScaleBytes =
      step_bytes(kFormat) - (kWeights == Weights::kNibbles ? kStepValues / 2 : kStepValues);
};

// Walks over the steps of one column group.
template <Format kFormat>
struct StepCursor {
  const unsigned char* header;
  const unsigned char* step;
  int taken;

  static StepCursor first(const unsigned char* group) { return {group, group + header_bytes(kFormat), 0}; }

  inline void advance() {
    step += step_bytes(kFormat);
    if constexpr (IntegerFormat<kFormat>::kNested) {
      if (++taken % kNestedSteps != 0) return;
      header = step;
      step += header_bytes(kFormat);
    }
  }
};

// Four inputs' weights of each output of a step.
template <Format kFormat>
inline __attribute__((always_inline)) WeightQuads weight_quads(const unsigned char* step, int quad) {
  const unsigned char* weights = step + IntegerFormat<kFormat>::kScaleBytes;
  if constexpr (IntegerFormat<kFormat>::kWeights == Weights::kSigned) return signed_quads(weights + 64 * quad);
  const unsigned char* line = weights + 64 * (quad / 2);
  return quad % 2 == 0 ? low_halves(line) : high_halves(line);
}

template <Format kFormat>
inline int32_t bias_of(const InputGroup& group, int part) {
  return IntegerFormat<kFormat>::kParts == 1 ? group.bias[0] + group.bias[1] : group.bias[part];
}

// sums[r][c] += rows[r] * columns[c] over the group's 32 inputs.
template <Format kFormat, int kRows, int kColumns>
inline __attribute__((always_inline)) void multiply_step(Sums<kRows, kColumns>& sums, const InputGroup* rows,
                                                         size_t row_stride,
                                                         const StepCursor<kFormat> (&columns)[kColumns]) {
  using Shape = IntegerFormat<kFormat>;
#pragma GCC unroll 2
  for (int part = 0; part < Shape::kParts; ++part) {
    Ints dots[kRows][kColumns];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c)
        dots[r][c] = first_sum<Shape::kWeights>(bias_of<kFormat>(rows[r * row_stride], part));
#pragma GCC unroll 8
    for (int q = part * Shape::kQuads; q < (part + 1) * Shape::kQuads; ++q) {
      WeightQuads weights[kColumns];
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) weights[c] = weight_quads<kFormat>(columns[c].step, q);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const InputQuad inputs = splat_quad(rows[r * row_stride].values + 4 * q);
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) dots[r][c] = dot_quads<Shape::kWeights>(dots[r][c], weights[c], inputs);
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const StepScales scales = scales_of<kFormat>(columns[c].header, columns[c].step);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const InputGroup& group = rows[r * row_stride];
        const Floats scale = multiply(scales.scales[part], splat(group.scale));
        sums[r][c] = add(sums[r][c], multiply(floats_of(dots[r][c]), scale));
        if (Shape::kHasMinima) sums[r][c] = add(sums[r][c], multiply(scales.minima, splat(group.sum)));
      }
    }
  }
}

template <Format kFormat, int kRows, int kColumns>
__attribute__((noinline)) void multiply_groups(const Matmul& job, int row, int group, Prefetch& prefetch) {
  StepCursor<kFormat> columns[kColumns];
  for (int c = 0; c < kColumns; ++c) columns[c] = StepCursor<kFormat>::first(job.weights.group(group + c));
  Sums<kRows, kColumns> sums;
  clear<kRows, kColumns>(sums);
  const size_t row_stride = static_cast<size_t>(job.weights.steps());
  const InputGroup* rows = job.groups + static_cast<size_t>(row) * row_stride;
  for (int step = 0; step < job.weights.steps(); ++step) {
    prefetch.take_chunk();
    multiply_step<kFormat, kRows, kColumns>(sums, rows + step, row_stride, columns);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) columns[c].advance();
  }
  emit_block<kRows, kColumns>(job, row, group, sums);
}

constexpr int kMostIntegerRows = kMaxDots / 2;

template <Format kFormat, int kRows>
inline void choose_integer_rows(const Matmul& job, int row, int rows, int group, int columns, Prefetch& prefetch) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return choose_integer_rows<kFormat, kRows - 1>(job, row, rows, group, columns, prefetch);
  }
  if (columns == 2) return multiply_groups<kFormat, kRows, 2>(job, row, group, prefetch);
  multiply_groups<kFormat, kRows, 1>(job, row, group, prefetch);
}

template <Format kFormat>
void matmul_format(const Matmul& job, Range rows, Range groups) {
  const int tiles = ceil_divide(rows.size(), kMostIntegerRows);
  const int lines_per_group = static_cast<int>(job.weights.group_bytes() / 64);
  for (int group = groups.begin; group < groups.end;) {
    const int width = smaller(2, groups.end - group);
    const bool fetches = group + width < groups.end;
    Prefetch prefetch(fetches ? job.weights.group(group + width) : nullptr, lines_per_group * width,
                      tiles * job.weights.steps());
    for (int tile = 0; tile < tiles; ++tile) {
      const int begin = rows.begin + rows.size() * tile / tiles;
      const int end = rows.begin + rows.size() * (tile + 1) / tiles;
      choose_integer_rows<kFormat, kMostIntegerRows>(job, begin, end - begin, group, width, prefetch);
    }
    group += width;
  }
}

void matmul_int8(const Matmul& job, Range rows, Range groups) {
  switch (job.weights.format) {
    case Format::kFour: return matmul_format<Format::kFour>(job, rows, groups);
    case Format::kEight: return matmul_format<Format::kEight>(job, rows, groups);
    case Format::kFourNested: return matmul_format<Format::kFourNested>(job, rows, groups);
    case Format::kEightNested: return matmul_format<Format::kEightNested>(job, rows, groups);
    case Format::kBf16: return;
  }
}

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
