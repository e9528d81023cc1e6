// Copying and checksumming pieces of memory. Compiled once per level; every level gives the same checksum.
//
// Definition. A piece is padded with zero bytes to rows of 256 bytes = 32 little-endian 64-bit words. Lane l starts
// at (l + 1) * kSeed and takes word l of each row in turn:  a = rotl(a ^ w, 29) * kPrime  (mod 2^64). Then h starts at
// the piece's length in bytes and takes the 32 lanes in order by the same step; the result is
// h ^= h >> 32, h *= kPrime, h ^= h >> 29.
// Each step is a bijection in `a` and in `w`: a change inside one lane's words can cancel only against another change.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace memserve {
namespace MEMSERVE_LEVEL {
namespace {

constexpr size_t kRowBytes = 256;
constexpr int kLanes = 32;
constexpr uint64_t kSeed = 0x9E3779B97F4A7C15u;
constexpr uint64_t kPrime = 0xC2B2AE3D27D4EB4Fu;
constexpr int kRotation = 29;

inline uint64_t mix_word(uint64_t lane, uint64_t word) {
  const uint64_t x = lane ^ word;
  return ((x << kRotation) | (x >> (64 - kRotation))) * kPrime;
}

#if defined(__AVX512DQ__)

struct Vector {
  static constexpr size_t kBytes = 64;
  __m512i bits;

  static Vector load(const void* from) { return {_mm512_loadu_si512(from)}; }
  void store(void* to) const { _mm512_storeu_si512(to, bits); }
  void stream(void* to) const { _mm512_stream_si512(static_cast<__m512i*>(to), bits); }
  Vector mixed_with(Vector word) const {
    const __m512i turned = _mm512_rol_epi64(_mm512_xor_si512(bits, word.bits), kRotation);
    return {_mm512_mullo_epi64(turned, _mm512_set1_epi64(static_cast<long long>(kPrime)))};
  }
};

inline void finish_streaming() { _mm_sfence(); }

#elif defined(__AVX2__)

struct Vector {
  static constexpr size_t kBytes = 32;
  __m256i bits;

  static Vector load(const void* from) { return {_mm256_loadu_si256(static_cast<const __m256i*>(from))}; }
  void store(void* to) const { _mm256_storeu_si256(static_cast<__m256i*>(to), bits); }
  void stream(void* to) const { _mm256_stream_si256(static_cast<__m256i*>(to), bits); }
  Vector mixed_with(Vector word) const {
    const __m256i x = _mm256_xor_si256(bits, word.bits);
    const __m256i turned = _mm256_or_si256(_mm256_slli_epi64(x, kRotation), _mm256_srli_epi64(x, 64 - kRotation));
    return {times_prime(turned)};
  }

 private:
  // AVX2 multiplies 32 bits by 32: the low 64 bits of the product from its three partial products.
  static __m256i times_prime(__m256i x) {
    const __m256i low = _mm256_set1_epi64x(static_cast<long long>(kPrime & 0xffffffffu));
    const __m256i high = _mm256_set1_epi64x(static_cast<long long>(kPrime >> 32));
    const __m256i left = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), low);
    const __m256i crossed = _mm256_add_epi64(left, _mm256_mul_epu32(x, high));
    return _mm256_add_epi64(_mm256_mul_epu32(x, low), _mm256_slli_epi64(crossed, 32));
  }
};

inline void finish_streaming() { _mm_sfence(); }

#else

struct Vector {
  static constexpr size_t kBytes = 8;
  uint64_t bits;

  static Vector load(const void* from) {
    uint64_t word;
    std::memcpy(&word, from, sizeof word);
    return {word};
  }
  void store(void* to) const { std::memcpy(to, &bits, sizeof bits); }
  void stream(void* to) const { store(to); }
  Vector mixed_with(Vector word) const { return {mix_word(bits, word.bits)}; }
};

inline void finish_streaming() {}

#endif

constexpr int kVectors = static_cast<int>(kRowBytes / Vector::kBytes);

struct Lanes {
  Vector vectors[kVectors];

  Lanes() {
    uint64_t words[kLanes];
    for (int l = 0; l < kLanes; ++l) words[l] = (static_cast<uint64_t>(l) + 1) * kSeed;
    for (int v = 0; v < kVectors; ++v) vectors[v] = Vector::load(reinterpret_cast<char*>(words) + v * Vector::kBytes);
  }

  uint64_t folded(size_t bytes) const {
    uint64_t words[kLanes];
    for (int v = 0; v < kVectors; ++v) vectors[v].store(reinterpret_cast<char*>(words) + v * Vector::kBytes);
    uint64_t hash = bytes;
    for (uint64_t word : words) hash = mix_word(hash, word);
    hash ^= hash >> 32;
    hash *= kPrime;
    return hash ^ (hash >> 29);
  }
};

enum class Store { kNone, kCached, kStreaming };

template <Store kStore>
inline void take_row(Lanes& lanes, char* to, const char* from) {
#pragma GCC unroll 32
  for (int v = 0; v < kVectors; ++v) {
    const Vector word = Vector::load(from + v * Vector::kBytes);
    if (kStore == Store::kCached) word.store(to + v * Vector::kBytes);
    if (kStore == Store::kStreaming) word.stream(to + v * Vector::kBytes);
    lanes.vectors[v] = lanes.vectors[v].mixed_with(word);
  }
}

template <Store kStore>
uint64_t take_piece(char* to, const char* from, size_t bytes) {
  Lanes lanes;
  size_t at = 0;
  for (; at + kRowBytes <= bytes; at += kRowBytes) {
    // Pieces of one block lie next to each other, so running ahead past a piece's end is rarely wasted.
    __builtin_prefetch(from + at + 1024);
    __builtin_prefetch(from + at + 1088);
    __builtin_prefetch(from + at + 1152);
    __builtin_prefetch(from + at + 1216);
    take_row<kStore>(lanes, to + at, from + at);
  }
  if (at < bytes) {
    char padded[kRowBytes] = {};
    std::memcpy(padded, from + at, bytes - at);
    if (kStore != Store::kNone) std::memcpy(to + at, padded, bytes - at);
    take_row<Store::kNone>(lanes, nullptr, padded);
  }
  return lanes.folded(bytes);
}

// A copy larger than this leaves nothing useful in the cache, so it may as well go around it.
constexpr size_t kStreamingThreshold = size_t{1} << 20;

void copy_pieces(const CopyJob& job) {
  const bool large = job.pieces * job.bytes >= kStreamingThreshold;
  for (size_t i = 0; i < job.pieces; ++i) {
    char* to = reinterpret_cast<char*>(job.targets[i]);
    const char* from = reinterpret_cast<const char*>(job.sources[i]);
    const bool streams = large && job.targets[i] % Vector::kBytes == 0;
    job.checksums[i] =
        streams ? take_piece<Store::kStreaming>(to, from, job.bytes) : take_piece<Store::kCached>(to, from, job.bytes);
  }
  finish_streaming();
}

void checksum_pieces(const CopyJob& job) {
  for (size_t i = 0; i < job.pieces; ++i)
    job.checksums[i] = take_piece<Store::kNone>(nullptr, reinterpret_cast<const char*>(job.sources[i]), job.bytes);
}

}  // namespace
}  // namespace MEMSERVE_LEVEL
}  // namespace memserve
