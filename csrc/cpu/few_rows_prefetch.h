// How the rows of K and V come near: line by line in sequence, or scattered, each on a page of its
// own.
#pragma once
#include <cstdint>

namespace longctx::cpu {
namespace {

// Of rows in sequence: brings them into the L2 cache line by line while something else computes:
// more lines are in flight there than towards L1 (measured: 9.0 against 6.1 GB/s of random rows of
// 256 bytes). Evenly spread, or the loads of the computation queue up behind a burst.
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

// Of scattered rows: brings those of a step into the L1 cache while those of the next one come from
// memory. Of those of the step after that one line each is asked for, which finds their pages: four
// lines of a row at once would wait for the same page walk (measured: rows alone 0.29 ms, with this
// 0.25). Prefetching in the midst of the computation is no faster, probably because a prefetch that
// waits for a page walk holds up what follows it.
struct RowRange {
  const void* const* k_rows;
  const void* const* v_rows;
  int64_t count;
};

inline void fetch_rows(const RowRange& now, const RowRange& next, const RowRange& later,
                       int64_t k_bytes, int64_t v_bytes) {
  // A row that is not aligned reaches into one more line.
  const auto crosses = [](const void* row, int64_t bytes) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 64) + (bytes - 1) % 64 >= 64;
  };
  const auto touch = [&](const void* row, int64_t bytes) {
    const volatile char* data = static_cast<const char*>(row);
    for (int64_t b = 0; b < bytes; b += 64) (void)data[b];
    if (crosses(row, bytes)) (void)data[bytes - 1];
  };
  const auto prefetch = [&](const void* row, int64_t bytes) {
    const char* data = static_cast<const char*>(row);
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(data + b, 0, 2);
    if (crosses(row, bytes)) __builtin_prefetch(data + bytes - 1, 0, 2);
  };
  int64_t count = now.count > next.count ? now.count : next.count;
  if (later.count > count) count = later.count;
  for (int64_t i = 0; i < count; ++i) {
    if (i < later.count) __builtin_prefetch(later.k_rows[i], 0, 2);
    if (i < next.count) prefetch(next.k_rows[i], k_bytes);
    if (i < now.count) touch(now.k_rows[i], k_bytes);
    if (i < later.count) __builtin_prefetch(later.v_rows[i], 0, 2);
    if (i < next.count) prefetch(next.v_rows[i], v_bytes);
    if (i < now.count) touch(now.v_rows[i], v_bytes);
  }
}

}  // namespace
}  // namespace longctx::cpu
