// Zeroed, page-aligned memory, in huge pages where the kernel has them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>
#include <utility>

namespace memserve {

template <class Element>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t count) : bytes_((count + 1) * sizeof(Element)) {
    void* at = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    madvise(at, bytes_, MADV_HUGEPAGE);
    elements_ = static_cast<Element*>(at);
  }
  Buffer(Buffer&& other) noexcept
      : elements_(std::exchange(other.elements_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(elements_, other.elements_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Buffer() {
    if (elements_ != nullptr) munmap(elements_, bytes_);
  }

  Element* data() const { return elements_; }
  size_t size() const { return bytes_ / sizeof(Element); }

 private:
  Element* elements_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace memserve
