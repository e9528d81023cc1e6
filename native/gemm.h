// Matrix products in vector registers. Every output is one float accumulator that takes the pairs of inputs in order;
// work is split over outputs and rows, never over inputs, so one row and five hundred round alike.
#pragma once

#include "expand.h"
#include "kernels.h"
#include "simd.h"

namespace memserve {
namespace MEMSERVE_LEVEL {
namespace {

inline int smaller(int a, int b) { return a < b ? a : b; }
inline int ceil_divide(int a, int b) { return (a + b - 1) / b; }

// Memory to fetch while computing: `lines` cache lines from `from`, if any, spread over `chunks` steps.
struct Prefetch {
  const char* next;
  int lines_per_chunk;

  Prefetch(const unsigned char* from, int lines, int chunks)
      : next(reinterpret_cast<const char*>(from)), lines_per_chunk(from == nullptr ? 0 : ceil_divide(lines, chunks)) {}

  inline void take_chunk() {
    for (int i = 0; i < lines_per_chunk; ++i, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

constexpr int kChunkPairs = 8;

template <int kRows, int kColumns>
using Sums = Floats[kRows][kColumns];

template <int kRows, int kColumns>
inline __attribute__((always_inline)) void clear(Sums<kRows, kColumns>& sums) {
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 32
    for (int c = 0; c < kColumns; ++c) sums[r][c] = zeros();
}

// sums[r][c] += rows[r][pair] * columns[c][pair] for one pair of inputs; columns[c] advances by kStride pairs of 16.
template <int kRows, int kColumns>
inline __attribute__((always_inline)) void take_pair(Sums<kRows, kColumns>& sums, const Bf16* row, size_t row_stride,
                                                     const Bf16* const (&columns)[kColumns], size_t offset) {
  Pairs weights[kColumns];
#pragma GCC unroll 32
  for (int c = 0; c < kColumns; ++c) weights[c] = load_pairs(columns[c] + offset);
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r) {
    const Pairs inputs = splat_pair(row + static_cast<size_t>(r) * row_stride);
#pragma GCC unroll 32
    for (int c = 0; c < kColumns; ++c) sums[r][c] = dot_pairs(sums[r][c], inputs, weights[c]);
  }
}

// A register block: kRows rows times kColumns columns of 16 outputs, over `pairs` pairs (a multiple of kChunkPairs).
template <int kRows, int kColumns>
inline __attribute__((always_inline)) void multiply_block(Sums<kRows, kColumns>& sums, const Bf16* rows,
                                                          size_t row_stride, const Bf16* const (&columns)[kColumns],
                                                          int pairs, Prefetch& prefetch) {
  for (int pair = 0; pair < pairs; pair += kChunkPairs) {
    prefetch.take_chunk();
#pragma GCC unroll 4
    for (int i = 0; i < kChunkPairs; ++i)
      take_pair<kRows, kColumns>(sums, rows + 2 * (pair + i), row_stride, columns,
                                 static_cast<size_t>(pair + i) * 2 * kGroupColumns);
  }
}

inline Floats silu(Floats x) {
  constexpr float kLog2E = 1.44269504f;
  // Beyond 2^126 the quotient is 0 either way, and the polynomial's exponent would overflow.
  const Floats exponent = multiply(x, splat(-kLog2E));
  const Floats capped = subtract(zeros(), larger(subtract(zeros(), exponent), splat(-126.0f)));
  return divide(x, add(splat(1.0f), exp2(capped)));
}

inline void emit_floats(const Matmul& job, int row, int group, Floats sums) {
  float* out = job.floats + static_cast<size_t>(row) * job.output_stride + group * kGroupColumns;
  const int columns = job.weights.columns - group * kGroupColumns;
  if (columns < kGroupColumns) {
    float lanes[kGroupColumns];
    store(lanes, sums);
    for (int i = 0; i < columns; ++i) out[i] = job.output == Output::kAdd ? out[i] + lanes[i] : lanes[i];
    return;
  }
  store(out, job.output == Output::kAdd ? add(load(out), sums) : sums);
}

inline void emit_gated(const Matmul& job, int row, int group, Floats gate, Floats up) {
  Bf16* out = job.halves + static_cast<size_t>(row) * job.output_stride + (group / 2) * kGroupColumns;
  store_bf16(out, multiply(silu(gate), up));
}

template <int kRows, int kColumns>
inline __attribute__((always_inline)) void emit_block(const Matmul& job, int row, int group,
                                                      const Sums<kRows, kColumns>& sums) {
  if constexpr (kColumns % 2 == 0) {
    if (job.output == Output::kGate) {
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 32
        for (int c = 0; c < kColumns; c += 2) emit_gated(job, row + r, group + c, sums[r][c], sums[r][c + 1]);
      return;
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 32
    for (int c = 0; c < kColumns; ++c) emit_floats(job, row + r, group + c, sums[r][c]);
}

// Column groups in bf16, `stride` elements apart.
struct Panel {
  const Bf16* values;
  size_t stride;
};

inline Panel panel_of(const PackedMatrix& matrix, int group) {
  return {reinterpret_cast<const Bf16*>(matrix.group(group)), matrix.group_bytes() / sizeof(Bf16)};
}

inline Panel expanded_panel(const PackedMatrix& matrix, Range groups, void* scratch) {
  auto* values = static_cast<Bf16*>(scratch);
  const size_t stride = static_cast<size_t>(matrix.depth) * kGroupColumns;
  expand_steps(matrix, groups, {0, matrix.steps()}, values, stride);
  return {values, stride};
}

template <int kRows, int kColumns>
__attribute__((noinline)) void multiply_rows(const Matmul& job, int row, int group, const Panel& panel,
                                             Prefetch& prefetch) {
  const Bf16* columns[kColumns];
  for (int c = 0; c < kColumns; ++c) columns[c] = panel.values + static_cast<size_t>(c) * panel.stride;
  Sums<kRows, kColumns> sums;
  clear<kRows, kColumns>(sums);
  const Bf16* rows = job.input + static_cast<size_t>(row) * job.input_stride;
  multiply_block<kRows, kColumns>(sums, rows, job.input_stride, columns, job.weights.depth / 2, prefetch);
  emit_block<kRows, kColumns>(job, row, group, sums);
}

// The same when a panel is used once: weights are expanded step by step and never leave the first-level cache.
template <int kRows, int kColumns>
__attribute__((noinline)) void multiply_stepwise(const Matmul& job, int row, int group) {
  alignas(64) Bf16 expanded[kColumns * kStepValues];
  const Bf16* columns[kColumns];
  for (int c = 0; c < kColumns; ++c) columns[c] = expanded + c * kStepValues;
  Sums<kRows, kColumns> sums;
  clear<kRows, kColumns>(sums);
  Prefetch nothing(nullptr, 0, 1);
  const Bf16* rows = job.input + static_cast<size_t>(row) * job.input_stride;
  for (int step = 0; step < job.weights.steps(); ++step) {
    expand_steps(job.weights, {group, group + kColumns}, {step, step + 1}, expanded, kStepValues);
    multiply_block<kRows, kColumns>(sums, rows + step * kDepthMultiple, job.input_stride, columns, kStepPairs, nothing);
  }
  emit_block<kRows, kColumns>(job, row, group, sums);
}

template <int kRows, int kColumns>
inline void multiply_either(const Matmul& job, int row, int group, const Panel& panel, Prefetch& prefetch) {
  if (panel.values == nullptr) return multiply_stepwise<kRows, kColumns>(job, row, group);
  multiply_rows<kRows, kColumns>(job, row, group, panel, prefetch);
}

constexpr int kMostRows = kMaxSums >= 24 ? 6 : kMaxSums >= 6 ? 3 : 1;
constexpr int kMostColumns = kMaxSums >= 24 ? 8 : 2;

// Widest panel whose register block still has room for `rows` rows; latency wants several sums even for one row.
inline int panel_width(int rows) {
  int width = kMostColumns;
  while (width > 1 && width * rows > kMaxSums) width = width > 4 ? width - 2 : width / 2;
  return width;
}

template <int kRows, int kColumns>
inline void choose_columns(const Matmul& job, int row, int group, int columns, const Panel& panel, Prefetch& prefetch) {
  if constexpr (kColumns == 1) {
    multiply_either<kRows, 1>(job, row, group, panel, prefetch);
  } else {
    constexpr int kNarrower = kColumns > 4 ? kColumns - 2 : kColumns / 2;
    if constexpr (kRows * kColumns <= kMaxSums) {
      if (columns == kColumns) return multiply_either<kRows, kColumns>(job, row, group, panel, prefetch);
    }
    choose_columns<kRows, kNarrower>(job, row, group, columns, panel, prefetch);
  }
}

template <int kRows>
inline void choose_rows(const Matmul& job, int row, int rows, int group, int columns, const Panel& panel,
                        Prefetch& prefetch) {
  if constexpr (kRows == 1) {
    choose_columns<1, kMostColumns>(job, row, group, columns, panel, prefetch);
  } else {
    if (rows == kRows) return choose_columns<kRows, kMostColumns>(job, row, group, columns, panel, prefetch);
    choose_rows<kRows - 1>(job, row, rows, group, columns, panel, prefetch);
  }
}

// Widths that have a register block: 1, 2, 4, 6, 8.
inline int allowed_width(int wanted, int widest) {
  const int width = smaller(wanted, widest);
  return width <= 2 ? width : width - width % 2;
}

void matmul(const Matmul& job, Range rows, Range groups, void* scratch) {
  const int tiles = ceil_divide(rows.size(), kMostRows);
  const int tallest = ceil_divide(rows.size(), tiles);
  const int widest = panel_width(tallest);
  const int panels = ceil_divide(groups.size(), widest);
  const int even = ceil_divide(groups.size(), panels);
  const int wanted = even + (even > 1 ? even % 2 : 0);
  const int lines_per_group = static_cast<int>(job.weights.group_bytes() / 64);
  const int steps = tiles * (job.weights.depth / 2 / kChunkPairs);
  for (int group = groups.begin; group < groups.end;) {
    const int width = allowed_width(smaller(wanted, groups.end - group), widest);
    // While one panel is multiplied the next one is fetched, a share during each tile of rows. With a single tile
    // there is nothing to overlap, and the hardware's own prefetching of the sequential weights is faster.
    const bool fetches = tiles > 1 && group + width < groups.end;
    Prefetch prefetch(fetches ? job.weights.group(group + width) : nullptr, lines_per_group * width, steps);
    Panel panel{nullptr, 0};
    if (job.weights.format == Format::kBf16)
      panel = panel_of(job.weights, group);
    else if (tiles > 1)
      panel = expanded_panel(job.weights, {group, group + width}, scratch);
    for (int tile = 0; tile < tiles; ++tile) {
      const int begin = rows.begin + rows.size() * tile / tiles;
      const int end = rows.begin + rows.size() * (tile + 1) / tiles;
      choose_rows<kMostRows>(job, begin, end - begin, group, width, panel, prefetch);
    }
    group += width;
  }
}

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
