// A model's packed matrices as a list, and back: what lets them be kept in a file and be mapped from it.
#include <stdexcept>
#include <string>

#include "model.h"

namespace memserve {
namespace {

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("packed weights: " + what); }

// Hands out the matrices of a list one after the other, each checked against what is expected there.
class Reader {
 public:
  Reader(const unsigned char* memory, size_t bytes, const std::vector<PlacedMatrix>& matrices)
      : memory_(memory), bytes_(bytes), matrices_(matrices) {}

  bool at_end() const { return next_ == matrices_.size(); }

  PackedMatrix take(int columns, int inputs) {
    const PackedMatrix matrix = take_up_to(columns, inputs);
    if (matrix.columns != columns) refuse(where() + " is too small");
    return matrix;
  }

  PackedMatrix take_up_to(int columns, int inputs) {
    if (at_end()) refuse("a matrix is missing");
    const PlacedMatrix& placed = matrices_[next_++];
    const PackedMatrix matrix{memory_ + placed.offset, placed.format, placed.columns, placed.depth};
    if (placed.format < Format::kBf16 || placed.format > Format::kEightNested) refuse(where() + " has no known format");
    if (placed.columns <= 0 || placed.columns > columns || placed.depth != round_up(inputs, kDepthMultiple))
      refuse(where() + " does not have the shape of the model");
    if (header_bytes(placed.format) > 0 && matrix.steps() % kNestedSteps != 0) refuse(where() + " ends inside a block");
    if (placed.offset % kAlignment != 0 || placed.offset > bytes_ || matrix.bytes() > bytes_ - placed.offset)
      refuse(where() + " lies outside the memory");
    return matrix;
  }

 private:
  static constexpr size_t kAlignment = 64;

  std::string where() const { return "matrix " + std::to_string(next_ - 1); }

  const unsigned char* memory_;
  size_t bytes_;
  const std::vector<PlacedMatrix>& matrices_;
  size_t next_ = 0;
};

}  // namespace

std::vector<PlacedMatrix> Model::placed() const {
  std::vector<PlacedMatrix> matrices;
  const auto add = [&](const PackedMatrix& m) {
    matrices.push_back({m.format, m.columns, m.depth, static_cast<size_t>(m.values - weights_.data())});
  };
  for (const Layer& layer : layers_) {
    for (const PackedMatrix& matrix : layer.qkv) add(matrix);
    for (const PackedMatrix* matrix : {&layer.o, &layer.gate_up, &layer.down}) add(*matrix);
  }
  add(embedding_);
  if (head_.values != embedding_.values) add(head_);
  return matrices;
}

void Model::adopt(const unsigned char* memory, size_t bytes, const std::vector<PlacedMatrix>& matrices) {
  const ModelShape& s = shape_;
  if (embedding_.values != nullptr || !layers_.front().qkv.empty()) refuse("the model has weights already");
  Reader reader(memory, bytes, matrices);
  std::vector<Layer> layers(layers_.size());
  for (Layer& layer : layers) {
    for (int columns = 0; columns < s.qkv_size(); columns += layer.qkv.back().columns)
      layer.qkv.push_back(reader.take_up_to(s.qkv_size() - columns, s.hidden));
    layer.o = reader.take(s.hidden, s.query_size());
    layer.gate_up = reader.take(2 * s.feed_forward, s.hidden);
    layer.down = reader.take(s.hidden, s.feed_forward);
  }
  const PackedMatrix embedding = reader.take(s.vocabulary, s.hidden);
  const PackedMatrix head = reader.at_end() ? embedding : reader.take(s.vocabulary, s.hidden);
  if (!reader.at_end()) refuse("there are more matrices than the model has");
  layers_ = std::move(layers);
  embedding_ = embedding;
  head_ = head;
  weights_used_ = bytes;
  for (const PlacedMatrix& matrix : matrices) has_integers_ = has_integers_ || matrix.format != Format::kBf16;
}

}  // namespace memserve
