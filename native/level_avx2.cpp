#define MEMSERVE_LEVEL avx2
#include "attention_vectors.h"
#include "copy.h"
#include "gemm.h"
#include "probe.h"
#include "rows.h"

namespace memserve::avx2 {

const Kernels kernels = {
    "avx2",     matmul, expand_group, normalise,   place_row,       attention_scratch,
    attend_in_vectors,
    merge_partials, copy_pieces, checksum_pieces, read_memory,
    run_dots,
};

}  // namespace memserve::avx2
