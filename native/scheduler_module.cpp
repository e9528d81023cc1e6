#include "scheduler_module.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "weigh.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace memserve {
namespace {

template <typename T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

FleetTable table_of(const Table& table) {
  if (table.shape(0) != kFleetRows)
    throw std::invalid_argument("the fleet has " + std::to_string(table.shape(0)) + " columns and not " +
                                std::to_string(kFleetRows));
  return {table.data(), table.shape(1)};
}

void require_slots(const Array<int64_t>& slots, const FleetTable& fleet) {
  for (size_t i = 0; i < slots.size(); ++i)
    if (slots(i) < 0 || static_cast<size_t>(slots(i)) >= fleet.slots)
      throw std::invalid_argument("slot " + std::to_string(slots(i)) + " is not one of the fleet's " +
                                  std::to_string(fleet.slots));
}

// Borrows the masks of the list's (tokens, mask) pairs.
std::vector<HeldTier> tiers_of(const nb::list& pairs) {
  std::vector<HeldTier> tiers;
  tiers.reserve(pairs.size());
  for (nb::handle pair : pairs) {
    const auto mask = nb::cast<nb::bytes>(pair[1]);
    tiers.push_back({nb::cast<double>(pair[0]), static_cast<const uint8_t*>(mask.data()), mask.size()});
  }
  return tiers;
}

// Numbers of places, and the rest in one piece: most of it is kept and never looked at.
nb::tuple packed(const std::vector<WeighedPlace>& places) {
  nb::list numbers;
  std::vector<Figures> figures;
  figures.reserve(places.size());
  for (const WeighedPlace& each : places) {
    numbers.append(each.place);
    figures.push_back(each.figures);
  }
  return nb::make_tuple(numbers, nb::bytes(figures.data(), figures.size() * sizeof(Figures)));
}

nb::tuple weigh(const Table& table, const Array<int64_t>& start, const Array<bool>& only_decodes,
                const Array<bool>& hands_over, const Array<int64_t>& decode, const nb::list& held,
                const nb::list& lowered, const nb::list& fetchable, const std::array<double, 6>& question, const std::array<double, 5>& weights,
                size_t starts, size_t decodes) {
  const FleetTable fleet = table_of(table);
  if (start.size() == 0) throw std::invalid_argument("there is no place to start");
  if (only_decodes.size() != start.size() || hands_over.size() != start.size())
    throw std::invalid_argument("only_decodes and hands_over must be as long as start");
  require_slots(start, fleet);
  require_slots(decode, fleet);
  const auto [prompt, answer, now, behind, latency, token] = question;
  const auto [opportunity, append, line, streams, own] = weights;
  const PlaceLists places{start.data(),  only_decodes.data(), hands_over.data(),
                          start.size(), decode.data(),       decode.size()};
  const Question asked{prompt, answer, now, behind, latency, token, tiers_of(held), tiers_of(lowered),
                       tiers_of(fetchable)};
  const Verdict verdict = weigh_places(fleet, places, asked, {opportunity, append, line, streams, own}, starts, decodes);
  return nb::make_tuple(packed(verdict.start), packed(verdict.decode), verdict.wait, verdict.prefill, verdict.answering,
                        verdict.source);
}

}  // namespace

void bind_scheduler_passes(nb::module_& m) { m.def("weigh_places", &weigh); }

}  // namespace memserve
