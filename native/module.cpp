// The Python module memserve._native: argument checks and conversions only.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <tuple>
#include <variant>

#include "isa.h"
#include "kernels.h"
#include "limits.h"
#include "model.h"
#include "pool_module.h"
#include "product.h"
#include "scheduler_module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace memserve {
namespace {

using Addresses = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Checksums = nb::ndarray<nb::numpy, uint64_t, nb::ndim<1>>;

const Kernels*& default_kernels() {
  static const Kernels* chosen = &kernels_of(supported_levels().front());
  return chosen;
}

void set_isa(const std::string& name) { default_kernels() = &kernels_of(name); }

std::string isa() { return default_kernels()->name; }

Checksums new_checksums(size_t count) {
  auto* values = new uint64_t[count];
  nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<uint64_t*>(p); });
  return Checksums(values, {count}, owner);
}

size_t checked_size(int64_t nbytes) {
  if (nbytes < 0) throw std::invalid_argument("nbytes is " + std::to_string(nbytes) + "; it must not be negative");
  return static_cast<size_t>(nbytes);
}

Checksums copy_blocks(const Addresses& dst, const Addresses& src, int64_t nbytes) {
  if (dst.shape(0) != src.shape(0))
    throw std::invalid_argument("dst has " + std::to_string(dst.shape(0)) + " addresses and src " +
                                std::to_string(src.shape(0)) + "; they must be as many");
  Checksums checksums = new_checksums(src.shape(0));
  const CopyJob job{dst.data(), src.data(), checksums.data(), src.shape(0), checked_size(nbytes)};
  const Kernels* kernels = default_kernels();
  nb::gil_scoped_release unlocked;
  kernels->copy_pieces(job);
  return checksums;
}

Checksums checksum_blocks(const Addresses& src, int64_t nbytes) {
  Checksums checksums = new_checksums(src.shape(0));
  const CopyJob job{nullptr, src.data(), checksums.data(), src.shape(0), checked_size(nbytes)};
  const Kernels* kernels = default_kernels();
  nb::gil_scoped_release unlocked;
  kernels->checksum_pieces(job);
  return checksums;
}

using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using BlockTable = nb::ndarray<const uint64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Logits = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

// Memory of logits that Python has dropped, kept for the next pass: fresh pages would cost more than writing them.
class LogitsMemory : public std::enable_shared_from_this<LogitsMemory> {
 public:
  Logits lend(size_t rows, size_t columns) {
    auto* lent = new Lent{shared_from_this(), take(rows * columns)};
    nb::capsule owner(lent, [](void* p) noexcept {
      auto* back = static_cast<Lent*>(p);
      back->lender->spare_ = std::move(back->memory);
      delete back;
    });
    return Logits(lent->memory.data(), {rows, columns}, owner);
  }

 private:
  struct Lent {
    std::shared_ptr<LogitsMemory> lender;
    Buffer<float> memory;
  };

  Buffer<float> take(size_t count) {
    return spare_.size() >= count ? std::move(spare_) : Buffer<float>(count);
  }

  Buffer<float> spare_;  // only touched with the GIL held
};

using Memory = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

struct PythonModel : Model {
  using Model::Model;
  std::optional<Memory> adopted;  // keeps it alive
  std::shared_ptr<LogitsMemory> logits = std::make_shared<LogitsMemory>();
};

using Rows = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// A matrix as a file holds it; keeps the caller's memory alive.
struct PythonMatrix {
  Stored stored;
  int rows;
  int inputs;
  std::variant<Matrix, Rows> memory;

  const unsigned char* data() const {
    return std::visit([](const auto& m) { return reinterpret_cast<const unsigned char*>(m.data()); }, memory);
  }
};

void construct_floats(PythonMatrix* self, const Matrix& values) {
  new (self) PythonMatrix{Stored::kF32, static_cast<int>(values.shape(0)), static_cast<int>(values.shape(1)), values};
}

PythonMatrix matrix_of_blocks(const std::string& kind, const Rows& rows, int inputs) {
  const Stored stored = stored_type(kind);
  const MatrixSource source{"", stored, nullptr, static_cast<int>(rows.shape(0)), inputs};
  if (inputs <= 0 || inputs % block_values(stored) != 0 || source.row_bytes() != rows.shape(1))
    throw std::invalid_argument("rows of " + std::to_string(rows.shape(1)) + " bytes do not hold " +
                                std::to_string(inputs) + " inputs of type " + kind);
  return {stored, source.rows, inputs, rows};
}

