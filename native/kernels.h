// The one interface that every instruction-set level implements: what the model asks for, and in which units.
// Rule of all kernels: the bits of a row's result depend on that row's own inputs only, not on the other rows of the
// call, on how a call is split into ranges, or on the thread. Levels may round differently from each other.
#pragma once

#include <cstddef>
#include <cstdint>

namespace memserve {

using Bf16 = uint16_t;

constexpr int kBlockTokens = 16;      // tokens of a KV block; also the columns of a column group
constexpr int kGroupColumns = 16;     // outputs that a packed matrix keeps side by side
constexpr int kDepthMultiple = 32;    // packed matrices pad their inputs to this with zeros
constexpr int kSegmentBlocks = 16;    // attention is summed up in segments of this many blocks, from position 0 on
constexpr int kSegmentTokens = kSegmentBlocks * kBlockTokens;
constexpr int kQueryRows = 16;        // most rows that one attention call takes
constexpr int kRowPadding = 32;       // buffers of rows have room for this many garbage rows at their end

struct Range {
  int begin;
  int end;
  int size() const { return end - begin; }
};

// How a packed matrix holds its weights. All formats keep 16 outputs together (a column group) and cut the inputs into
// steps of 32; a step of bf16 is one AMX tile. Every other format stands for exactly one bf16 number per weight,
// bf16(value * scale + minimum), and is multiplied as that: a format changes the bytes that are read, never a result.
//
//   kBf16         [16 pairs][16 outputs][2]
//   kFour         scales f16[16], minima f16[16], nibbles [4][16 outputs][4 bytes]: see nibble_of
//   kEight        scales f16[16], bytes [8][16 outputs][4 inputs]
//   kFourNested   like kFour, but uint8[16] scales and minima, to be multiplied by those in f16 of 8 steps before them
//   kEightNested  like kEight, but int8[2][16] scales, one per 16 inputs, to be multiplied by one in f16 per 8 steps
enum class Format { kBf16, kFour, kEight, kFourNested, kEightNested };

// Goes up with every change of what packing makes of a matrix: copies on disk carry it, and others are not used.
constexpr int kPackedLayout = 1;

constexpr int kStepPairs = kDepthMultiple / 2;
constexpr int kStepValues = kDepthMultiple * kGroupColumns;
constexpr int kNestedSteps = 8;

constexpr size_t step_bytes(Format format) {
  constexpr size_t kScales = kGroupColumns * sizeof(uint16_t);
  switch (format) {
    case Format::kBf16: return kStepValues * sizeof(Bf16);
    case Format::kFour: return 2 * kScales + kStepValues / 2;
    case Format::kFourNested: return kScales + kStepValues / 2;
    default: return kScales + kStepValues;
  }
}

// Bytes in front of every kNestedSteps steps.
constexpr size_t header_bytes(Format format) {
  constexpr size_t kScales = kGroupColumns * sizeof(uint16_t);
  return format == Format::kFourNested ? 2 * kScales : format == Format::kEightNested ? kScales : 0;
}

// Where kFour keeps a weight: nibble `nibble` (0 lowest) of the 32-bit word `word`. The low halves of a word's bytes are
// four inputs of one output, as 8-bit dot products take them, and the high halves the next four.
struct NibblePlace {
  int word;
  int nibble;
};
constexpr NibblePlace nibble_of(int input, int output) {
  return {input / 8 * kGroupColumns + output, input % 4 * 2 + input % 8 / 4};
}

struct PackedMatrix {
  const unsigned char* values;
  Format format;
  int columns;  // outputs, unpadded
  int depth;    // inputs, padded to kDepthMultiple

  int groups() const { return (columns + kGroupColumns - 1) / kGroupColumns; }
  int steps() const { return depth / kDepthMultiple; }
  size_t group_bytes() const {
    return static_cast<size_t>(steps()) * step_bytes(format) +
           static_cast<size_t>(steps()) / kNestedSteps * header_bytes(format);
  }
  size_t bytes() const { return group_bytes() * static_cast<size_t>(groups()); }
  const unsigned char* group(int index) const { return values + static_cast<size_t>(index) * group_bytes(); }
  // The scales and minima that eight steps share, of a nested format.
  const unsigned char* header(int index, int step) const {
    return group(index) +
           static_cast<size_t>(step / kNestedSteps) * (header_bytes(format) + kNestedSteps * step_bytes(format));
  }
  const unsigned char* step(int index, int step) const {
    if (header_bytes(format) == 0) return group(index) + static_cast<size_t>(step) * step_bytes(format);
    return header(index, step) + header_bytes(format) + static_cast<size_t>(step % kNestedSteps) * step_bytes(format);
  }
};

constexpr int kWidestPanel = 8;  // column groups that a matrix product takes at a time, at most

// Scratch memory that a matrix product needs to expand a panel of weights to bf16.
constexpr size_t panel_bytes(int depth) {
  return static_cast<size_t>(depth) * kGroupColumns * kWidestPanel * sizeof(Bf16);
}

// In what inputs are multiplied: bf16, or integers of 8 bits. Weights packed as bf16 are multiplied by bf16 either way.
enum class Activations { kBf16, kInt8 };

// 32 inputs of one row in 8 bits: input = value * scale.
struct InputGroup {
  int8_t values[kDepthMultiple];
  float scale;       // NaN if an input was not finite
  float sum;         // of the inputs, as they are here
  int32_t bias[2];   // -128 times the sum of the values 0-15 and 16-31: what unsigned weights (+128) add too much
};

// depth inputs (a multiple of 32) to depth / 32 groups.
struct Quantise {
  const Bf16* input;
  InputGroup* groups;
  int depth;
};

enum class Output {
  kStore,  // float: out = in * weights
  kAdd,    // float: out += in * weights
  kGate,   // bf16:  out = silu(gate) * up; column groups alternate gate, up, and there is one output per pair
};

struct Matmul {
  PackedMatrix weights;
  const Bf16* input;    // [rows][input_stride]
  size_t input_stride;  // elements
  Output output;
  float* floats;        // [rows][output_stride] of kStore and kAdd
  Bf16* halves;         // [rows][output_stride] of kGate
  size_t output_stride;
  const InputGroup* groups = nullptr;  // [rows][depth / 32]: the same inputs, for matmul_int8
};

// out[i] = bf16(x[i] / rms(x) * weight[i]); `size` counts, `padded` is a multiple of 16 with zeros at the end.
struct Normalise {
  const float* input;
  const float* weight;
  Bf16* output;
  int size;
  int padded;
  float epsilon;
};

// How KV is kept. kInt8: int8[dim] per token and head, times a float of their own; the scales of a block's tokens lie in
// front of the values they belong to, one cache line per head, and the values in the order of bf16.
enum class KvFormat { kBf16, kInt8 };

constexpr size_t kScaleBytes = kBlockTokens * sizeof(float);

constexpr size_t kv_head_bytes(KvFormat format, int dim) {
  const size_t values = static_cast<size_t>(dim) * kBlockTokens;
  return format == KvFormat::kInt8 ? kScaleBytes + values : values * sizeof(Bf16);
}

// How the heads of one layer lie in memory.
struct Heads {
  int queries;
  int kv;
  int dim;
  size_t layer_offset;  // bytes from a block's start to this layer's K; V follows half_bytes later
  size_t half_bytes;
  KvFormat format;

