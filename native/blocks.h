// Passes over the block table: one call does to all blocks of a prompt what each of them needs.
//
// An address is tier (2 bits) | block number (30 bits) | generation (32 bits). `uses` of a block is twice its references,
// plus one if it is indexed. Blocks are taken in turn, so one that is named twice is served twice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace memserve {

template <typename T>
struct Span {
  T* data;
  size_t size;
  T* begin() const { return data; }
  T* end() const { return data + size; }
};

using Numbers = Span<const int64_t>;
using Edge = Span<const int32_t>;  // the block numbers of one edge of a prompt tree

// The columns of the table, equally long. `historical` counts per tier.
struct BlockColumns {
  uint64_t* addresses;
  int32_t* uses;
  uint8_t* origins;
  size_t blocks;
  int64_t* historical;
};

struct Released {
  size_t freed;  // blocks that are free now; the caller has their numbers
  size_t stale;  // addresses whose generation has passed, or that nobody held
};

// How many addresses from the first on are present ones; writes their block numbers.
size_t resolve(const BlockColumns& table, Span<const uint64_t> addresses, int64_t* numbers);

// Gives free blocks, the last of them first, one reference each; writes their addresses.
void occupy(const BlockColumns& table, Numbers stacked, uint64_t* addresses);

// Adds one reference to each block. Returns how many were done before one that is free, which must not be.
size_t retain(const BlockColumns& table, Numbers numbers);

// The same for the blocks of edges, of which it writes present addresses and origins.
size_t lease(const BlockColumns& table, const std::vector<Edge>& edges, uint64_t* addresses, uint8_t* origins);

// Drops one reference of each address's block. What has none left becomes historical or, with a new generation, free.
Released release(const BlockColumns& table, Span<const uint64_t> addresses, int64_t* freed);

// Marks blocks as indexed, with their origin: all if each is referenced, not indexed, and named once; else none. Says
// whether it did.
bool enter_index(const BlockColumns& table, Numbers numbers, uint8_t origin);

// Takes blocks out of the index; those without references become free. Returns how many did and writes their numbers.
size_t leave_index(const BlockColumns& table, const std::vector<Edge>& edges, int64_t* freed);

// Blocks at the end of an edge that nobody holds.
size_t idle_tail(const BlockColumns& table, Edge edge);

// In how many places `numbers` differ from the blocks of edges one after the other; `numbers` must not be shorter.
size_t count_different(const std::vector<Edge>& edges, Numbers numbers);

}  // namespace memserve