const Kernels& chosen_kernels(const std::optional<std::string>& isa) {
  return isa ? kernels_of(*isa) : *default_kernels();
}

const float* checked(const Vector& values, int size, const char* name) {
  if (static_cast<int>(values.shape(0)) != size)
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(values.shape(0)) + " values, not " +
                                std::to_string(size));
  return values.data();
}

const float* checked(const Matrix& values, int rows, int columns, const char* name) {
  if (static_cast<int>(values.shape(0)) != rows || static_cast<int>(values.shape(1)) != columns)
    throw std::invalid_argument(std::string(name) + " has shape [" + std::to_string(values.shape(0)) + ", " +
                                std::to_string(values.shape(1)) + "], not [" + std::to_string(rows) + ", " +
                                std::to_string(columns) + "]");
  return values.data();
}

MatrixSource checked(const PythonMatrix& matrix, int rows, int inputs, const char* name) {
  if (matrix.rows != rows || matrix.inputs != inputs)
    throw std::invalid_argument(std::string(name) + " has shape [" + std::to_string(matrix.rows) + ", " +
                                std::to_string(matrix.inputs) + "], not [" + std::to_string(rows) + ", " +
                                std::to_string(inputs) + "]");
  return {name, matrix.stored, matrix.data(), rows, inputs};
}

Keep keep_of(const std::string& name) {
  if (name == "stored") return Keep::kStored;
  if (name == "bf16") return Keep::kBf16;
  if (name == "int8") return Keep::kInt8;
  throw std::invalid_argument("keep is '" + name + "'; accepted: stored, bf16, int8");
}

Activations activations_of(const std::string& name) {
  if (name == "bf16") return Activations::kBf16;
  if (name == "int8") return Activations::kInt8;
  throw std::invalid_argument("activations is '" + name + "'; accepted: bf16, int8");
}

using InputRows = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

