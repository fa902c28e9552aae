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
  int64_t hits = 0;               // pages asked for that were there
  int64_t misses = 0;             // pages asked for that were not, or were still being read
  int64_t evictions = 0;          // pages that left for others
  int64_t read_ahead = 0;         // pages that got a frame before they were asked for
  int64_t read_ahead_hits = 0;    // of these: asked for when they were there
  int64_t read_ahead_unused = 0;  // of these: gone again without having been asked for
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
  // pages that are there already are left as they are (-1). Frames that were asked for or filled
  // after `since`, a value of clock(), are not taken.
  void acquire_ahead(const std::vector<PageId>& pages, int64_t since, std::vector<int32_t>* frames);
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
  // Forgets the lane's pages from `begin` on; those that no other lane shares may not be held.
  void drop(int64_t lane, int64_t begin);
  // The first `num_pages` pages of `lane` are those of `source` from now on: one frame serves both.
  // Returns how many of them were so before. Pages of `lane` behind them stay as they are.
  int64_t share(int64_t lane, int64_t source, int64_t num_pages);

  // int32 [num_lanes, capacity()], -1 where a page has no frame; replaced by a larger one as lanes
  // grow.
  std::shared_ptr<std::vector<int32_t>> table() const;
  int64_t capacity() const;
  int64_t num_lanes() const { return num_lanes_; }
  // Frames that are free or whose page may leave.
  int64_t num_available() const;
  int64_t clock() const;  // calls of acquire()
  // For tests: pages that may be evicted, the next one first.
  std::vector<PageId> eviction_order() const;

 private:
  struct Frame {
    PageId id{-1, -1};  // one of those that share it
    int32_t holds = 0;
    int32_t pins = 0;  // lanes that keep it here
    bool loading = false;
    bool backed = false;
    bool ahead = false;   // nobody has asked for it yet
    bool listed = false;  // in the list of those that may be evicted
    int32_t previous = -1, next = -1;
    int64_t used = 0;  // clock_ when it was last asked for or filled
  };

  size_t cell(PageId id) const { return static_cast<size_t>(id.lane * capacity_ + id.page); }
  // The next lane that shares the page; in the end `id.lane` again.
  int64_t next_sharer(PageId id) const { return sharers_.empty() ? id.lane : sharers_[cell(id)]; }
  bool is_shared_with(PageId id, int64_t lane) const;
  int64_t first_sharer(PageId id) const;
  void set_frame(PageId id, int32_t frame);
  void forget(PageId id);
  void set_pin(PageId id, bool pinned);
  void leave(PageId id);
  void require_unheld(int64_t lane, int64_t begin, int64_t end) const;
  int32_t find(PageId id) const;
  void check(const std::vector<PageId>& pages) const;
  void require_frames(const std::vector<PageId>& pages) const;
  void reserve(const std::vector<PageId>& pages);
  void reserve_pages(int64_t needed);
  int32_t take_frame(PageId id);
  int32_t take_frame_to_fill(PageId id);
  int64_t available() const { return static_cast<int64_t>(free_.size()) + num_listed_; }
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
  int64_t clock_ = 0;
  // All [num_lanes, capacity_]:
  std::shared_ptr<std::vector<int32_t>> table_;
  std::vector<char> pinned_;      // lanes that keep a page
  std::vector<int32_t> sharers_;  // rings of lanes that share a page; empty before the first share
  FrameStats stats_;
};

}  // namespace longctx::host
