// Runs a model of a plain file on one level, without Python: for machines that are only emulated.
//
//   run_model MODEL LEVEL ACTIVATIONS THREADS OUTPUT [CHUNK...]
//
// MODEL holds, in the machine's byte order, what scripts/check_neon.py writes; OUTPUT gets the logits of all tokens,
// float32[tokens][vocabulary]. Tokens are taken in the given chunks, the rest at once.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include "../../native/isa.h"
#include "../../native/model.h"

using namespace memserve;

namespace {

class File {
 public:
  explicit File(const char* path) : stream_(path, std::ios::binary) {
    if (!stream_) throw std::runtime_error(std::string(path) + " cannot be read");
  }

  template <class Value>
  Value take() {
    return take_many<Value>(1).front();
  }
  template <class Value>
  std::vector<Value> take_many(size_t count) {
    std::vector<Value> values(count);
    stream_.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(count * sizeof(Value)));
    if (!stream_) throw std::runtime_error("the model's file is too short");
    return values;
  }

 private:
  std::ifstream stream_;
};

struct StoredMatrix {
  std::string kind;
  int rows;
  int inputs;
  std::vector<unsigned char> bytes;

  explicit StoredMatrix(File& file) {
    const auto name = file.take_many<char>(8);
    kind = name.data();
    rows = file.take<int32_t>();
    inputs = file.take<int32_t>();
    bytes = file.take_many<unsigned char>(static_cast<size_t>(file.take<int64_t>()));
    const MatrixSource whole = source();
    if (inputs % block_values(whole.stored) != 0 || bytes.size() != static_cast<size_t>(rows) * whole.row_bytes())
      throw std::runtime_error("a matrix is not made of whole blocks");
  }
  MatrixSource source() const {
    return {"matrix", kind == "F32" ? Stored::kF32 : stored_type(kind), bytes.data(), rows, inputs};
  }
};

ModelShape take_shape(File& file) {
  const auto n = file.take_many<int32_t>(7);
  return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], file.take<float>(), KvFormat::kBf16};
}

void fill(Model& model, File& file) {
  const size_t hidden = static_cast<size_t>(model.shape().hidden);
  for (int layer = 0; layer < model.shape().layers; ++layer) {
    const auto attention_norm = file.take_many<float>(hidden), ffn_norm = file.take_many<float>(hidden);
    std::vector<StoredMatrix> m;
    for (int i = 0; i < 7; ++i) m.emplace_back(file);
    model.set_layer(layer, {m[0].source(), m[1].source(), m[2].source(), m[3].source(), m[4].source(), m[5].source(),
                            m[6].source()});
    model.set_norms(layer, attention_norm.data(), ffn_norm.data());
  }
  model.set_embedding(StoredMatrix(file).source());
  const StoredMatrix head(file);
  const MatrixSource source = head.source();
  model.set_head(&source);
  model.set_output_norm(file.take_many<float>(hidden).data());
}

// Blocks of one sequence whose unwritten memory is NaN.
struct Pool {
  std::vector<uint16_t> memory;
  std::vector<uint64_t> blocks;

  Pool(const ModelShape& shape, int tokens) {
    const size_t halves = static_cast<size_t>(shape.layers) * 2 * static_cast<size_t>(shape.kv_size()) * kBlockTokens;
    const size_t count = static_cast<size_t>((tokens + kBlockTokens - 1) / kBlockTokens);
    memory.assign(halves * count, 0xffff);
    for (size_t block = 0; block < count; ++block)
      blocks.push_back(reinterpret_cast<uint64_t>(memory.data() + block * halves));
  }
};

void run_chunk(Model& model, const Pool& pool, const std::vector<int32_t>& tokens, int begin, int end, float* logits) {
  std::vector<int32_t> positions, rows;
  for (int at = begin; at < end; ++at) {
    positions.push_back(at);
    rows.push_back(at - begin);
  }
  const int32_t starts[] = {0, end - begin};
  const Batch batch{tokens.data() + begin, positions.data(),  end - begin, starts,    1, pool.blocks.data(),
                    static_cast<int>(pool.blocks.size()), rows.data(), end - begin};
  model.check(batch);
  model.forward(batch, logits + static_cast<size_t>(begin) * static_cast<size_t>(model.shape().vocabulary));
}

void run(int count, char** words) {
  if (count < 6) throw std::runtime_error("usage: run_model MODEL LEVEL ACTIVATIONS THREADS OUTPUT [CHUNK...]");
  const Activations activations = std::string(words[3]) == "int8" ? Activations::kInt8 : Activations::kBf16;
  File file(words[1]);
  const ModelShape shape = take_shape(file);
  const auto tokens = file.take_many<int32_t>(static_cast<size_t>(file.take<int32_t>()));
  const int total = static_cast<int>(tokens.size());
  const size_t angles = static_cast<size_t>(total) * static_cast<size_t>(shape.head_dim / 2);
  RopeTable rope{file.take_many<float>(angles), file.take_many<float>(angles), total};
  Model model(shape, std::move(rope), kernels_of(words[2]), std::atoi(words[4]), {}, Keep::kStored,
              activations);
  fill(model, file);
  const Pool pool(shape, total);
  std::vector<float> logits(tokens.size() * static_cast<size_t>(shape.vocabulary));
  int begin = 0;
  for (int word = 6; begin < total; ++word) {
    const int end = word < count ? std::min(total, begin + std::atoi(words[word])) : total;
    run_chunk(model, pool, tokens, begin, end, logits.data());
    begin = end;
  }
  std::ofstream output(words[5], std::ios::binary);
  output.write(reinterpret_cast<const char*>(logits.data()), static_cast<std::streamsize>(logits.size() * sizeof(float)));
}

}  // namespace

int main(int count, char** words) {
  try {
    if (count == 2 && std::string(words[1]) == "levels") {
      for (const std::string& level : supported_levels()) std::cout << level << '\n';
      return 0;
    }
    run(count, words);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "run_model: " << error.what() << '\n';
    return 1;
  }
}
