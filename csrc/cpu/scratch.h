// Per-thread scratch memory that is kept between calls, 64-byte aligned and on huge pages where the
// kernel grants them (4 KiB pages cost the tile kernels a third of their speed under nested
// paging).
#pragma once
#include <cstddef>
#include <cstdint>

namespace longctx::cpu {

// At least `bytes` of uninitialised memory owned by the calling thread, valid until its next call
// on that thread. Throws std::bad_alloc.
void* thread_scratch(size_t bytes);

// Asks for huge pages under memory that is about to be written for the first time: a large output
// is fresh from the kernel, and faulting it in by 4 KiB pages took a quarter of the time of a fast
// op.
void prefer_huge_pages(void* data, size_t bytes);

// Hands out 64-byte aligned pieces of one scratch block: size with add(), then place with take().
class ScratchPlan {
 public:
  template <class T>
  size_t add(int64_t count) {
    const size_t offset = bytes_;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return offset;
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

}  // namespace longctx::cpu
