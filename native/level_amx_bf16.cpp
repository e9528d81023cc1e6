#define MEMSERVE_LEVEL amx_bf16
#include "attention_tiles.h"
#include "copy.h"
#include "gemm_tiles.h"
#include "probe.h"
#include "probe_tiles.h"
#include "rows.h"

namespace memserve::amx_bf16 {

const Kernels kernels = {
    "amx-bf16", matmul_in_tiles, expand_group, normalise,   place_row,       attention_scratch,
    attend_in_tiles,  merge_partials,  copy_pieces, checksum_pieces, read_memory,
    run_tile_dots,
};

}  // namespace memserve::amx_bf16
