// A Llama-family decoder on pool memory: packed weights, scratch for a tile of rows, and the order of operations.
// Keeps no KV; knows no instruction set (see kernels.h) and no Python.
#pragma once

#include <memory>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "pack.h"
#include "threads.h"

namespace memserve {

struct ModelShape {
  int layers;
  int hidden;
  int heads;
  int kv_heads;
  int head_dim;
  int feed_forward;
  int vocabulary;
  float rms_epsilon;
  KvFormat kv_format;

  int query_size() const { return heads * head_dim; }
  int kv_size() const { return kv_heads * head_dim; }
  int qkv_size() const { return query_size() + 2 * kv_size(); }
};

// Cosines and sines of the rotary embedding, [positions][head_dim / 2].
struct RopeTable {
  std::vector<float> cosines;
  std::vector<float> sines;
  int positions;
};

// Matrices of one layer, as they were loaded: [outputs][inputs].
struct LayerSource {
  MatrixSource q;
  MatrixSource k;
  MatrixSource v;
  MatrixSource o;
  MatrixSource gate;
  MatrixSource up;
  MatrixSource down;
};

// Float vectors for the heads of one layer (see HeadVectors in kernels.h); null where the model has none.
struct HeadVectorSource {
  const float* qkv_bias;
  const float* q_norm;
  const float* k_norm;
};

// One packed matrix inside the model's weights; `offset` in bytes from their beginning.
struct PlacedMatrix {
  Format format;
  int columns;
  int depth;
  size_t offset;
};

// See ForwardBatch in engine/runners/base.py.
struct Batch {
  const int32_t* tokens;
  const int32_t* positions;
  int rows;
  const int32_t* starts;
  int sequences;
  const uint64_t* blocks;
  int width;
  const int32_t* logit_rows;
  int wanted;
};

// Where a pass tells how far it is: an eventfd that layers are added to as a tile has passed them, `every` at a time
// and the rest with the tile's last one. -1: nobody wants to know.
struct LayerSignal {
  int fd = -1;
  int every = 1;

  void layer_done(int layer, int layers) const;
};

class Model {
 public:
  Model(const ModelShape& shape, RopeTable rope, const Kernels& kernels, int threads, const std::vector<int>& cores,
        Keep keep, Activations activations);

  const ModelShape& shape() const { return shape_; }
  const Kernels& kernels() const { return kernels_; }
  size_t weight_bytes() const { return weights_used_; }
  // Whether any matrix packed so far is multiplied in integers, which is other arithmetic and makes other KV.
  bool multiplies_integers() const { return activations_ == Activations::kInt8 && has_integers_; }

  void set_layer(int index, const LayerSource& source);
  void set_norms(int index, const float* attention, const float* ffn);
  void set_head_vectors(int index, const HeadVectorSource& source);
  void set_embedding(const MatrixSource& embedding);
  // Null: tied to the embedding.
  void set_head(const MatrixSource* head);
  void set_output_norm(const float* norm) { output_norm_ = padded(norm); }

  // The packed matrices: of each layer qkv (one to three), o, gate and up, down; then the embedding, and the head
  // unless it is tied. All of them lie in weights()[0, weight_bytes()).
  std::vector<PlacedMatrix> placed() const;
  const unsigned char* weights() const { return weights_.data(); }
  // Instead of set_layer, set_embedding and set_head: matrices packed before, in placed()'s order, in memory
  // that outlives the model. Throws std::invalid_argument, and changes nothing, unless this shape has such matrices.
  void adopt(const unsigned char* memory, size_t bytes, const std::vector<PlacedMatrix>& matrices);

  // Throws std::invalid_argument if the batch does not hold together, before anything is written.
  void check(const Batch& batch) const;
  // logits: [wanted][vocabulary]. The batch must have passed check().
  void forward(const Batch& batch, float* logits, LayerSignal signal = {});
  // Rows that go through all layers together; the next as many follow when these have.
  static int tile_rows();

 private:
  struct Layer {
    std::vector<float> attention_norm;
    std::vector<float> ffn_norm;
    std::vector<PackedMatrix> qkv;  // outputs one after the other; more than one matrix where formats differ
    PackedMatrix o;
    PackedMatrix gate_up;
    PackedMatrix down;
    std::vector<float> qkv_bias;  // these three are empty where the model has none
    std::vector<float> q_norm;
    std::vector<float> k_norm;
  };

  // Consecutive rows of one sequence that attend together.
  struct RowGroup {
    int first_row;
    int rows;
    int first_position;
    const uint64_t* blocks;
    bool is_split;          // one work item per segment
    size_t partials_offset;  // floats

    int segments() const { return (first_position + rows - 1) / kSegmentTokens + 1; }
  };

  struct AttentionItem {
    int group;
    int kv_head;
    Range segments;
  };

  // The part of a batch that goes through all layers together.
  struct Tile {
    Range rows;                             // of the batch
    std::vector<const uint64_t*> blocks;    // of each row's sequence
    std::vector<RowGroup> groups;
    std::vector<AttentionItem> items;
    std::vector<AttentionItem> merges;
    size_t partials = 0;  // floats
  };

  void reserve_weights();
  PackedMatrix allocate(Format format, int columns, int depth);
  PackedMatrix pack(const SourceRows& source);
  // Group g of the source becomes group first + g * stride.
  void expand_into(const PackedMatrix& to, const SourceRows& source, int first, int stride);
  PackedMatrix pack_gate_up(const MatrixSource& gate, const MatrixSource& up);
  std::vector<float> padded(const float* values) const;

  Tile plan(const Batch& batch, Range rows) const;
  void add_groups(Tile& tile, const Batch& batch, int sequence) const;
  void add_items(Tile& tile) const;
  void embed(const Batch& batch, const Tile& tile);
  void run_layer(const Batch& batch, const Tile& tile, int index);
  void normalise_rows(const float* weight, int rows);
  void normalise_row(const float* input, const float* weight, Bf16* output) const;
  void place_rows(const Batch& batch, const Tile& tile, const Heads& heads, const HeadVectors& vectors);
  void attend(const Tile& tile, const Heads& heads);
  Attention attention_of(const Tile& tile, const Heads& heads, const AttentionItem& item) const;
  void write_logits(const Batch& batch, const Tile& tile, float* logits);
  void multiply(Matmul job, int rows);
  void quantise_rows(const Matmul& job, int rows);
  Heads heads_of(int layer) const;
  HeadVectors head_vectors_of(int layer) const;
  void* scratch_of(int thread) const { return scratch_.data() + scratch_bytes_ * static_cast<size_t>(thread); }

  ModelShape shape_;
  RopeTable rope_;
  const Kernels& kernels_;
  ThreadPool pool_;

  Keep keep_;
  Activations activations_;
  Buffer<unsigned char> weights_;
  size_t weights_used_ = 0;  // bytes
  bool has_integers_ = false;  // a matrix in another format than bf16
  PackedMatrix embedding_{};
  PackedMatrix head_{};
  std::vector<Layer> layers_;
  std::vector<float> output_norm_;

  int padded_hidden_;
  size_t normed_stride_;
  size_t attended_stride_;
  size_t gated_stride_;
  Buffer<float> residual_;
  Buffer<Bf16> normed_;
  Buffer<Bf16> expanded_;  // a column group of the embedding
  Buffer<float> qkv_;
  Buffer<Bf16> queries_;
  Buffer<Bf16> attended_;
  Buffer<Bf16> gated_;
  Buffer<InputGroup> quantised_;  // inputs of the product at hand
  Buffer<float> partials_;
  size_t scratch_bytes_;
  Buffer<char> scratch_;
};

}  // namespace memserve
