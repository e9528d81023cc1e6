#include "pool_module.h"

#include <nanobind/ndarray.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "blocks.h"
#include "prefixes.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace memserve {
namespace {

// Nothing here is handed back as an array: results go into arrays that numpy makes, which is quicker.
template <typename T>
using Array = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
Span<T> span_of(const Array<T>& array) {
  return {array.data(), array.size()};
}

template <typename T>
T* with_room(const Array<T>& array, size_t size, const char* name) {
  if (array.size() < size)
    throw std::invalid_argument(std::string(name) + " has room for " + std::to_string(array.size()) + " of " +
                                std::to_string(size) + " values");
  return array.data();
}

// The table's columns for as long as Python neither replaces nor lengthens them.
struct Columns : BlockColumns {
  Array<uint64_t> address_array;
  Array<int32_t> use_array;
  Array<uint8_t> origin_array;
  Array<int64_t> historical_array;
};

void construct(Columns* self, const Array<uint64_t>& addresses, const Array<int32_t>& uses,
               const Array<uint8_t>& origins, const Array<int64_t>& historical) {
  const size_t blocks = addresses.size();
  const BlockColumns columns{addresses.data(), with_room(uses, blocks, "uses"), with_room(origins, blocks, "origins"),
                             blocks, with_room(historical, 3, "historical")};
  new (self) Columns{columns, addresses, uses, origins, historical};
}

// The arrays of a list, kept alive while their blocks are looked at.
struct Edges {
  std::vector<Array<const int32_t>> arrays;
  std::vector<Edge> edges;
  size_t blocks = 0;

  explicit Edges(const nb::list& list) {
    arrays.reserve(list.size());
    edges.reserve(list.size());
    for (nb::handle item : list) {
      arrays.push_back(nb::cast<Array<const int32_t>>(item));
      edges.push_back(span_of(arrays.back()));
      blocks += edges.back().size;
    }
  }
};

size_t resolve_addresses(const Columns& table, const Array<const uint64_t>& asked, const Array<int64_t>& numbers) {
  return resolve(table, span_of(asked), with_room(numbers, asked.size(), "numbers"));
}

void occupy_blocks(const Columns& table, const Array<const int64_t>& stacked, const Array<uint64_t>& occupied) {
  occupy(table, span_of(stacked), with_room(occupied, stacked.size(), "occupied"));
}

size_t retain_blocks(const Columns& table, const Array<const int64_t>& numbers) {
  return retain(table, span_of(numbers));
}

size_t lease_edges(const Columns& table, const nb::list& edges, const Array<uint64_t>& leased,
                   const Array<uint8_t>& origins) {
  const Edges path(edges);
  return lease(table, path.edges, with_room(leased, path.blocks, "leased"), with_room(origins, path.blocks, "origins"));
}

nb::tuple release_addresses(const Columns& table, const Array<const uint64_t>& asked, const Array<int64_t>& freed) {
  const Released result = release(table, span_of(asked), with_room(freed, asked.size(), "freed"));
  return nb::make_tuple(result.freed, result.stale);
}

bool enter_index_blocks(const Columns& table, const Array<const int64_t>& numbers, uint8_t origin) {
  return enter_index(table, span_of(numbers), origin);
}

size_t leave_index_edges(const Columns& table, const nb::list& edges, const Array<int64_t>& freed) {
  const Edges gone(edges);
  return leave_index(table, gone.edges, with_room(freed, gone.blocks, "freed"));
}

size_t count_idle_tail(const Columns& table, const Array<const int32_t>& edge, size_t end, size_t most) {
  if (end > edge.size() || most > end) throw std::invalid_argument("an edge has no so many blocks to look at");
  return idle_tail(table, {edge.data() + (end - most), most});
}

size_t count_different_blocks(const nb::list& edges, const Array<const int64_t>& numbers) {
  return count_different(Edges(edges).edges, span_of(numbers));
}

size_t common_prefix_of(const Array<const int32_t>& a, const Array<const int32_t>& b, size_t start) {
  if (start > b.size()) throw std::invalid_argument("start lies beyond b");
  return common_prefix(a.data(), b.data() + start, std::min(a.size(), b.size() - start));
}

// The words of a buffer, while it is looked at. Any contiguous array has one; looking costs less than a cast.
class Words {
 public:
  explicit Words(nb::handle array) {
    if (PyObject_GetBuffer(array.ptr(), &view_, PyBUF_SIMPLE) != 0) nb::raise_python_error();
  }
  ~Words() { PyBuffer_Release(&view_); }
  Words(const Words&) = delete;
  Words& operator=(const Words&) = delete;
  const int32_t* data() const { return static_cast<const int32_t*>(view_.buf); }
  size_t size() const { return static_cast<size_t>(view_.len) / sizeof(int32_t); }

