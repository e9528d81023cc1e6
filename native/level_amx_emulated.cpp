#define MEMSERVE_LEVEL amx_emulated
#include "attention_tiles.h"
#include "copy.h"
#include "gemm_tiles.h"
#include "gemm_int8.h"
#include "probe.h"
#include "probe_tiles.h"
#include "quantise.h"
#include "rows.h"

namespace memserve::amx_emulated {

const Kernels kernels = {
    "amx-emulated", matmul_in_tiles, matmul_int8, quantise, expand_group, normalise,   place_row,       attention_scratch,
    attend_in_tiles,  merge_partials,  copy_pieces, checksum_pieces, read_memory,
    run_tile_dots, run_int8_dots,
};

}  // namespace memserve::amx_emulated
