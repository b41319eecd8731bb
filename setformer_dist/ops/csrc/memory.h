// Working memory of the kernels. Large arrays lie in huge pages where the system has them: the matrices of a long
// sequence are swept from end to end once per round, and with pages of 4 KiB a forward and backward of 8 heads of 50,176
// tokens took 30,000 to 40,000 page faults (now 700 to 1,800).

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace setformer {

constexpr std::size_t HUGE_PAGE = std::size_t(2) << 20;

// Ask for huge pages under the whole ones of some bytes that were not written yet. A hint: nothing fails.
inline void prefer_huge_pages(void* data, std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const auto first = (reinterpret_cast<std::uintptr_t>(data) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const auto last = (reinterpret_cast<std::uintptr_t>(data) + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(long size) : data_(allocate(size * sizeof(T)), Free{alignment(size * sizeof(T))}) {}
  operator T*() const { return data_.get(); }

 private:
  static std::align_val_t alignment(std::size_t bytes) {
    return std::align_val_t(bytes < 2 * HUGE_PAGE ? 64 : HUGE_PAGE);
  }

  static T* allocate(std::size_t bytes) {
    void* data = ::operator new(bytes, alignment(bytes));
    if (bytes >= 2 * HUGE_PAGE) prefer_huge_pages(data, bytes);
    return static_cast<T*>(data);
  }

  struct Free {
    std::align_val_t alignment{64};
    void operator()(T* data) const { ::operator delete(data, alignment); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace setformer
