#include "model.h"

#include <sys/eventfd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace memserve {
namespace {

constexpr int kRowsPerTile = 512;      // rows that go through all layers together: bounds the scratch memory
constexpr int kRowsPerItem = 256;      // rows whose inputs fit a core's cache beside a panel of weights
constexpr int kFewRows = 24;           // up to here a product is bound by reading weights: one even share per thread
constexpr int kItemsPerThread = 6;     // enough work items to even out threads of unequal speed
constexpr int kRowsPerSmallItem = 8;   // row-by-row steps: fewer rows are not worth waking a thread for

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

int ceil_divide(int a, int b) { return (a + b - 1) / b; }

Range part_of(int total, int part, int parts) {
  return {static_cast<int>(static_cast<int64_t>(total) * part / parts),
          static_cast<int>(static_cast<int64_t>(total) * (part + 1) / parts)};
}

// An odd number of cache lines, so that the same column of many rows does not fall into one cache set.
size_t row_stride(int depth) { return static_cast<size_t>(depth) + (depth / 32 % 2 == 0 ? 32 : 0); }

float float_of(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Column groups alternate gate and up, so that one register block holds both factors of an output.
SourceRows interleaved(const MatrixSource& gate, const MatrixSource& up) {
  SourceRows result(gate);
  result.rows.clear();
  for (int at = 0; at < gate.rows; at += kGroupColumns)
    for (const MatrixSource* source : {&gate, &up})
      for (int row = at; row < at + kGroupColumns; ++row) result.rows.push_back(source->row(row));
  return result;
}

// Neighbours of one type in one matrix, so that they are multiplied together.
std::vector<SourceRows> fused(std::initializer_list<MatrixSource> sources) {
  std::vector<SourceRows> result;
  for (const MatrixSource& source : sources) {
    if (!result.empty() && result.back().stored == source.stored)
      result.back().append(source);
    else
      result.emplace_back(source);
  }
  return result;
}

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

void check_shape(const ModelShape& s) {
  require(s.layers > 0 && s.hidden > 0 && s.heads > 0 && s.kv_heads > 0 && s.vocabulary > 0,
          "layers, hidden, heads, kv_heads and vocabulary must be positive");
  require(s.heads % s.kv_heads == 0, "heads (" + std::to_string(s.heads) + ") is no multiple of kv_heads (" +
                                         std::to_string(s.kv_heads) + ")");
  require(s.head_dim > 0 && s.head_dim <= 256 && s.head_dim % 16 == 0,
          "head_dim is " + std::to_string(s.head_dim) + "; it must be a multiple of 16 up to 256");
  require(s.feed_forward > 0 && s.feed_forward % kGroupColumns == 0,
          "feed_forward is " + std::to_string(s.feed_forward) + "; it must be a multiple of 16");
}

}  // namespace

Model::Model(const ModelShape& shape, RopeTable rope, const Kernels& kernels, int threads,
             const std::vector<int>& cores, Keep keep, Activations activations)
    : shape_((check_shape(shape), shape)),
      rope_(std::move(rope)),
      kernels_(kernels),
      pool_(threads, cores),
      keep_(keep),
      activations_(activations) {
  const int hidden = round_up(shape.hidden, kDepthMultiple);
  const int attended = round_up(shape.query_size(), kDepthMultiple);
  const int gated = round_up(shape.feed_forward, kDepthMultiple);
  layers_.resize(static_cast<size_t>(shape.layers));
  padded_hidden_ = hidden;
  normed_stride_ = row_stride(hidden);
  attended_stride_ = row_stride(attended);
  gated_stride_ = row_stride(gated);
  constexpr size_t kRows = kRowsPerTile + kRowPadding;
  residual_ = Buffer<float>(kRows * padded_hidden_);
  normed_ = Buffer<Bf16>(kRows * normed_stride_);
  qkv_ = Buffer<float>(kRows * shape.qkv_size());
  queries_ = Buffer<Bf16>(kRows * shape.query_size());
  attended_ = Buffer<Bf16>(kRows * attended_stride_);
  gated_ = Buffer<Bf16>(kRows * gated_stride_);
  if (activations_ == Activations::kInt8)
    quantised_ = Buffer<InputGroup>(kRows * std::max({hidden, attended, gated}) / kDepthMultiple);
  expanded_ = Buffer<Bf16>(static_cast<size_t>(hidden) * kGroupColumns);
  scratch_bytes_ = std::max(kernels_.attention_scratch(heads_of(0)), panel_bytes(std::max({hidden, attended, gated})));
  scratch_ = Buffer<char>(scratch_bytes_ * static_cast<size_t>(pool_.size()));
}

// For bf16 and an untied head; pages that are never written take no memory.
void Model::reserve_weights() {
  const ModelShape& s = shape_;
  const size_t hidden = round_up(s.hidden, kDepthMultiple);
  const size_t attended = round_up(s.query_size(), kDepthMultiple), gated = round_up(s.feed_forward, kDepthMultiple);
  const size_t per_layer = (round_up(s.qkv_size(), 16) + 2 * static_cast<size_t>(s.feed_forward)) * hidden +
                           static_cast<size_t>(round_up(s.hidden, 16)) * (attended + gated);
  const size_t vocabulary = static_cast<size_t>(round_up(s.vocabulary, 16)) * hidden;
  weights_ = Buffer<unsigned char>((per_layer * s.layers + 2 * vocabulary + kGroupColumns) * sizeof(Bf16));
}

PackedMatrix Model::allocate(Format format, int columns, int depth) {
  if (weights_.data() == nullptr) reserve_weights();
  const PackedMatrix matrix{weights_.data() + weights_used_, format, columns, round_up(depth, kDepthMultiple)};
  weights_used_ += (matrix.bytes() + 63) / 64 * 64;
  has_integers_ = has_integers_ || format != Format::kBf16;
  return matrix;
}

PackedMatrix Model::pack(const SourceRows& source) {
  const Format format = keep_ == Keep::kBf16 ? Format::kBf16 : packed_format(source.stored, keep_);
  const PackedMatrix matrix = allocate(format, static_cast<int>(source.rows.size()), source.inputs);
  if (format != packed_format(source.stored, keep_)) {
    expand_into(matrix, source, 0, 1);
    return matrix;
  }
  std::atomic<bool> finite{true};
  pool_.run(matrix.groups(), [&](int group, int) {
    if (!pack_group(matrix, group, source)) finite = false;
  });
  require(finite, std::string(source.name) + ": a scale is not a finite number");
  return matrix;
}

// Through the packed form, so that blocks kept as they are and blocks kept as bf16 give the same bits.
void Model::expand_into(const PackedMatrix& to, const SourceRows& source, int first, int stride) {
  const int columns = static_cast<int>(source.rows.size());
  PackedMatrix blocks{nullptr, packed_format(source.stored, Keep::kStored), columns, to.depth};
  Buffer<unsigned char> memory(blocks.bytes());
  blocks.values = memory.data();
  std::atomic<bool> finite{true};
  pool_.run(blocks.groups(), [&](int group, int) {
    if (!pack_group(blocks, group, source)) finite = false;
    const unsigned char* at = to.group(first + group * stride);
    kernels_.expand(blocks, group, reinterpret_cast<Bf16*>(const_cast<unsigned char*>(at)));
  });
  require(finite, std::string(source.name) + ": a scale is not a finite number");
}

PackedMatrix Model::pack_gate_up(const MatrixSource& gate, const MatrixSource& up) {
  if (gate.stored == up.stored) return pack(interleaved(gate, up));
  const PackedMatrix matrix = allocate(Format::kBf16, gate.rows + up.rows, gate.inputs);
  expand_into(matrix, SourceRows(gate), 0, 2);
  expand_into(matrix, SourceRows(up), 1, 2);
  return matrix;
}

std::vector<float> Model::padded(const float* values) const {
  std::vector<float> result(static_cast<size_t>(padded_hidden_), 0.0f);
  std::copy(values, values + shape_.hidden, result.begin());
  return result;
}

void Model::set_layer(int index, const LayerSource& source) {
  Layer& layer = layers_[static_cast<size_t>(index)];
  require(layer.qkv.empty(), "layer " + std::to_string(index) + " was set before");
  for (const SourceRows& rows : fused({source.q, source.k, source.v})) layer.qkv.push_back(pack(rows));
  layer.o = pack(SourceRows(source.o));
  layer.gate_up = pack_gate_up(source.gate, source.up);
  layer.down = pack(SourceRows(source.down));
}

void Model::set_norms(int index, const float* attention, const float* ffn) {
  Layer& layer = layers_[static_cast<size_t>(index)];
  layer.attention_norm = padded(attention);
  layer.ffn_norm = padded(ffn);
}

void Model::set_head_vectors(int index, const HeadVectorSource& source) {
  Layer& layer = layers_[static_cast<size_t>(index)];
  if (source.qkv_bias != nullptr) layer.qkv_bias.assign(source.qkv_bias, source.qkv_bias + shape_.qkv_size());
  if (source.q_norm != nullptr) layer.q_norm.assign(source.q_norm, source.q_norm + shape_.head_dim);
  if (source.k_norm != nullptr) layer.k_norm.assign(source.k_norm, source.k_norm + shape_.head_dim);
}

void Model::set_embedding(const MatrixSource& embedding) {
  require(embedding_.values == nullptr, "the embedding was set before");
  embedding_ = pack(SourceRows(embedding));
}

void Model::set_head(const MatrixSource* head) {
  require(head_.values == nullptr, "the head was set before");
  require(embedding_.values != nullptr, "the embedding must be set before the head");
  head_ = head == nullptr ? embedding_ : pack(SourceRows(*head));
}

void Model::check(const Batch& batch) const {
  for (const Layer& layer : layers_)
    require(!layer.qkv.empty() && !layer.attention_norm.empty(), "not all layers have been set");
  require(head_.values != nullptr && !output_norm_.empty(), "the head or the output norm has not been set");
  require(batch.starts[0] == 0 && batch.starts[batch.sequences] == batch.rows,
          "starts must begin with 0 and end with the number of rows");
  for (int s = 0; s < batch.sequences; ++s) {
    const int begin = batch.starts[s], end = batch.starts[s + 1];
    require(begin <= end && end <= batch.rows, "starts must ascend");
    for (int row = begin; row < end; ++row) {
      const std::string where = "row " + std::to_string(row) + ": ";
      require(batch.tokens[row] >= 0 && batch.tokens[row] < shape_.vocabulary, where + "token outside the vocabulary");
      require(batch.positions[row] >= 0 && batch.positions[row] < rope_.positions,
              where + "position outside the context of " + std::to_string(rope_.positions));
      require(row == begin || batch.positions[row] == batch.positions[row - 1] + 1,
              where + "positions must ascend by one");
    }
    if (begin == end) continue;
    const int needed = batch.positions[end - 1] / kBlockTokens + 1;
    require(needed <= batch.width, "sequence " + std::to_string(s) + " has too few blocks");
    for (int b = 0; b < needed; ++b)
      require(batch.blocks[static_cast<size_t>(s) * batch.width + b] != 0,
              "sequence " + std::to_string(s) + ": block " + std::to_string(b) + " has no address");
  }
  for (int i = 0; i < batch.wanted; ++i)
    require(batch.logit_rows[i] >= (i == 0 ? 0 : batch.logit_rows[i - 1] + 1) && batch.logit_rows[i] < batch.rows,
            "logit_rows must ascend and lie inside the batch");
}

Heads Model::heads_of(int layer) const {
  const KvFormat format = shape_.kv_format;
  const size_t half = static_cast<size_t>(shape_.kv_heads) * kv_head_bytes(format, shape_.head_dim);
  return {shape_.heads, shape_.kv_heads, shape_.head_dim, 2 * half * static_cast<size_t>(layer), half, format};
}

HeadVectors Model::head_vectors_of(int index) const {
  const Layer& layer = layers_[static_cast<size_t>(index)];
  const auto values = [](const std::vector<float>& vector) { return vector.empty() ? nullptr : vector.data(); };
  return {values(layer.qkv_bias), values(layer.q_norm), values(layer.k_norm), shape_.rms_epsilon};
}

int Model::tile_rows() { return kRowsPerTile; }

void LayerSignal::layer_done(int layer, int layers) const {
  if (fd < 0) return;
  const int done = layer + 1;
  const int fresh = done % every == 0 ? every : done == layers ? done % every : 0;
  // Whoever listens reads before the count could overflow, and one who has gone away misses nothing.
  if (fresh > 0) static_cast<void>(eventfd_write(fd, static_cast<eventfd_t>(fresh)));
}

void Model::forward(const Batch& batch, float* logits, LayerSignal signal) {
  for (int begin = 0; begin < batch.rows; begin += kRowsPerTile) {
    const Tile tile = plan(batch, {begin, std::min(begin + kRowsPerTile, batch.rows)});
    embed(batch, tile);
    for (int layer = 0; layer < shape_.layers; ++layer) {
      run_layer(batch, tile, layer);
      signal.layer_done(layer, shape_.layers);
    }
    write_logits(batch, tile, logits);
  }
}

Model::Tile Model::plan(const Batch& batch, Range rows) const {
  Tile tile;
  tile.rows = rows;
  for (int s = 0; s < batch.sequences; ++s) add_groups(tile, batch, s);
  // The longest first, so that no thread is left with one at the end.
  std::stable_sort(tile.groups.begin(), tile.groups.end(), [](const RowGroup& a, const RowGroup& b) {
    return a.segments() * a.rows > b.segments() * b.rows;
  });
  add_items(tile);
  return tile;
}

void Model::add_groups(Tile& tile, const Batch& batch, int sequence) const {
  const uint64_t* blocks = batch.blocks + static_cast<size_t>(sequence) * batch.width;
  const int begin = std::max(batch.starts[sequence], tile.rows.begin);
  const int end = std::min(batch.starts[sequence + 1], tile.rows.end);
  for (int row = begin; row < end; row += kQueryRows)
    tile.groups.push_back(
        {row - tile.rows.begin, std::min(kQueryRows, end - row), batch.positions[row], blocks, false, 0});
  if (begin < end) tile.blocks.insert(tile.blocks.end(), static_cast<size_t>(end - begin), blocks);
}

void Model::add_items(Tile& tile) const {
  const int unsplit = static_cast<int>(tile.groups.size()) * shape_.kv_heads;
  const bool too_few = pool_.size() > 1 && unsplit < 4 * pool_.size();
  size_t partials = 0;
  for (int g = 0; g < static_cast<int>(tile.groups.size()); ++g) {
    RowGroup& group = tile.groups[static_cast<size_t>(g)];
    group.is_split = too_few && group.segments() > 1;
    group.partials_offset = partials;
    for (int head = 0; head < shape_.kv_heads; ++head) {
      if (!group.is_split) {
        tile.items.push_back({g, head, {0, group.segments()}});
        continue;
      }
      tile.merges.push_back({g, head, {0, group.segments()}});
      for (int segment = 0; segment < group.segments(); ++segment)
        tile.items.push_back({g, head, {segment, segment + 1}});
    }
    const size_t vectors = static_cast<size_t>(group.rows) * (shape_.heads / shape_.kv_heads);
    const size_t partial = static_cast<size_t>(shape_.head_dim) + Attention::kLanesOfPartial;
    if (group.is_split) partials += vectors * partial * group.segments() * shape_.kv_heads;
  }
  tile.partials = partials;
}

void Model::embed(const Batch& batch, const Tile& tile) {
  for (int row = 0; row < tile.rows.size(); ++row) {
    const int token = batch.tokens[tile.rows.begin + row];
    kernels_.expand(embedding_, token / kGroupColumns, expanded_.data());
    const Bf16* column = expanded_.data() + 2 * (token % kGroupColumns);
    float* to = residual_.data() + static_cast<size_t>(row) * padded_hidden_;
    for (int i = 0; i < padded_hidden_; ++i)
      to[i] = float_of(column[static_cast<size_t>(i / 2) * 2 * kGroupColumns + i % 2]);
  }
}

void Model::run_layer(const Batch& batch, const Tile& tile, int index) {
  const Layer& layer = layers_[static_cast<size_t>(index)];
  const Heads heads = heads_of(index);
  const int rows = tile.rows.size();
  const size_t qkv_stride = static_cast<size_t>(shape_.qkv_size());
  const size_t residual_stride = static_cast<size_t>(padded_hidden_);
  const Matmul o{layer.o,          attended_.data(), attended_stride_, Output::kAdd,
                 residual_.data(), nullptr,          residual_stride};
  const Matmul gate_up{layer.gate_up, normed_.data(), normed_stride_, Output::kGate,
                       nullptr,       gated_.data(),  gated_stride_};
  const Matmul down{layer.down, gated_.data(), gated_stride_, Output::kAdd, residual_.data(), nullptr, residual_stride};
  normalise_rows(layer.attention_norm.data(), rows);
  float* qkv = qkv_.data();
  for (const PackedMatrix& matrix : layer.qkv) {
    multiply({matrix, normed_.data(), normed_stride_, Output::kStore, qkv, nullptr, qkv_stride}, rows);
    qkv += matrix.columns;
  }
  place_rows(batch, tile, heads, head_vectors_of(index));
  attend(tile, heads);
  multiply(o, rows);
  normalise_rows(layer.ffn_norm.data(), rows);
  multiply(gate_up, rows);
  multiply(down, rows);
}

void Model::normalise_row(const float* input, const float* weight, Bf16* output) const {
  kernels_.normalise({input, weight, output, shape_.hidden, padded_hidden_, shape_.rms_epsilon});
}

void Model::normalise_rows(const float* weight, int rows) {
  const int items = ceil_divide(rows, kRowsPerSmallItem);
  pool_.run(items, [&](int item, int) {
    const Range range = part_of(rows, item, items);
    for (int row = range.begin; row < range.end; ++row)
      normalise_row(residual_.data() + static_cast<size_t>(row) * padded_hidden_, weight,
                    normed_.data() + static_cast<size_t>(row) * normed_stride_);
  });
}

void Model::place_rows(const Batch& batch, const Tile& tile, const Heads& heads, const HeadVectors& vectors) {
  const int rows = tile.rows.size();
  const int items = ceil_divide(rows, kRowsPerSmallItem);
  const size_t half = static_cast<size_t>(shape_.head_dim / 2);
  pool_.run(items, [&](int item, int) {
    const Range range = part_of(rows, item, items);
    for (int row = range.begin; row < range.end; ++row) {
      const int position = batch.positions[tile.rows.begin + row];
      const size_t angles = static_cast<size_t>(position) * half;
      kernels_.place_row({heads, vectors,
                          qkv_.data() + static_cast<size_t>(row) * shape_.qkv_size(),
                          rope_.cosines.data() + angles, rope_.sines.data() + angles,
                          tile.blocks[static_cast<size_t>(row)][position / kBlockTokens], position % kBlockTokens,
                          queries_.data() + static_cast<size_t>(row) * shape_.query_size()});
    }
  });
}

Attention Model::attention_of(const Tile& tile, const Heads& heads, const AttentionItem& item) const {
  const RowGroup& group = tile.groups[static_cast<size_t>(item.group)];
  const float scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(shape_.head_dim)));
  Attention job{heads,
                item.kv_head,
                scale,
                queries_.data() + static_cast<size_t>(group.first_row) * shape_.query_size(),
                static_cast<size_t>(shape_.query_size()),
                group.rows,
                group.first_position,
                group.blocks,
                attended_.data() + static_cast<size_t>(group.first_row) * attended_stride_,
                attended_stride_,
                item.segments,
                nullptr};
  const size_t per_head = job.partial_size() * job.vectors() * group.segments();
  if (group.is_split) job.partials = partials_.data() + group.partials_offset + per_head * item.kv_head;
  return job;
}

