#include "isa.h"

#include <algorithm>
#include <stdexcept>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace memserve {
namespace {

#if defined(__x86_64__)

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}

bool has_bit(unsigned value, int bit) { return (value >> bit) & 1u; }

// Register state that the operating system saves at a context switch; without it an instruction traps.
unsigned saved_state() {
  if (!has_bit(cpuid(1, 0).c, 27)) return 0;
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

bool saves(unsigned mask) { return (saved_state() & mask) == mask; }

constexpr unsigned kYmmState = 0x6;
constexpr unsigned kZmmState = 0xe6;
constexpr unsigned kTileState = 0x60000;

bool has_avx2() { return saves(kYmmState) && has_bit(cpuid(7, 0).b, 5) && has_bit(cpuid(1, 0).c, 12); }

bool has_avx512_bf16() {
  const unsigned features = cpuid(7, 0).b;
  const bool foundation = has_bit(features, 16) && has_bit(features, 17);  // F, DQ
  const bool widths = has_bit(features, 30) && has_bit(features, 31);      // BW, VL
  const bool vnni = has_bit(cpuid(7, 0).c, 11);
  return has_avx2() && saves(kZmmState) && foundation && widths && vnni && has_bit(cpuid(7, 1).a, 5);
}

// Linux grants the 8 KiB of tile state only to processes that ask for it.
bool request_tile_permission() {
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_amx_bf16() {
  const unsigned features = cpuid(7, 0).d;
  const bool tiles = has_bit(features, 22) && has_bit(features, 24);  // AMX-BF16, AMX-TILE
  return has_avx512_bf16() && tiles && saves(kTileState) && request_tile_permission();
}

std::vector<const Kernels*> detect() {
  std::vector<const Kernels*> found;
  if (has_amx_bf16()) found.push_back(&amx_bf16::kernels);
  if (has_avx512_bf16()) found.push_back(&avx512_bf16::kernels);
  if (has_avx2()) found.push_back(&avx2::kernels);
  found.push_back(&portable::kernels);
  return found;
}

#elif defined(__aarch64__)

bool has_bf16() {
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
  constexpr unsigned long kBf16 = 1ul << 14;         // HWCAP2_BF16, which older headers lack
  return (getauxval(AT_HWCAP) & kDotProducts) != 0 && (getauxval(AT_HWCAP2) & kBf16) != 0;
}

// Every core of this architecture has NEON with fused multiply-add.
std::vector<const Kernels*> detect() {
  if (has_bf16()) return {&neon_bf16::kernels, &neon::kernels, &portable::kernels};
  return {&neon::kernels, &portable::kernels};
}

#else

std::vector<const Kernels*> detect() { return {&portable::kernels}; }

#endif

const std::vector<const Kernels*>& detected() {
  static const std::vector<const Kernels*> found = detect();
  return found;
}

const std::vector<const Kernels*>& emulated() {
  static const std::vector<const Kernels*> found = {&amx_emulated::kernels};
  return found;
}

std::vector<std::string> names(const std::vector<const Kernels*>& levels) {
  std::vector<std::string> result;
  for (const Kernels* level : levels) result.emplace_back(level->name);
  return result;
}

const Kernels* find(const std::vector<const Kernels*>& levels, const std::string& name) {
  const auto at = std::find_if(levels.begin(), levels.end(), [&](const Kernels* k) { return name == k->name; });
  return at == levels.end() ? nullptr : *at;
}

}  // namespace

std::vector<std::string> supported_levels() { return names(detected()); }

std::vector<std::string> emulated_levels() { return names(emulated()); }

const Kernels& kernels_of(const std::string& level) {
  if (const Kernels* found = find(detected(), level)) return *found;
  if (const Kernels* found = find(emulated(), level)) return *found;
  std::string known;
  for (const std::string& name : supported_levels()) known += (known.empty() ? "" : ", ") + name;
  throw std::invalid_argument("isa '" + level + "' does not run on this machine; it offers " + known);
}

}  // namespace memserve
