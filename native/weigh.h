// What a request would cost at each place, in seconds: the policy `cost` in one pass over the fleet.
//
// The terms are explained in docs/scheduling.md. Sums and products are taken in the order written and rounded one by one, so
// that whoever prices a place again in Python gets the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace memserve {

// Rows of the fleet's table, one value per slot each: `Columns` of scheduler/fleet.py, in its order.
enum FleetRow : size_t {
  kStep,
  kRow,
  kRowContext,
  kToken,
  kTokenContext,
  kStretch,
  kFreeAt,
  kStreams,
  kContext,
  kRoom,
  kSwap,
  kLine,
  kFleetRows
};

struct FleetTable {
  const double* values;
  size_t slots;
  double get(FleetRow row, size_t slot) const { return values[row * slots + slot]; }
};

// The instances with a bit in `mask`, lowest byte first, hold `tokens` tokens of the prompt.
struct HeldTier {
  double tokens;
  const uint8_t* mask;
  size_t bytes;
};

struct Question {
  double prompt;  // tokens
  double answer;  // tokens expected
  double now;
  double behind;  // requests in line for each place to prefill: who computes there keeps all of them waiting
  double wire_latency;
  double wire_token;  // seconds per token of KV
  // The longest first; of an instance that occurs twice the longer counts.
  std::vector<HeldTier> held;       // what instances will hold when the prompt's turn comes
  std::vector<HeldTier> lowered;    // of them those of whose KV only so much lies on the device
  std::vector<HeldTier> fetchable;  // what they can send now, the longest few
};

// The slots where a request may begin, what they do, and the slots that take requests over.
struct PlaceLists {
  const int64_t* start;
  const bool* only_decodes;
  const bool* hands_over;
  size_t starts;
  const int64_t* decode;
  size_t decodes;
};

struct CostWeights {
  double opportunity;
  double append;
  double line;
  double streams;
  double decode;
};

// Seconds to bring KV to a place, seconds of all that counts, and which of `fetchable` is fetched (-1: nothing).
struct Figures {
  double fetch;
  double total;
  int64_t fetched;
};
static_assert(sizeof(Figures) == 24, "Python unpacks it");

// `place` counts in its list.
struct WeighedPlace {
  size_t place;
  Figures figures;
};

struct Verdict {
  std::vector<WeighedPlace> start;   // the cheapest, cheapest first; the first in the list goes before its equals
  std::vector<WeighedPlace> decode;  // the same
  double wait;                       // at the cheapest to start: until the prompt's turn, and KV that is fetched is there
  double prefill;                    // and from then to the first token
  double answering;                  // at the cheapest to decode: of the request's own answer, weighted
  int64_t source;                    // the slot that sends what the cheapest fetches: free first; -1 if nothing is
};

// `starts` and `decodes`: how many of the cheapest are wanted. Slots lie in the table; there is a place to start.
Verdict weigh_places(const FleetTable& fleet, const PlaceLists& places, const Question& question,
                     const CostWeights& weights, size_t starts, size_t decodes);

}  // namespace memserve
