// One matrix product on its own, for tests against a model of its arithmetic.
#pragma once

#include "kernels.h"
#include "pack.h"

namespace memserve {

// outputs, [rows][source.rows], = inputs, [rows][source.inputs], times the packed source, on the caller's thread.
// Throws std::invalid_argument if a scale is not finite.
void multiply_once(const Kernels& kernels, const MatrixSource& source, Keep keep, Activations activations,
                   const Bf16* inputs, int rows, float* outputs);

}  // namespace memserve
