// What the module offers to the scheduler: see weigh.h.
#pragma once

#include <nanobind/nanobind.h>

namespace memserve {

void bind_scheduler_passes(nanobind::module_& m);

}  // namespace memserve
