// Which page stands in which frame of a bounded pool, and which one leaves next: least recently
// used first, of those that are stored elsewhere, not pinned and not being read. No page data
// passes through here.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "page_format.h"

namespace longctx::host {

// Not enough frames; nothing has changed.
class NoFrameError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct FrameStats {
  int64_t hits = 0;        // pages asked for that had a frame
  int64_t misses = 0;      // pages asked for that had none
  int64_t evictions = 0;   // pages that left for others
  int64_t read_ahead = 0;  // pages that got a frame before they were asked for
};

class FrameTable {
 public:
  FrameTable(int64_t num_frames, int64_t num_lanes);

  int64_t num_frames() const { return static_cast<int64_t>(frames_.size()); }
  int64_t num_used() const;
  FrameStats stats() const;
  void reset_stats();

  // Holds pages[i], which stay where they are until release(); `loads[i]` says that the frame is
  // new and the caller must fill it, then call loaded(). Frames that another caller fills are
  // waited for by wait_loaded(), after the caller's own are filled: so no two callers wait for each
  // other.
  void acquire(const std::vector<PageId>& pages, std::vector<int32_t>* frames,
               std::vector<char>* loads);
  // The same for as many of `pages` as find a frame; others get -1. Counted as read ahead, and
  // pages that are there already are left as they are (-1).
  void acquire_ahead(const std::vector<PageId>& pages, std::vector<int32_t>* frames);
  void loaded(const std::vector<int32_t>& frames);
  // The frames could not be filled: they are free again.
  void abandon(const std::vector<int32_t>& frames);
  // False if a frame was abandoned by the caller who filled it.
  bool wait_loaded(const std::vector<PageId>& pages, const std::vector<int32_t>& frames);
  void release(const std::vector<int32_t>& frames);

  // Frames for pages that are written here first: held, pinned and not backed.
  void place(const std::vector<PageId>& pages, std::vector<int32_t>* frames);
  // The pages are stored elsewhere too (or no longer): only then may they be evicted.
  void set_backed(const std::vector<PageId>& pages, bool backed);
  // Pages [begin, end) of a lane stay until unpinned; those without a frame are skipped.
  void set_pinned(int64_t lane, int64_t begin, int64_t end, bool pinned);
  // Forgets the lane's pages from `begin` on. None of them may be held.
  void drop(int64_t lane, int64_t begin);

  // int32 [num_lanes, capacity()], -1 where a page has no frame; replaced by a larger one as lanes
  // grow.
  std::shared_ptr<std::vector<int32_t>> table() const;
  int64_t capacity() const;
  int64_t num_lanes() const { return num_lanes_; }
  // For tests: pages that may be evicted, the next one first.
  std::vector<PageId> eviction_order() const;

 private:
  struct Frame {
    PageId id{-1, -1};
    int32_t holds = 0;
    bool loading = false;
    bool backed = false;
    bool pinned = false;
    bool listed = false;  // in the list of those that may be evicted
    int32_t previous = -1, next = -1;
  };

  int32_t& slot(PageId id) { return (*table_)[id.lane * capacity_ + id.page]; }
  int32_t find(PageId id) const;
  void check(const std::vector<PageId>& pages) const;
  void require_frames(const std::vector<PageId>& pages) const;
  void reserve(const std::vector<PageId>& pages);
  int32_t take_frame(PageId id);
  int64_t num_available() const { return static_cast<int64_t>(free_.size()) + num_listed_; }
  void update_listing(int32_t frame);
  void unlink(int32_t frame);
  void free_frame(int32_t frame);
  void release_one(int32_t frame);

  const int64_t num_lanes_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Frame> frames_;
  std::vector<int32_t> free_;
  int32_t oldest_ = -1, newest_ = -1;  // ends of the list
  int64_t num_listed_ = 0;
  int64_t capacity_ = 0;
  std::shared_ptr<std::vector<int32_t>> table_;
  FrameStats stats_;
};

}  // namespace longctx::host
