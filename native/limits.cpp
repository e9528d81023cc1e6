#include "limits.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "memory.h"
#include "threads.h"

namespace memserve {
namespace {

constexpr int kRepeats = 5;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double measure_read_bandwidth(const Kernels& kernels, int threads, size_t bytes) {
  ThreadPool pool(threads);
  Buffer<char> memory(bytes);
  std::fill(memory.data(), memory.data() + bytes, '\1');
  constexpr int kItems = 64;
  const size_t share = bytes / kItems / 4096 * 4096;
  std::atomic<uint64_t> seen{0};
  double best = 0.0;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    pool.run(kItems, [&](int item, int) { seen += kernels.read_memory(memory.data() + share * item, share); });
    best = std::max(best, static_cast<double>(share) * kItems / seconds_since(start));
  }
  return best;
}

double measure_dot_peak(const Kernels& kernels, int threads, Activations activations) {
  const auto run_dots = activations == Activations::kInt8 ? kernels.run_int8_dots : kernels.run_dots;
  constexpr double kSeconds = 0.02;
  ThreadPool pool(threads);
  float sink = 0.0f;
  int64_t rounds = 1000;
  auto start = std::chrono::steady_clock::now();
  while (run_dots(rounds, &sink), seconds_since(start) < kSeconds) {
    rounds *= 2;
    start = std::chrono::steady_clock::now();
  }
  double best = 0.0;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    std::vector<double> flops(static_cast<size_t>(threads));
    start = std::chrono::steady_clock::now();
    pool.run(threads, [&](int item, int) {
      float own = 0.0f;
      flops[static_cast<size_t>(item)] = run_dots(rounds, &own);
    });
    double total = 0.0;
    for (double f : flops) total += f;
    best = std::max(best, total / seconds_since(start));
  }
  return best;
}

}  // namespace memserve
