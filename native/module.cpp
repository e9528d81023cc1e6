// The Python module memserve._native: argument checks and conversions only.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "isa.h"
#include "kernels.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace memserve {
namespace {

using Addresses = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Checksums = nb::ndarray<nb::numpy, uint64_t, nb::ndim<1>>;

const Kernels*& default_kernels() {
  static const Kernels* chosen = &kernels_of(supported_levels().front());
  return chosen;
}

void set_isa(const std::string& name) { default_kernels() = &kernels_of(name); }

std::string isa() { return default_kernels()->name; }

Checksums new_checksums(size_t count) {
  auto* values = new uint64_t[count];
  nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<uint64_t*>(p); });
  return Checksums(values, {count}, owner);
}

size_t checked_size(int64_t nbytes) {
  if (nbytes < 0) throw std::invalid_argument("nbytes is " + std::to_string(nbytes) + "; it must not be negative");
  return static_cast<size_t>(nbytes);
}

Checksums copy_blocks(const Addresses& dst, const Addresses& src, int64_t nbytes) {
  if (dst.shape(0) != src.shape(0))
    throw std::invalid_argument("dst has " + std::to_string(dst.shape(0)) + " addresses and src " +
                                std::to_string(src.shape(0)) + "; they must be as many");
  Checksums checksums = new_checksums(src.shape(0));
  const CopyJob job{dst.data(), src.data(), checksums.data(), src.shape(0), checked_size(nbytes)};
  const Kernels* kernels = default_kernels();
  nb::gil_scoped_release unlocked;
  kernels->copy_pieces(job);
  return checksums;
}

Checksums checksum_blocks(const Addresses& src, int64_t nbytes) {
  Checksums checksums = new_checksums(src.shape(0));
  const CopyJob job{nullptr, src.data(), checksums.data(), src.shape(0), checked_size(nbytes)};
  const Kernels* kernels = default_kernels();
  nb::gil_scoped_release unlocked;
  kernels->checksum_pieces(job);
  return checksums;
}

}  // namespace
}  // namespace memserve

NB_MODULE(_native, m) {
  using namespace memserve;
  m.def("isa", &isa);
  m.def("supported_isas", &supported_levels);
  m.def("emulated_isas", &emulated_levels);
  m.def("set_isa", &set_isa, "name"_a);
  m.def("copy_blocks", &copy_blocks, "dst"_a, "src"_a, "nbytes"_a);
  m.def("checksum_blocks", &checksum_blocks, "src"_a, "nbytes"_a);
}