 private:
  Py_buffer view_;
};

// Follows tokens from the children `top` of a radix tree's root as far as whole blocks agree. Nodes have `key` and `children`.
nb::tuple walk_edges(nb::dict top, const Array<const int32_t>& tokens, size_t block) {
  if (block == 0) throw std::invalid_argument("a block has tokens");
  static const nb::handle key_name = nb::str("key").release(), children_name = nb::str("children").release();
  const size_t end = tokens.size() / block * block;
  nb::list nodes;
  nb::object children = std::move(top);
  size_t at = 0, tail = 0;
  while (at < end) {
    const nb::bytes name(tokens.data() + at, block * sizeof(int32_t));
    const nb::handle child = PyDict_GetItemWithError(children.ptr(), name.ptr());
    if (!child.is_valid()) {
      if (PyErr_Occurred() != nullptr) nb::raise_python_error();
      break;
    }
    nodes.append(child);
    const nb::object key = child.attr(key_name);
    const Words edge(key);
    const size_t same = common_prefix(edge.data(), tokens.data() + at, std::min(edge.size(), end - at)) / block;
    tail = same;
    at += same * block;
    if (same * block < edge.size()) break;
    children = child.attr(children_name);
  }
  return nb::make_tuple(nodes, tail, at / block);
}

nb::list recall_runs(const Array<uint8_t>& table, const Array<const int32_t>& tokens, size_t span, uint64_t seed,
                     uint8_t follows, double stamp) {
  const size_t places = table.size() / sizeof(Remembered);
  if (places == 0 || (places & (places - 1)) != 0 || span == 0)
    throw std::invalid_argument("the table must have a power of two of places, and a chunk tokens");
  nb::list rows;
  const PromptToRecall prompt{tokens.data(), tokens.size(), span, seed};
  for (const PastRun& run :
       recall_prefix(reinterpret_cast<Remembered*>(table.data()), places, prompt, follows, stamp))
    rows.append(nb::make_tuple(run.chunks, run.uses, run.follows, run.stamp));
  return rows;
}

}  // namespace

void bind_pool_passes(nb::module_& m) {
  nb::class_<Columns>(m, "BlockColumns")
      .def("__init__", &construct, "addresses"_a, "uses"_a, "origins"_a, "historical"_a);
  m.def("resolve_addresses", &resolve_addresses);
  m.def("occupy_blocks", &occupy_blocks);
  m.def("retain_blocks", &retain_blocks);
  m.def("lease_edges", &lease_edges);
  m.def("release_addresses", &release_addresses);
  m.def("enter_index", &enter_index_blocks);
  m.def("leave_index", &leave_index_edges);
  m.def("idle_tail", &count_idle_tail);
  m.def("count_different", &count_different_blocks);
  m.def("common_prefix", &common_prefix_of, "a"_a, "b"_a, "start"_a = 0);
  m.def("walk_edges", &walk_edges);
  m.def("recall_prefix", &recall_runs);
}

}  // namespace memserve