void Model::attend(const Tile& tile, const Heads& heads) {
  if (tile.partials > partials_.size()) partials_ = Buffer<float>(tile.partials);
  pool_.run(static_cast<int>(tile.items.size()), [&](int item, int thread) {
    kernels_.attend(attention_of(tile, heads, tile.items[static_cast<size_t>(item)]), scratch_of(thread));
  });
  // Few and short: waking threads for them would take longer.
  for (const AttentionItem& item : tile.merges) kernels_.merge_partials(attention_of(tile, heads, item), scratch_of(0));
}

void Model::write_logits(const Batch& batch, const Tile& tile, float* logits) {
  const int32_t* end = batch.logit_rows + batch.wanted;
  const int32_t* first = std::lower_bound(batch.logit_rows, end, tile.rows.begin);
  const int32_t* last = std::lower_bound(first, end, tile.rows.end);
  const int wanted = static_cast<int>(last - first);
  if (wanted == 0) return;
  for (int i = 0; i < wanted; ++i)
    normalise_row(residual_.data() + static_cast<size_t>(first[i] - tile.rows.begin) * padded_hidden_,
                  output_norm_.data(), normed_.data() + static_cast<size_t>(i) * normed_stride_);
  float* out = logits + static_cast<size_t>(first - batch.logit_rows) * shape_.vocabulary;
  multiply({head_, normed_.data(), normed_stride_, Output::kStore, out, nullptr,
            static_cast<size_t>(shape_.vocabulary)},
           wanted);
}

