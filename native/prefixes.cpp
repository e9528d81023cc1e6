#include "prefixes.h"

#include <algorithm>
#include <cstring>

namespace memserve {
namespace {

constexpr size_t kStride = 8;
constexpr size_t kSampled[] = {0, 3, 7};
constexpr size_t kLanes = 4;
constexpr uint64_t kPrime = 0x9E3779B97F4A7C15u;
constexpr uint8_t kMostUses = 255;
constexpr size_t kCompared = 256;  // bytes per memcmp: short, so that the place of a difference is near

uint64_t mixed(uint64_t hash, uint64_t value) {
  const uint64_t x = (hash ^ value) * kPrime;
  return x ^ (x >> 29);
}

// Fingerprints of the chunks of a prompt, one after the other.
class Fingerprints {
 public:
  explicit Fingerprints(const PromptToRecall& prompt) : prompt_(prompt) {
    for (size_t lane = 0; lane < kLanes; ++lane) lanes_[lane] = mixed(prompt.seed, lane + 1);
  }

  uint64_t of_next_chunk() {
    uint64_t print = 0;
    for (uint64_t lane : lanes_) print = mixed(print, lane);
    for (size_t offset : kSampled)
      if (at_ + offset < prompt_.count) print = mixed(print, token(at_ + offset));
    // Lanes do not wait for each other's multiplications.
    const size_t end = std::min(at_ + prompt_.span, prompt_.count);
    for (size_t lane = 0; at_ < end; at_ += kStride, lane = (lane + 1) % kLanes)
      lanes_[lane] = mixed(lanes_[lane], token(at_));
    at_ = end;
    return print;
  }

 private:
  uint64_t token(size_t at) const { return static_cast<uint32_t>(prompt_.tokens[at]); }

  const PromptToRecall& prompt_;
  uint64_t lanes_[kLanes];
  size_t at_ = 0;
};

void add_chunk(std::vector<PastRun>& runs, const Remembered& past) {
  if (!runs.empty()) {
    PastRun& last = runs.back();
    if (last.uses == past.uses && last.follows == past.follows && last.stamp == past.stamp) {
      ++last.chunks;
      return;
    }
  }
  runs.push_back({1, past.uses, past.follows, past.stamp});
}

}  // namespace

size_t common_prefix(const int32_t* a, const int32_t* b, size_t size) {
  constexpr size_t step = kCompared / sizeof(int32_t);
  size_t at = 0;
  while (at + step <= size && std::memcmp(a + at, b + at, kCompared) == 0) at += step;
  while (at < size && a[at] == b[at]) ++at;
  return at;
}

std::vector<PastRun> recall_prefix(Remembered* table, size_t places, const PromptToRecall& prompt, uint8_t follows,
                                   double stamp) {
  const size_t chunks = (prompt.count + prompt.span - 1) / prompt.span;
  std::vector<uint64_t> prints(chunks);
  Fingerprints fingerprints(prompt);
  for (uint64_t& print : prints) {
    print = fingerprints.of_next_chunk();
    __builtin_prefetch(table + (print & (places - 1)), 1);
  }
  size_t known = 0;
  std::vector<Remembered> pasts(chunks);
  for (size_t i = 0; i < chunks; ++i) {
    Remembered& place = table[prints[i] & (places - 1)];
    const auto print = static_cast<uint32_t>(prints[i] >> 32);
    if (place.uses != 0 && place.print == print) {
      std::fill(pasts.begin() + known, pasts.begin() + i + 1, place);
      known = i + 1;
    }
  }
  std::vector<PastRun> runs;
  for (size_t i = 0; i < chunks; ++i) {
    Remembered now{stamp, static_cast<uint32_t>(prints[i] >> 32), 1, follows, 0};
    if (i < known) {
      add_chunk(runs, pasts[i]);
      now.uses = static_cast<uint8_t>(std::min<int>(pasts[i].uses + 1, kMostUses));
      now.follows = pasts[i].follows;
    }
    table[prints[i] & (places - 1)] = now;
  }
  return runs;
}

}  // namespace memserve
