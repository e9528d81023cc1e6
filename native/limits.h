// What this machine can do at most, measured: the floors that benchmarks compare with.
#pragma once

#include "kernels.h"

namespace memserve {

// Bytes per second at which `threads` threads together read memory that no cache holds.
double measure_read_bandwidth(const Kernels& kernels, int threads, size_t bytes);

// Operations (two per multiply-add) per second of dot products whose operands stay in registers.
double measure_dot_peak(const Kernels& kernels, int threads, Activations activations);

}  // namespace memserve