void Model::quantise_rows(const Matmul& job, int rows) {
  const int items = ceil_divide(rows, kRowsPerSmallItem);
  const size_t groups = static_cast<size_t>(job.weights.steps());
  pool_.run(items, [&](int item, int) {
    const Range range = part_of(rows, item, items);
    for (int row = range.begin; row < range.end; ++row)
      kernels_.quantise({job.input + static_cast<size_t>(row) * job.input_stride,
                         quantised_.data() + static_cast<size_t>(row) * groups, job.weights.depth});
  });
}

void Model::multiply(Matmul job, int rows) {
  const bool integers = activations_ == Activations::kInt8 && job.weights.format != Format::kBf16;
  if (integers) {
    quantise_rows(job, rows);
    job.groups = quantised_.data();
  }
  const int unit = job.output == Output::kGate ? 2 : 1;
  const int units = job.weights.groups() / unit;
  const int row_items = ceil_divide(rows, kRowsPerItem);
  const int wanted = rows <= kFewRows ? pool_.size() : ceil_divide(kItemsPerThread * pool_.size(), row_items);
  const int group_items = std::min(units, wanted);
  pool_.run(row_items * group_items, [&](int item, int thread) {
    const int first_row = item / group_items * kRowsPerItem;
    const Range share = part_of(units, item % group_items, group_items);
    const Range item_rows{first_row, std::min(first_row + kRowsPerItem, rows)};
    const Range groups{share.begin * unit, share.end * unit};
    if (integers)
      kernels_.matmul_int8(job, item_rows, groups);
    else
      kernels_.matmul(job, item_rows, groups, scratch_of(thread));
  });
}

}  // namespace memserve
