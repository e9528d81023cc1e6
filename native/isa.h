// Which instruction-set levels this CPU can run. Knows nothing about what is computed on them.
#pragma once

#include <string>
#include <vector>

namespace memserve {

struct Kernels;

// Levels that this machine runs, the best first; `portable` is always the last.
std::vector<std::string> supported_levels();

// Levels that exist for tests only: slow, but they exercise code that this CPU may lack instructions for.
std::vector<std::string> emulated_levels();

// The kernels of a level. Throws std::invalid_argument if this machine cannot run it.
const Kernels& kernels_of(const std::string& level);

}  // namespace memserve