Logits multiply(const PythonMatrix& matrix, const InputRows& inputs, const std::optional<std::string>& isa,
                const std::string& keep, const std::string& activations) {
  const size_t rows = inputs.shape(0), columns = static_cast<size_t>(matrix.rows);
  if (static_cast<int>(inputs.shape(1)) != matrix.inputs)
    throw std::invalid_argument("rows of " + std::to_string(inputs.shape(1)) + " inputs for a matrix of " +
                                std::to_string(matrix.inputs));
  auto* outputs = new float[rows * columns];
  nb::capsule owner(outputs, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  const MatrixSource source{"matrix", matrix.stored, matrix.data(), matrix.rows, matrix.inputs};
  multiply_once(chosen_kernels(isa), source, keep_of(keep), activations_of(activations), inputs.data(),
                static_cast<int>(rows), outputs);
  return Logits(outputs, {rows, columns}, owner);
}

KvFormat kv_format_of(const std::string& name) {
  if (name == "bf16") return KvFormat::kBf16;
  if (name == "int8") return KvFormat::kInt8;
  throw std::invalid_argument("kv_dtype is '" + name + "'; accepted: bf16, int8");
}

RopeTable rope_table(const Matrix& cosines, const Matrix& sines, int head_dim) {
  const int positions = static_cast<int>(cosines.shape(0));
  const float* c = checked(cosines, positions, head_dim / 2, "cosines");
  const float* s = checked(sines, positions, head_dim / 2, "sines");
  return {{c, c + cosines.size()}, {s, s + sines.size()}, positions};
}

void construct(PythonModel* self, int layers, int hidden, int heads, int kv_heads, int head_dim, int feed_forward,
               int vocabulary, float rms_epsilon, const Matrix& cosines, const Matrix& sines, int threads,
               const std::vector<int>& cores, const std::optional<std::string>& isa, const std::string& keep,
               const std::string& activations, const std::string& kv_dtype) {
  const KvFormat kv = kv_format_of(kv_dtype);
  const ModelShape shape{layers, hidden, heads, kv_heads, head_dim, feed_forward, vocabulary, rms_epsilon, kv};
  new (self) PythonModel(shape, rope_table(cosines, sines, head_dim), chosen_kernels(isa), threads, cores,
                         keep_of(keep), activations_of(activations));
}

void check_layer(const ModelShape& s, int index) {
  if (index < 0 || index >= s.layers)
    throw std::invalid_argument("there is no layer " + std::to_string(index) + " of " + std::to_string(s.layers));
}

void set_layer(PythonModel& self, int index, const PythonMatrix& q, const PythonMatrix& k, const PythonMatrix& v,
               const PythonMatrix& o, const PythonMatrix& gate, const PythonMatrix& up, const PythonMatrix& down) {
  const ModelShape& s = self.shape();
  check_layer(s, index);
  const LayerSource source{checked(q, s.query_size(), s.hidden, "q"),
                           checked(k, s.kv_size(), s.hidden, "k"),
                           checked(v, s.kv_size(), s.hidden, "v"),
                           checked(o, s.hidden, s.query_size(), "o"),
                           checked(gate, s.feed_forward, s.hidden, "gate"),
                           checked(up, s.feed_forward, s.hidden, "up"),
                           checked(down, s.hidden, s.feed_forward, "down")};
  nb::gil_scoped_release unlocked;
  self.set_layer(index, source);
}

const float* checked(const std::optional<Vector>& values, int size, const char* name) {
  return values ? checked(*values, size, name) : nullptr;
}

void set_head_vectors(PythonModel& self, int index, const std::optional<Vector>& qkv_bias,
                      const std::optional<Vector>& q_norm, const std::optional<Vector>& k_norm) {
  const ModelShape& s = self.shape();
  check_layer(s, index);
  self.set_head_vectors(index, {checked(qkv_bias, s.qkv_size(), "qkv_bias"), checked(q_norm, s.head_dim, "q_norm"),
                                checked(k_norm, s.head_dim, "k_norm")});
}

void set_norms(PythonModel& self, int index, const Vector& attention, const Vector& ffn) {
  const ModelShape& s = self.shape();
  check_layer(s, index);
  self.set_norms(index, checked(attention, s.hidden, "attention_norm"), checked(ffn, s.hidden, "ffn_norm"));
}

using Placed = std::tuple<int, int, int, size_t>;  // format, columns, depth, offset

std::vector<Placed> placed(const PythonModel& self) {
  std::vector<Placed> result;
  for (const PlacedMatrix& m : self.placed())
    result.emplace_back(static_cast<int>(m.format), m.columns, m.depth, m.offset);
  return result;
}

nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>> packed(nb::handle_t<PythonModel> self) {
  const PythonModel& model = nb::cast<const PythonModel&>(self);
  return {model.weights(), {model.weight_bytes()}, self};
}

void adopt(PythonModel& self, const Memory& memory, const std::vector<Placed>& matrices) {
  std::vector<PlacedMatrix> list;
  for (const auto& [format, columns, depth, offset] : matrices)
    list.push_back({static_cast<Format>(format), columns, depth, offset});
  self.adopt(memory.data(), memory.size(), list);
  self.adopted = memory;
}

void set_embedding(PythonModel& self, const PythonMatrix& embedding) {
  const MatrixSource source = checked(embedding, self.shape().vocabulary, self.shape().hidden, "embedding");
  nb::gil_scoped_release unlocked;
  self.set_embedding(source);
}

void set_head(PythonModel& self, const PythonMatrix* head) {
  if (head == nullptr) return self.set_head(nullptr);
  const MatrixSource source = checked(*head, self.shape().vocabulary, self.shape().hidden, "head");
  nb::gil_scoped_release unlocked;
  self.set_head(&source);
}

void set_output_norm(PythonModel& self, const Vector& norm) {
  self.set_output_norm(checked(norm, self.shape().hidden, "output_norm"));
}

Batch batch_of(const Indices& tokens, const Indices& positions, const Indices& starts, const BlockTable& blocks,
               const Indices& logit_rows) {
  if (positions.shape(0) != tokens.shape(0))
    throw std::invalid_argument("positions must be as many as tokens (" + std::to_string(tokens.shape(0)) + ")");
  if (starts.shape(0) != blocks.shape(0) + 1)
    throw std::invalid_argument("starts must be one more than sequences (" + std::to_string(blocks.shape(0)) + ")");
  return {tokens.data(),
          positions.data(),
          static_cast<int>(tokens.shape(0)),
          starts.data(),
          static_cast<int>(blocks.shape(0)),
          blocks.data(),
          static_cast<int>(blocks.shape(1)),
          logit_rows.data(),
          static_cast<int>(logit_rows.shape(0))};
}

Logits forward(PythonModel& self, const Indices& tokens, const Indices& positions, const Indices& starts,
               const BlockTable& blocks, const Indices& logit_rows, int progress, int every) {
  const Batch batch = batch_of(tokens, positions, starts, blocks, logit_rows);
  self.check(batch);
  if (every < 1) throw std::invalid_argument("every is " + std::to_string(every) + "; it must be at least 1 layer");
  const size_t vocabulary = static_cast<size_t>(self.shape().vocabulary);
  Logits logits = self.logits->lend(static_cast<size_t>(batch.wanted), vocabulary);
  float* values = logits.data();
  nb::gil_scoped_release unlocked;
  self.forward(batch, values, {progress, every});
  return logits;
}

double read_bandwidth(int threads, size_t nbytes, const std::optional<std::string>& isa) {
  const Kernels& kernels = chosen_kernels(isa);
  nb::gil_scoped_release unlocked;
  return measure_read_bandwidth(kernels, threads, nbytes);
}

double dot_peak(int threads, const std::optional<std::string>& isa, const std::string& name) {
  const Kernels& kernels = chosen_kernels(isa);
  const Activations activations = activations_of(name);
  nb::gil_scoped_release unlocked;
  return measure_dot_peak(kernels, threads, activations);
}

}  // namespace
}  // namespace memserve

