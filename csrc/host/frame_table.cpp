#include "frame_table.h"

#include <algorithm>
#include <string>

namespace longctx::host {

FrameTable::FrameTable(int64_t num_frames, int64_t num_lanes)
    : num_lanes_(num_lanes),
      frames_(static_cast<size_t>(num_frames)),
      table_(std::make_shared<std::vector<int32_t>>()) {
  free_.reserve(frames_.size());
  for (int64_t frame = num_frames; frame-- > 0;) free_.push_back(static_cast<int32_t>(frame));
}

int64_t FrameTable::num_used() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return num_frames() - static_cast<int64_t>(free_.size());
}

FrameStats FrameTable::stats() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

void FrameTable::reset_stats() {
  const std::lock_guard<std::mutex> lock(mutex_);
  stats_ = {};
}

std::shared_ptr<std::vector<int32_t>> FrameTable::table() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return table_;
}

int64_t FrameTable::capacity() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return capacity_;
}

int32_t FrameTable::find(PageId id) const {
  return id.page < capacity_ ? (*table_)[id.lane * capacity_ + id.page] : -1;
}

void FrameTable::check(const std::vector<PageId>& pages) const {
  constexpr int64_t kMaxPage = int64_t{1} << 30;
  for (const PageId& id : pages) {
    if (id.lane < 0 || id.lane >= num_lanes_ || id.page < 0 || id.page >= kMaxPage) {
      throw std::invalid_argument("longctx: no page " + std::to_string(id.page) + " of lane " +
                                  std::to_string(id.lane));
    }
  }
}

void FrameTable::reserve(const std::vector<PageId>& pages) {
  int64_t needed = capacity_;
  for (const PageId& id : pages) needed = std::max(needed, id.page + 1);
  if (needed <= capacity_) return;
  const int64_t capacity = std::max<int64_t>({needed, 2 * capacity_, 64});
  // Readers of the old table keep it: the pages they hold do not move.
  auto table = std::make_shared<std::vector<int32_t>>(num_lanes_ * capacity, -1);
  for (int64_t lane = 0; lane < num_lanes_; ++lane) {
    std::copy_n(table_->begin() + lane * capacity_, capacity_, table->begin() + lane * capacity);
  }
  table_ = std::move(table);
  capacity_ = capacity;
}

// ---- which frame --------------------------------------------------------------------------------

void FrameTable::unlink(int32_t frame) {
  Frame& f = frames_[frame];
  if (!f.listed) return;
  (f.previous >= 0 ? frames_[f.previous].next : oldest_) = f.next;
  (f.next >= 0 ? frames_[f.next].previous : newest_) = f.previous;
  f.listed = false;
  --num_listed_;
}

void FrameTable::update_listing(int32_t frame) {
  Frame& f = frames_[frame];
  const bool evictable = f.id.lane >= 0 && f.holds == 0 && f.backed && !f.pinned && !f.loading;
  if (evictable == f.listed) return;
  if (!evictable) return unlink(frame);
  f.previous = newest_;
  f.next = -1;
  (newest_ >= 0 ? frames_[newest_].next : oldest_) = frame;
  newest_ = frame;
  f.listed = true;
  ++num_listed_;
}

void FrameTable::free_frame(int32_t frame) {
  unlink(frame);
  slot(frames_[frame].id) = -1;
  frames_[frame] = {};
  free_.push_back(frame);
}

int32_t FrameTable::take_frame(PageId id) {
  if (free_.empty()) {
    free_frame(oldest_);
    ++stats_.evictions;
  }
  const int32_t frame = free_.back();
  free_.pop_back();
  frames_[frame].id = id;
  slot(id) = frame;
  return frame;
}

void FrameTable::require_frames(const std::vector<PageId>& pages) const {
  std::vector<PageId> distinct = pages;
  const auto before = [](const PageId& a, const PageId& b) {
    return a.lane != b.lane ? a.lane < b.lane : a.page < b.page;
  };
  std::sort(distinct.begin(), distinct.end(), before);
  int64_t missing = 0, available = num_available();
  for (size_t i = 0; i < distinct.size(); ++i) {
    if (i > 0 && !before(distinct[i - 1], distinct[i])) continue;
    const int32_t frame = find(distinct[i]);
    if (frame < 0) {
      ++missing;
    } else if (frames_[frame].listed) {
      --available;  // it stays for this call
    }
  }
  if (missing <= available) return;
  throw NoFrameError("longctx: " + std::to_string(missing) + " pages need a frame; of " +
                     std::to_string(num_frames()) + " frames " + std::to_string(available) +
                     " hold neither pinned pages nor pages in use");
}

