// The asynchronous copies of one thread, in order of issue: landed, then still under way.
#pragma once
#include <cstdint>
#include <vector>

#include "fiber.h"

namespace simt {

class CopyQueue {
 public:
  // For ThreadSanitizer `copier` is a thread, which starts a copy after its issue. What has landed
  // is ordered before the end of the wait and before nothing else. A warp shares a copier.
  explicit CopyQueue(tsan::Context& copier) : copier_(copier), maker_(tsan::current()) {}

  void issue(void* shared, const void* global, int bytes);
  void commit() { ++groups_; }
  void wait(int pending);    // for all groups but the last `pending`; -1: for everything
  void land(size_t copies);  // this many more; they stay in the queue until they are waited for
  size_t size() const { return copies_.size() - landed_; }  // still under way

 private:
  static constexpr int64_t kSlots = 64;
  struct Copy {
    void* shared;
    const void* global;
    int bytes;
    int64_t group;
    int64_t slot;
  };
  tsan::Context& copier_;
  void* maker_;  // whose memory the queue is
  uint64_t issued_order_[kSlots] = {};
  uint64_t landed_order_[kSlots] = {};
  std::vector<Copy> copies_;
  size_t landed_ = 0;
  int64_t groups_ = 0;  // committed
  int64_t issued_ = 0;
};

}  // namespace simt
