#define MEMSERVE_LEVEL portable
#include "copy.h"
namespace memserve::portable {
const Kernels kernels = {"portable", copy_pieces, checksum_pieces};
}
