#include "threads.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>

namespace memserve {
namespace {

constexpr auto kSpin = std::chrono::microseconds(20);

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_sleepers(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// True as soon as `condition` holds, false after kSpin.
template <class Condition>
bool spin_until(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (condition()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

std::vector<int> usable_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  sched_getaffinity(0, sizeof set, &set);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  return cpus;
}

void pin_thread(std::thread& thread, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);
}

void check_cores(const std::vector<int>& cores, int threads, const std::vector<int>& usable) {
  if (!cores.empty() && static_cast<int>(cores.size()) != threads)
    throw std::invalid_argument(std::to_string(cores.size()) + " cores for " + std::to_string(threads) + " threads");
  for (size_t i = 0; i < cores.size(); ++i) {
    const std::string core = "core " + std::to_string(cores[i]);
    if (std::find(usable.begin(), usable.end(), cores[i]) == usable.end())
      throw std::invalid_argument(core + " is none that this process may use");
    if (std::find(cores.begin(), cores.begin() + static_cast<std::ptrdiff_t>(i), cores[i]) - cores.begin() <
        static_cast<std::ptrdiff_t>(i))
      throw std::invalid_argument(core + " is there twice");
  }
}

uint32_t unclaimed(uint64_t ticket) { return static_cast<uint32_t>(ticket); }

}  // namespace

ThreadPool::ThreadPool(int threads, const std::vector<int>& cores) {
  const std::vector<int> cpus = usable_cpus();
  const int available = static_cast<int>(cpus.size());
  if (threads < 1 || threads > available)
    throw std::invalid_argument("threads is " + std::to_string(threads) + "; this process may use 1 to " +
                                std::to_string(available) + " cores");
  check_cores(cores, threads, cpus);
  for (int thread = 1; thread < threads; ++thread) {
    workers_.emplace_back(&ThreadPool::work, this, thread);
    if (!cores.empty()) pin_thread(workers_.back(), cores[static_cast<size_t>(thread)]);
  }
}

ThreadPool::~ThreadPool() {
  stopping_ = true;
  ++signal_;
  wake_sleepers(signal_);
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run_job(Job job) {
  if (job.items == 0) return;
  job_ = job;
  done_ = 0;
  const uint64_t step = (ticket_.load() >> 32) + 1;
  ticket_ = (step << 32) | static_cast<uint32_t>(job.items);
  ++signal_;
  if (sleepers_ > 0) wake_sleepers(signal_);
  while (take_item(0)) {
  }
  wait_until_done();
}

bool ThreadPool::take_item(int thread) {
  uint64_t ticket = ticket_.load();
  do {
    if (unclaimed(ticket) == 0) return false;
  } while (!ticket_.compare_exchange_weak(ticket, ticket - 1));
  job_.call(job_.context, job_.items - static_cast<int>(unclaimed(ticket)), thread);
  ++done_;
  if (caller_sleeps_) wake_sleepers(done_);
  return true;
}

void ThreadPool::work(int thread) {
  while (!stopping_)
    if (!take_item(thread)) wait_for_work();
}

void ThreadPool::wait_for_work() {
  if (spin_until([&] { return unclaimed(ticket_.load(std::memory_order_relaxed)) != 0 || stopping_; })) return;
  const uint32_t seen = signal_;
  ++sleepers_;
  if (unclaimed(ticket_) == 0 && !stopping_) sleep_while(signal_, seen);
  --sleepers_;
}

void ThreadPool::wait_until_done() {
  const auto items = static_cast<uint32_t>(job_.items);
  if (spin_until([&] { return done_.load(std::memory_order_acquire) == items; })) return;
  caller_sleeps_ = true;
  for (uint32_t done = done_; done != items; done = done_) sleep_while(done_, done);
  caller_sleeps_ = false;
}

}  // namespace memserve
