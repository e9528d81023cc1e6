#include "weigh.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace memserve {
namespace {

// A fetch must bring the first token to this part of the time it takes without: forecasts err.
constexpr double kLeastGain = 0.9;

struct Prefill {
  double wait;
  double fetch;
  double work;     // to compute what is missing, if nothing else ran, and to swap in what lies below the device
  double prefill;  // the same beside the streams that are decoded there; they stand still during a swap
  int64_t fetched;
  double ttft() const { return wait + prefill; }
};

struct Streams {
  double own;
  double others;
};

class Weighing {
 public:
  Weighing(const FleetTable& fleet, const Question& question, const CostWeights& weights)
      : fleet_(fleet), question_(question), weights_(weights), held_(spread(std::vector<double>(fleet.slots), question.held)) {
    if (!question.lowered.empty()) device_ = spread(held_, question.lowered);
  }

  double held(size_t slot) const { return held_[slot]; }

  double on_device(size_t slot) const { return device_.empty() ? held_[slot] : device_[slot]; }

  // Seconds to bring up all that lies below the device.
  double swap(size_t slot) const { return get(kSwap, slot) * (held_[slot] - on_device(slot)); }

  Prefill prefill(size_t slot, double computed, double swap, double fetch, int64_t fetched) const {
    const double prompt = question_.prompt;
    const double context = get(kTokenContext, slot) * (0.5 * (prompt + computed));
    const double work = (prompt - computed) * (get(kToken, slot) + context);
    const double wait = std::max(get(kFreeAt, slot) - question_.now, fetch);
    return {wait, fetch, work + swap, work * get(kStretch, slot) + swap, fetched};
  }

  // As engines do: with all that is held, or, where computing is quicker than swapping in, with what is on the device.
  Prefill prefill_local(size_t slot) const {
    const double there = held_[slot], above = on_device(slot), seconds = swap(slot), below = there - above;
    const double again = below * (get(kToken, slot) + get(kTokenContext, slot) * (0.5 * (there + above)));
    return seconds > again ? prefill(slot, above, 0.0, 0.0, -1) : prefill(slot, there, seconds, 0.0, -1);
  }

  // With the longest of the prefixes that are worth fetching, or without any.
  Prefill best_prefill(size_t slot, size_t lengths, double least) const {
    const double there = held_[slot];
    Prefill best = prefill_local(slot);
    for (size_t number = 0; number < lengths; ++number) {
      const double longer = fetchable(number);
      if (longer <= least) break;
      const double missing = longer - there;
      if (missing <= 0) continue;
      const double fetch = question_.wire_latency + question_.wire_token * missing;
      // Who receives KV swaps in first what it has of the prompt.
      const Prefill fetching = prefill(slot, there + missing, swap(slot), fetch, static_cast<int64_t>(number));
      if (fetching.ttft() < kLeastGain * best.ttft()) best = fetching;
    }
    return best;
  }

  // What the answer takes beside what is decoded there, and what it costs those.
  Streams decode(size_t slot) const {
    const double alone = get(kRow, slot) + get(kRowContext, slot) * (question_.prompt + question_.answer / 2);
    const double before = get(kStep, slot) + get(kRow, slot) * get(kStreams, slot) +
                          get(kRowContext, slot) * get(kContext, slot);
    return {(weights_.decode * question_.answer) * (before + alone),
            (weights_.streams * question_.answer * get(kStreams, slot)) * alone};
  }

  double others(size_t slot, const Prefill& prefill, bool only_decodes) const {
    // Those in line will be prefilled elsewhere than where only answers are decoded.
    const double behind = weights_.opportunity + (only_decodes ? weights_.append : question_.behind);
    return (behind + weights_.line * get(kLine, slot) + weights_.streams * get(kStreams, slot)) * prefill.work;
  }

  WeighedPlace take_over(size_t place, size_t slot) const {
    const Streams streams = decode(slot);
    const double missing = question_.prompt - held_[slot];
    const double moved = question_.wire_latency + question_.wire_token * missing + swap(slot);
    // Who has no room lets the request wait for another to end, about as long as an answer takes.
    const double full = get(kRoom, slot) < missing ? streams.own : 0.0;
    return {place, {moved, moved + streams.own + streams.others + full, -1}};
  }

  double fetchable(size_t number) const { return std::min(question_.fetchable[number].tokens, question_.prompt - 1); }

