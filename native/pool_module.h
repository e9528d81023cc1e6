// What the module offers to the pool's index: see blocks.h and prefixes.h.
#pragma once

#include <nanobind/nanobind.h>

namespace memserve {

void bind_pool_passes(nanobind::module_& m);

}  // namespace memserve
