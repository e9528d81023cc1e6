#define MEMSERVE_LEVEL amx_bf16
#include "copy.h"
namespace memserve::amx_bf16 {
const Kernels kernels = {"amx-bf16", copy_pieces, checksum_pieces};
}
