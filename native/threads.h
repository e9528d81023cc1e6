// A small thread pool for many short parallel steps: workers spin for about 20 us after a step, then sleep.
// The caller works too and never waits for a worker that has claimed nothing, so a descheduled worker costs nothing.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace memserve {

class ThreadPool {
 public:
  // `threads` counts the caller. Unless `cores` is empty it has a CPU for each thread: workers stay on theirs, the
  // caller, which comes first, is left where it is. Throws std::invalid_argument if the process may not use those, or
  // not as many as there are threads.
  explicit ThreadPool(int threads, const std::vector<int>& cores = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Call take(item, thread) for each item in [0, items), in any order and on any thread; return when all are done.
  template <class Take>
  void run(int items, const Take& take) {
    if (items == 1 || workers_.empty()) {
      for (int item = 0; item < items; ++item) take(item, 0);
      return;
    }
    run_job({[](const void* context, int item, int thread) { (*static_cast<const Take*>(context))(item, thread); },
             &take, items});
  }

 private:
  struct Job {
    void (*call)(const void* context, int item, int thread);
    const void* context;
    int items;
  };

  void run_job(Job job);
  void work(int thread);
  bool take_item(int thread);
  void wait_for_work();
  void wait_until_done();

  // Step number in the high half, unclaimed items in the low half: a claim made by compare-and-swap can only succeed
  // in the step it was read in, and then the step cannot end (nor job_ change) before the item is done.
  std::atomic<uint64_t> ticket_{0};
  std::atomic<uint32_t> done_{0};
  std::atomic<uint32_t> signal_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> stopping_{false};
  Job job_{};
  std::vector<std::thread> workers_;
};

}  // namespace memserve
