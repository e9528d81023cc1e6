// From matrices as files hold them, row-major, to packed ones. Knows ggml's block types; runs once per matrix.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace memserve {

// What a matrix is made of: float32, or blocks of one of ggml's types (`ggml-common.h`).
enum class Stored { kF32, kQ4_0, kQ4_1, kQ8_0, kQ4_K, kQ6_K };

// How matrices are to be kept: float32 as bf16 and blocks as such; everything as bf16; or float32 as 8-bit blocks too.
enum class Keep { kStored, kBf16, kInt8 };

struct MatrixSource {
  const char* name;
  Stored stored;
  const unsigned char* data;
  int rows;
  int inputs;

  size_t row_bytes() const;
  const unsigned char* row(int index) const { return data + static_cast<size_t>(index) * row_bytes(); }
};

// Rows of one type, in the order of the packed matrix's outputs.
struct SourceRows {
  const char* name;
  Stored stored;
  int inputs;
  std::vector<const unsigned char*> rows;

  explicit SourceRows(const MatrixSource& first);
  void append(const MatrixSource& source);
};

// Weights of a block; a row is made of whole ones.
int block_values(Stored stored);

// Throws std::invalid_argument for a name that is none of ggml's types above.
Stored stored_type(const std::string& name);

Format packed_format(Stored stored, Keep keep);

// One column group; the matrix's memory is all zeros before. False if a scale is not finite.
bool pack_group(const PackedMatrix& matrix, int group, const SourceRows& source);

}  // namespace memserve
