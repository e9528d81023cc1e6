#define MEMSERVE_LEVEL neon
#define MEMSERVE_NEON
#include "attention_vectors.h"
#include "copy.h"
#include "gemm_int8.h"
#include "probe.h"
#include "quantise.h"
#include "rows.h"

namespace memserve::neon {

const Kernels kernels = {
    "neon",     matmul, matmul_int8, quantise, expand_group, normalise,   place_row,       attention_scratch,
    attend_in_vectors,
    merge_partials, copy_pieces, checksum_pieces, read_memory,
    run_dots, run_int8_dots,
};

}  // namespace memserve::neon
