// Passes over the tokens of a prompt: where it parts from another, and what is remembered of its chunks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace memserve {

// How many leading tokens agree; at most `size` are looked at.
size_t common_prefix(const int32_t* a, const int32_t* b, size_t size);

// One chunk of a prompt in the table of what was published: 16 bytes; `uses` 0 means an empty place.
struct Remembered {
  double stamp;
  uint32_t print;
  uint8_t uses;
  uint8_t follows;
  uint16_t unused;
};
static_assert(sizeof(Remembered) == 16, "the table is allocated in Python");

// So many consecutive chunks have the same past.
struct PastRun {
  size_t chunks;
  uint8_t uses;
  uint8_t follows;
  double stamp;
};

struct PromptToRecall {
  const int32_t* tokens;
  size_t count;
  size_t span;  // tokens of a chunk
  uint64_t seed;
};

// What the table (a power of two of places) holds of the prompt's chunks, from the first to the last known one; a chunk
// that was overwritten is taken to be like the next. From now on each was used once more, at `stamp`; one that is new
// follows what was used `follows` times.
//
// The fingerprint of a chunk covers every eighth token before it and three of its beginning.
std::vector<PastRun> recall_prefix(Remembered* table, size_t places, const PromptToRecall& prompt, uint8_t follows,
                                   double stamp);

}  // namespace memserve
