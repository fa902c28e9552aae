// Software prefetching in step with a computation. Internal linkage, as the engines that include
// it.
#pragma once
#include <cstdint>

namespace longctx::cpu {
namespace {

// Brings rows into the L2 cache line by line while something else computes: more lines are in
// flight there than towards L1 (measured: 9.0 against 6.1 GB/s of random rows of 256 bytes). Evenly
// spread, or the loads of the computation queue up behind a burst.
class LinePrefetch {
 public:
  LinePrefetch(const void* const* rows, int64_t count, int64_t bytes)
      : row_(rows), end_(rows + count), bytes_(bytes) {}
  // Spreads what is left over `calls` calls.
  void spread(int64_t calls) {
    const int64_t lines = (end_ - row_) * ((bytes_ + 63) / 64);
    rate_ = (lines + calls - 1) / calls;
  }
  void operator()() {
    for (int64_t i = 0; i < rate_ && row_ < end_; ++i) {
      __builtin_prefetch(static_cast<const char*>(*row_) + offset_, 0, 2);
      offset_ += 64;
      if (offset_ >= bytes_) {
        offset_ = 0;
        ++row_;
      }
    }
  }

 private:
  const void* const* row_;
  const void* const* end_;
  int64_t bytes_;
  int64_t offset_ = 0;
  int64_t rate_ = 0;
};

}  // namespace
}  // namespace longctx::cpu
