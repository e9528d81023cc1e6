#define MEMSERVE_LEVEL avx2
#include "copy.h"
namespace memserve::avx2 {
const Kernels kernels = {"avx2", copy_pieces, checksum_pieces};
}
