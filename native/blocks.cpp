#include "blocks.h"

#include <stdexcept>
#include <string>

namespace memserve {
namespace {

constexpr int32_t kFree = 0;
constexpr int32_t kIndexed = 1;
constexpr int32_t kReference = 2;
constexpr int kTiers = 3;
constexpr uint64_t kNumberMask = (uint64_t{1} << 30) - 1;
constexpr uint64_t kGenerationMask = (uint64_t{1} << 32) - 1;

size_t number_of(uint64_t address) { return static_cast<size_t>((address >> 32) & kNumberMask); }

int tier_of(uint64_t address) { return static_cast<int>(address >> 62); }

bool is_present(const BlockColumns& table, uint64_t address) {
  const size_t number = number_of(address);
  return number < table.blocks && table.addresses[number] == address;
}

[[noreturn]] void refuse(size_t blocks, int64_t number) {
  throw std::out_of_range("there is no block " + std::to_string(number) + " of " + std::to_string(blocks));
}

size_t checked(size_t blocks, int64_t number) {
  if (static_cast<uint64_t>(number) >= blocks) refuse(blocks, number);
  return static_cast<size_t>(number);
}

// Historical blocks that have come or gone, per tier: counted here, and noted in the table at the end of a pass.
class HistoricalChange {
 public:
  explicit HistoricalChange(const BlockColumns& table) : table_(table) {}
  ~HistoricalChange() {
    for (int tier = 0; tier < kTiers; ++tier) table_.historical[tier] += change_[tier];
  }

  void add(uint64_t address, int64_t count) { change_[tier_of(address)] += count; }

 private:
  const BlockColumns& table_;
  int64_t change_[4] = {};
};

bool add_reference(const BlockColumns& table, size_t number, HistoricalChange& change) {
  const int32_t uses = table.uses[number];
  if (uses == kFree) return false;
  if (uses == kIndexed) change.add(table.addresses[number], -1);
  table.uses[number] = uses + kReference;
  return true;
}

void start_generation(uint64_t& address) {
  address = (address & ~kGenerationMask) | ((address + 1) & kGenerationMask);
}

}  // namespace

size_t resolve(const BlockColumns& table, Span<const uint64_t> addresses, int64_t* numbers) {
  for (size_t i = 0; i < addresses.size; ++i) {
    if (!is_present(table, addresses.data[i])) return i;
    numbers[i] = static_cast<int64_t>(number_of(addresses.data[i]));
  }
  return addresses.size;
}

void occupy(const BlockColumns& table, Numbers stacked, uint64_t* addresses) {
  for (size_t i = stacked.size; i > 0; --i) {
    const size_t number = checked(table.blocks, stacked.data[i - 1]);
    table.uses[number] = kReference;
    *addresses++ = table.addresses[number];
  }
}

size_t retain(const BlockColumns& table, Numbers numbers) {
  HistoricalChange change(table);
  for (size_t i = 0; i < numbers.size; ++i)
    if (!add_reference(table, checked(table.blocks, numbers.data[i]), change)) return i;
  return numbers.size;
}

size_t lease(const BlockColumns& table, const std::vector<Edge>& edges, uint64_t* addresses, uint8_t* origins) {
  HistoricalChange change(table);
  size_t done = 0;
  for (const Edge& edge : edges) {
    for (int32_t block : edge) {
      const size_t number = checked(table.blocks, block);
      if (!add_reference(table, number, change)) return done;
      addresses[done] = table.addresses[number];
      origins[done++] = table.origins[number];
    }
  }
  return done;
}

Released release(const BlockColumns& table, Span<const uint64_t> addresses, int64_t* freed) {
  HistoricalChange change(table);
  Released result{0, 0};
  for (uint64_t address : addresses) {
    const size_t number = number_of(address);
    if (!is_present(table, address) || table.uses[number] < kReference) {
      ++result.stale;
      continue;
    }
    const int32_t uses = table.uses[number] -= kReference;
    if (uses == kIndexed) change.add(address, 1);
    if (uses != kFree) continue;
    start_generation(table.addresses[number]);
    freed[result.freed++] = static_cast<int64_t>(number);
  }
  return result;
}

bool enter_index(const BlockColumns& table, Numbers numbers, uint8_t origin) {
  for (size_t i = 0; i < numbers.size; ++i) {
    int32_t& uses = table.uses[checked(table.blocks, numbers.data[i])];
    if (uses == kFree || (uses & kIndexed) != 0) {
      while (i > 0) table.uses[numbers.data[--i]] &= ~kIndexed;
      return false;
    }
    uses |= kIndexed;
  }
  for (int64_t number : numbers) table.origins[number] = origin;
  return true;
}

size_t leave_index(const BlockColumns& table, const std::vector<Edge>& edges, int64_t* freed) {
  HistoricalChange change(table);
  size_t count = 0;
  for (const Edge& edge : edges) {
    for (int32_t block : edge) {
      const size_t number = checked(table.blocks, block);
      int32_t& uses = table.uses[number];
      const bool historical = uses == kIndexed;
      uses &= ~kIndexed;
      if (!historical) continue;
      change.add(table.addresses[number], -1);
      start_generation(table.addresses[number]);
      freed[count++] = block;
    }
  }
  return count;
}

size_t idle_tail(const BlockColumns& table, Edge edge) {
  size_t idle = 0;
  while (idle < edge.size && table.uses[checked(table.blocks, edge.data[edge.size - 1 - idle])] < kReference) ++idle;
  return idle;
}

size_t count_different(const std::vector<Edge>& edges, Numbers numbers) {
  size_t at = 0, different = 0;
  for (const Edge& edge : edges) {
    if (numbers.size - at < edge.size) throw std::invalid_argument("fewer numbers than blocks to compare with");
    for (int32_t block : edge) different += numbers.data[at++] != block;
  }
  return different;
}

}  // namespace memserve
