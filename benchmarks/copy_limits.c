/* The yardsticks of copy_limits.py: a copy around the cache without checksums, as the compiler's vectors allow. */
#include <stddef.h>
#include <stdint.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

void stream_blocks(const uint64_t *targets, const uint64_t *sources, size_t blocks, size_t bytes) {
  for (size_t i = 0; i < blocks; ++i) {
    char *to = (char *)targets[i];
    const char *from = (const char *)sources[i];
    for (size_t at = 0; at < bytes; at += 256) {
      for (size_t line = 0; line < 256; line += 64) __builtin_prefetch(from + at + 1024 + line);
#if defined(__AVX512F__)
      for (size_t word = 0; word < 256; word += 64)
        _mm512_stream_si512((__m512i *)(to + at + word), _mm512_loadu_si512(from + at + word));
#elif defined(__AVX2__)
      for (size_t word = 0; word < 256; word += 32)
        _mm256_stream_si256((__m256i *)(to + at + word), _mm256_loadu_si256((const __m256i *)(from + at + word)));
#else
      __builtin_memcpy(to + at, from + at, 256);
#endif
    }
  }
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}