  // The holder that will be done with its own prompts first.
  int64_t source(int64_t fetched) const {
    int64_t first = -1;
    if (fetched < 0) return first;
    each_slot(question_.fetchable[static_cast<size_t>(fetched)], [&](size_t slot) {
      if (first < 0 || get(kFreeAt, slot) < get(kFreeAt, static_cast<size_t>(first))) first = static_cast<int64_t>(slot);
    });
    return first;
  }

  double get(FleetRow row, size_t slot) const { return fleet_.get(row, slot); }

 private:
  std::vector<double> spread(std::vector<double> tokens, const std::vector<HeldTier>& tiers) const {
    for (auto tier = tiers.rbegin(); tier != tiers.rend(); ++tier) {
      const double most = std::min(tier->tokens, question_.prompt - 1);
      each_slot(*tier, [&](size_t slot) { tokens[slot] = most; });
    }
    return tokens;
  }

  template <typename Visit>
  void each_slot(const HeldTier& tier, Visit visit) const {
    for (size_t byte = 0; byte < tier.bytes; ++byte) {
      for (unsigned bits = tier.mask[byte]; bits != 0; bits &= bits - 1) {
        const size_t slot = 8 * byte + static_cast<size_t>(__builtin_ctz(bits));
        if (slot < fleet_.slots) visit(slot);
      }
    }
  }

  const FleetTable& fleet_;
  const Question& question_;
  const CostWeights& weights_;
  std::vector<double> held_;
  std::vector<double> device_;  // empty: all that is held is there
};

std::vector<WeighedPlace> cheapest(std::vector<WeighedPlace> places, size_t count) {
  count = std::min(count, places.size());
  const auto cheaper = [](const WeighedPlace& a, const WeighedPlace& b) {
    const double one = a.figures.total, other = b.figures.total;
    return one < other || (one == other && a.place < b.place);
  };
  std::partial_sort(places.begin(), places.begin() + static_cast<std::ptrdiff_t>(count), places.end(), cheaper);
  places.resize(count);
  return places;
}

// Where a token takes longer to compute than to fetch, no shorter prefix is better than the longest.
size_t lengths_worth_a_look(const Weighing& weighing, const PlaceLists& places, const Question& question) {
  double token = std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < places.starts; ++i) token = std::min(token, weighing.get(kToken, places.start[i]));
  const size_t all = question.fetchable.size();
  return question.wire_token > token ? all : std::min<size_t>(all, 1);
}

double least_held(const Weighing& weighing, const PlaceLists& places) {
  double least = std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < places.starts; ++i) least = std::min(least, weighing.held(places.start[i]));
  return least;
}

}  // namespace

Verdict weigh_places(const FleetTable& fleet, const PlaceLists& places, const Question& question,
                     const CostWeights& weights, size_t starts, size_t decodes) {
  const Weighing weighing(fleet, question, weights);
  std::vector<WeighedPlace> takers(places.decodes);
  for (size_t i = 0; i < places.decodes; ++i) takers[i] = weighing.take_over(i, places.decode[i]);
  takers = cheapest(std::move(takers), std::max<size_t>(decodes, 1));
  const double handed = takers.empty() ? std::numeric_limits<double>::infinity() : takers.front().figures.total;

  const size_t lengths = lengths_worth_a_look(weighing, places, question);
  const double least = least_held(weighing, places);
  std::vector<WeighedPlace> candidates(places.starts);
  for (size_t i = 0; i < places.starts; ++i) {
    const size_t slot = places.start[i];
    const Prefill prefill = weighing.best_prefill(slot, lengths, least);
    const double alone = prefill.ttft() + weighing.others(slot, prefill, places.only_decodes[i]);
    const Streams streams = weighing.decode(slot);
    const double rest = places.hands_over[i] ? handed : streams.own + streams.others;
    candidates[i] = {i, {prefill.fetch, alone + rest, prefill.fetched}};
  }
  candidates = cheapest(std::move(candidates), std::max<size_t>(starts, 1));

  const size_t best = places.start[candidates.front().place];
  const Prefill chosen = weighing.best_prefill(best, lengths, least);
  const double answering = takers.empty() ? 0.0 : weighing.decode(places.decode[takers.front().place]).own;
  const int64_t source = weighing.source(chosen.fetched);
  return {std::move(candidates), std::move(takers), chosen.wait, chosen.prefill, answering, source};
}

}  // namespace memserve
