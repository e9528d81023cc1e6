#include "product.h"

#include <algorithm>
#include <stdexcept>

#include "memory.h"

namespace memserve {
namespace {

int padded_depth(int inputs) { return (inputs + kDepthMultiple - 1) / kDepthMultiple * kDepthMultiple; }

}  // namespace

void multiply_once(const Kernels& kernels, const MatrixSource& source, Keep keep, Activations activations,
                   const Bf16* inputs, int rows, float* outputs) {
  PackedMatrix weights{nullptr, packed_format(source.stored, keep), source.rows, padded_depth(source.inputs)};
  Buffer<unsigned char> memory(weights.bytes());
  weights.values = memory.data();
  const SourceRows source_rows(source);
  for (int group = 0; group < weights.groups(); ++group)
    if (!pack_group(weights, group, source_rows)) throw std::invalid_argument("a scale is not a finite number");
  const size_t depth = static_cast<size_t>(weights.depth);
  Buffer<Bf16> padded((static_cast<size_t>(rows) + kRowPadding) * depth);
  for (int row = 0; row < rows; ++row)
    std::copy_n(inputs + static_cast<size_t>(row) * source.inputs, source.inputs, padded.data() + row * depth);
  Buffer<InputGroup> groups(static_cast<size_t>(rows) * weights.steps());
  Matmul job{weights, padded.data(), depth, Output::kStore, outputs, nullptr, static_cast<size_t>(source.rows)};
  if (activations == Activations::kBf16 || weights.format == Format::kBf16) {
    Buffer<char> scratch(panel_bytes(weights.depth));
    return kernels.matmul(job, {0, rows}, {0, weights.groups()}, scratch.data());
  }
  job.groups = groups.data();
  for (int row = 0; row < rows; ++row)
    kernels.quantise({padded.data() + row * depth, groups.data() + static_cast<size_t>(row) * weights.steps(),
                      weights.depth});
  kernels.matmul_int8(job, {0, rows}, {0, weights.groups()});
}

}  // namespace memserve
