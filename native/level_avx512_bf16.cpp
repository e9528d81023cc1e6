#define MEMSERVE_LEVEL avx512_bf16
#include "copy.h"
namespace memserve::avx512_bf16 {
const Kernels kernels = {"avx512-bf16", copy_pieces, checksum_pieces};
}
