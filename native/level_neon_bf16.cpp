#define MEMSERVE_LEVEL neon_bf16
#define MEMSERVE_NEON
#include "attention_vectors.h"
#include "copy.h"
#include "gemm.h"
#include "probe.h"
#include "rows.h"

namespace memserve::neon_bf16 {

const Kernels kernels = {
    "neon-bf16",     matmul, expand_group, normalise,   place_row,       attention_scratch,
    attend<VectorProducts>,
    merge_partials, copy_pieces, checksum_pieces, read_memory,
    run_dots,
};

}  // namespace memserve::neon_bf16