void FrameTable::acquire(const std::vector<PageId>& pages, std::vector<int32_t>* frames,
                         std::vector<char>* loads) {
  check(pages);
  const std::lock_guard<std::mutex> lock(mutex_);
  require_frames(pages);
  reserve(pages);
  frames->assign(pages.size(), -1);
  loads->assign(pages.size(), 0);
  const auto hold = [this](int32_t frame) {
    ++frames_[frame].holds;
    update_listing(frame);
    return frame;
  };
  // Those that are there are held first: they must not leave for the others.
  for (size_t i = 0; i < pages.size(); ++i) {
    const int32_t frame = find(pages[i]);
    if (frame >= 0) (*frames)[i] = hold(frame);
  }
  for (size_t i = 0; i < pages.size(); ++i) {
    if ((*frames)[i] >= 0) {
      ++stats_.hits;
      continue;
    }
    int32_t frame = find(pages[i]);
    if (frame < 0) {
      frame = take_frame(pages[i]);
      frames_[frame].backed = true;
      frames_[frame].loading = true;
      (*loads)[i] = 1;
    }
    ++stats_.misses;
    (*frames)[i] = hold(frame);
  }
}

void FrameTable::acquire_ahead(const std::vector<PageId>& pages, std::vector<int32_t>* frames) {
  check(pages);
  const std::lock_guard<std::mutex> lock(mutex_);
  reserve(pages);
  frames->assign(pages.size(), -1);
  for (size_t i = 0; i < pages.size(); ++i) {
    if (find(pages[i]) >= 0 || num_available() == 0) continue;
    const int32_t frame = take_frame(pages[i]);
    frames_[frame].backed = true;
    frames_[frame].loading = true;
    frames_[frame].holds = 1;
    (*frames)[i] = frame;
    ++stats_.read_ahead;
  }
}

void FrameTable::place(const std::vector<PageId>& pages, std::vector<int32_t>* frames) {
  check(pages);
  const std::lock_guard<std::mutex> lock(mutex_);
  require_frames(pages);
  reserve(pages);
  frames->assign(pages.size(), -1);
  for (size_t i = 0; i < pages.size(); ++i) {
    int32_t frame = find(pages[i]);
    if (frame < 0) frame = take_frame(pages[i]);
    Frame& f = frames_[frame];
    f.backed = false;
    f.pinned = true;
    ++f.holds;
    update_listing(frame);
    (*frames)[i] = frame;
  }
}

// ---- filling and reading ------------------------------------------------------------------------

void FrameTable::loaded(const std::vector<int32_t>& frames) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const int32_t frame : frames) {
      frames_[frame].loading = false;
      update_listing(frame);
    }
  }
  changed_.notify_all();
}

void FrameTable::abandon(const std::vector<int32_t>& frames) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const int32_t frame : frames) {
      Frame& f = frames_[frame];
      slot(f.id) = -1;
      f.id = {-1, -1};
      f.loading = false;
      release_one(frame);
    }
  }
  changed_.notify_all();
}

bool FrameTable::wait_loaded(const std::vector<PageId>& pages, const std::vector<int32_t>& frames) {
  std::unique_lock<std::mutex> lock(mutex_);
  bool all = true;
  for (size_t i = 0; i < frames.size(); ++i) {
    const Frame& f = frames_[frames[i]];
    changed_.wait(lock, [&f] { return !f.loading; });
    all &= f.id.lane == pages[i].lane && f.id.page == pages[i].page;
  }
  return all;
}

void FrameTable::release_one(int32_t frame) {
  Frame& f = frames_[frame];
  --f.holds;
  if (f.id.lane >= 0) return update_listing(frame);
  if (f.holds > 0) return;  // abandoned: the last who held it gives it back
  f = {};
  free_.push_back(frame);
}

void FrameTable::release(const std::vector<int32_t>& frames) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const int32_t frame : frames) release_one(frame);
}

// ---- which pages stay ---------------------------------------------------------------------------

void FrameTable::set_backed(const std::vector<PageId>& pages, bool backed) {
  check(pages);
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const PageId& id : pages) {
    const int32_t frame = find(id);
    if (frame < 0) continue;
    frames_[frame].backed = backed;
    update_listing(frame);
  }
}

void FrameTable::set_pinned(int64_t lane, int64_t begin, int64_t end, bool pinned) {
  check({{lane, std::max<int64_t>(begin, 0)}});
  const std::lock_guard<std::mutex> lock(mutex_);
  for (int64_t page = std::max<int64_t>(begin, 0); page < std::min(end, capacity_); ++page) {
    const int32_t frame = find({lane, page});
    if (frame < 0) continue;
    frames_[frame].pinned = pinned;
    update_listing(frame);
  }
}

void FrameTable::drop(int64_t lane, int64_t begin) {
  check({{lane, begin}});
  const std::lock_guard<std::mutex> lock(mutex_);
  for (int64_t page = begin; page < capacity_; ++page) {
    const int32_t frame = find({lane, page});
    if (frame >= 0 && frames_[frame].holds > 0) {
      throw std::runtime_error("longctx: a page that is being read cannot be dropped");
    }
  }
  for (int64_t page = begin; page < capacity_; ++page) {
    const int32_t frame = find({lane, page});
    if (frame >= 0) free_frame(frame);
  }
}

std::vector<PageId> FrameTable::eviction_order() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<PageId> order;
  for (int32_t frame = oldest_; frame >= 0; frame = frames_[frame].next) {
    order.push_back(frames_[frame].id);
  }
  return order;
}

}  // namespace longctx::host
