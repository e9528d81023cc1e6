#define MEMSERVE_LEVEL amx_emulated
#include "copy.h"
namespace memserve::amx_emulated {
const Kernels kernels = {"amx-emulated", copy_pieces, checksum_pieces};
}