  int group() const { return queries / kv; }
  size_t head_bytes() const { return kv_head_bytes(format, dim); }
  unsigned char* keys(uint64_t block, int head) const {
    return reinterpret_cast<unsigned char*>(block + layer_offset + static_cast<size_t>(head) * head_bytes());
  }
  unsigned char* values(uint64_t block, int head) const { return keys(block + half_bytes, head); }
};

// What some families do to the heads of q, k and v before q and k are rotated; null where a model does not.
struct HeadVectors {
  const float* bias;    // added to q, k and v of all heads, in the order of `qkv`
  const float* q_norm;  // [dim]: RMS norm of each head
  const float* k_norm;
  float epsilon;
};

// Rotate a row's q and k by its position; q goes to `queries` in bf16, k and v into the row's KV block, in its format.
struct PlaceRow {
  Heads heads;
  HeadVectors vectors;
  const float* qkv;  // q, k, v of all heads, one after the other
  const float* cosines;  // [dim / 2] of the row's position
  const float* sines;
  uint64_t block;
  int slot;  // position inside the block
  Bf16* queries;
};

// Attention of up to kQueryRows consecutive rows of one sequence, for the query heads of one KV head.
struct Attention {
  Heads heads;
  int kv_head;
  float scale;              // of scores, log2(e) included
  const Bf16* queries;      // first row's; [rows][queries_stride]
  size_t queries_stride;
  int rows;
  int first_position;       // of the first row; the others follow one by one
  const uint64_t* blocks;   // of the sequence, from position 0
  Bf16* output;             // first row's; [rows][output_stride]
  size_t output_stride;
  Range segments;           // of `attend`
  float* partials;          // [segments][rows * group][partial_size]: largest, sum, values; null: merge and output

  int vectors() const { return rows * heads.group(); }
  int last_position() const { return first_position + rows - 1; }
  int all_segments() const { return last_position() / kSegmentTokens + 1; }
  size_t partial_size() const { return static_cast<size_t>(heads.dim) + kLanesOfPartial; }
  static constexpr int kLanesOfPartial = 16;
};

// Copy `pieces` pieces of `bytes` bytes, or only read them when `targets` is null; one checksum per piece.
struct CopyJob {
  const uint64_t* targets;
  const uint64_t* sources;
  uint64_t* checksums;
  size_t pieces;
  size_t bytes;
};

struct Kernels {
  const char* name;
  void (*matmul)(const Matmul&, Range rows, Range groups, void* scratch);  // of panel_bytes; untouched for kBf16
  void (*matmul_int8)(const Matmul&, Range rows, Range groups);            // of any format but kBf16
  void (*quantise)(const Quantise&);
  void (*expand)(const PackedMatrix&, int group, Bf16* to);  // a column group in kBf16
  void (*normalise)(const Normalise&);
  void (*place_row)(const PlaceRow&);
  size_t (*attention_scratch)(const Heads&);  // bytes that `attend` needs per thread
  void (*attend)(const Attention&, void* scratch);
  void (*merge_partials)(const Attention&, void* scratch);
  void (*copy_pieces)(const CopyJob&);
  void (*checksum_pieces)(const CopyJob&);
  uint64_t (*read_memory)(const void* from, size_t bytes);  // as fast as loads go; the result has no meaning
  double (*run_dots)(int64_t rounds, float* sink);          // register-fed dot products; returns FLOP done
  double (*run_int8_dots)(int64_t rounds, float* sink);
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace amx_bf16 {
extern const Kernels kernels;
}
namespace amx_emulated {
extern const Kernels kernels;
}
namespace neon {
extern const Kernels kernels;
}
namespace neon_bf16 {
extern const Kernels kernels;
}

}  // namespace memserve
