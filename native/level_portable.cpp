#define MEMSERVE_LEVEL portable
#include "attention_vectors.h"
#include "copy.h"
#include "gemm.h"
#include "probe.h"
#include "rows.h"

namespace memserve::portable {

const Kernels kernels = {
    "portable",     matmul, expand_group, normalise,   place_row,       attention_scratch,
    attend_in_vectors,
    merge_partials, copy_pieces, checksum_pieces, read_memory,
    run_dots,
};

}  // namespace memserve::portable