NB_MODULE(_native, m) {
  // What lives until the process ends is no leak: an instance freezes its garbage collector, so nothing frees it.
  nb::set_leak_warnings(false);
  using namespace memserve;
  m.def("isa", &isa);
  m.def("supported_isas", &supported_levels);
  m.def("emulated_isas", &emulated_levels);
  m.def("set_isa", &set_isa, "name"_a);
  m.def("copy_blocks", &copy_blocks, "dst"_a, "src"_a, "nbytes"_a);
  m.def("checksum_blocks", &checksum_blocks, "src"_a, "nbytes"_a);
  m.def("read_bandwidth", &read_bandwidth, "threads"_a, "nbytes"_a = size_t{256} << 20, "isa"_a = nb::none());
  m.def("dot_peak", &dot_peak, "threads"_a, "isa"_a = nb::none(), "activations"_a = "bf16");
  m.attr("packed_layout") = kPackedLayout;
  nb::class_<PythonMatrix>(m, "Matrix")
      .def("__init__", &construct_floats, "values"_a)
      .def_static("of_blocks", &matrix_of_blocks, "kind"_a, "rows"_a, "inputs"_a);
  m.def("multiply", &multiply, "matrix"_a, "inputs"_a, "isa"_a = nb::none(), "keep"_a = "stored",
        "activations"_a = "bf16");
  nb::class_<PythonModel>(m, "Model")
      .def("__init__", &construct, nb::kw_only(), "layers"_a, "hidden"_a, "heads"_a, "kv_heads"_a, "head_dim"_a,
           "feed_forward"_a, "vocabulary"_a, "rms_epsilon"_a, "cosines"_a, "sines"_a, "threads"_a,
           "cores"_a = std::vector<int>(), "isa"_a = nb::none(), "keep"_a = "stored", "activations"_a = "bf16",
           "kv_dtype"_a = "bf16")
      .def_prop_ro("isa", [](const PythonModel& self) { return std::string(self.kernels().name); })
      .def_prop_ro("weight_bytes", [](const PythonModel& self) { return self.weight_bytes(); })
      .def_prop_ro("multiplies_integers", [](const PythonModel& self) { return self.multiplies_integers(); })
      .def("set_layer", &set_layer, "index"_a, "q"_a, "k"_a, "v"_a, "o"_a, "gate"_a, "up"_a, "down"_a)
      .def("set_norms", &set_norms, "index"_a, "attention_norm"_a, "ffn_norm"_a)
      .def("set_head_vectors", &set_head_vectors, "index"_a, "qkv_bias"_a = nb::none(), "q_norm"_a = nb::none(),
           "k_norm"_a = nb::none())
      .def("set_embedding", &set_embedding, "embedding"_a)
      .def("set_head", &set_head, "head"_a.none())
      .def("set_output_norm", &set_output_norm, "norm"_a)
      .def("placed", &placed)
      .def("packed", &packed)
      .def("adopt", &adopt, "memory"_a, "matrices"_a)
      .def_prop_ro_static("tile_rows", [](nb::handle) { return PythonModel::tile_rows(); })
      .def("forward", &forward, "tokens"_a, "positions"_a, "starts"_a, "blocks"_a, "logit_rows"_a, "progress"_a = -1,
           "every"_a = 1);
  bind_pool_passes(m);
  bind_scheduler_passes(m);
}
