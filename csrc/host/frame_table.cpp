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

int64_t FrameTable::num_available() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return available();
}

int64_t FrameTable::clock() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return clock_;
}

int32_t FrameTable::find(PageId id) const { return id.page < capacity_ ? (*table_)[cell(id)] : -1; }

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
  int64_t needed = 0;
  for (const PageId& id : pages) needed = std::max(needed, id.page + 1);
  reserve_pages(needed);
}

void FrameTable::reserve_pages(int64_t needed) {
  if (needed <= capacity_) return;
  const int64_t capacity = std::max<int64_t>({needed, 2 * capacity_, 64});
  const size_t size = static_cast<size_t>(num_lanes_ * capacity);
  // Readers of the old table keep it: the pages they hold do not move.
  auto table = std::make_shared<std::vector<int32_t>>(size, -1);
  std::vector<char> pinned(size, 0);
  std::vector<int32_t> sharers(sharers_.empty() ? 0 : size);
  for (int64_t lane = 0; lane < num_lanes_; ++lane) {
    const int64_t from = lane * capacity_, to = lane * capacity;
    std::copy_n(table_->begin() + from, capacity_, table->begin() + to);
    std::copy_n(pinned_.begin() + from, capacity_, pinned.begin() + to);
    if (sharers.empty()) continue;
    std::fill_n(sharers.begin() + to, capacity, static_cast<int32_t>(lane));
    std::copy_n(sharers_.begin() + from, capacity_, sharers.begin() + to);
  }
  table_ = std::move(table);
  pinned_ = std::move(pinned);
  sharers_ = std::move(sharers);
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
  const bool evictable = f.id.lane >= 0 && f.holds == 0 && f.backed && f.pins == 0 && !f.loading;
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
  if (frames_[frame].ahead) ++stats_.read_ahead_unused;
  forget(frames_[frame].id);
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
  set_frame(id, frame);
  return frame;
}

int32_t FrameTable::take_frame_to_fill(PageId id) {
  const int32_t frame = take_frame(id);
  Frame& f = frames_[frame];
  f.backed = true;
  f.loading = true;
  f.used = clock_;
  return frame;
}

void FrameTable::require_frames(const std::vector<PageId>& pages) const {
  std::vector<PageId> distinct = pages;
  if (!sharers_.empty()) {
    for (PageId& id : distinct) {
      if (id.page < capacity_) id.lane = first_sharer(id);
    }
  }
  const auto before = [](const PageId& a, const PageId& b) {
    return a.lane != b.lane ? a.lane < b.lane : a.page < b.page;
  };
  std::sort(distinct.begin(), distinct.end(), before);
  int64_t missing = 0, unused = available();
  for (size_t i = 0; i < distinct.size(); ++i) {
    if (i > 0 && !before(distinct[i - 1], distinct[i])) continue;
    const int32_t frame = find(distinct[i]);
    if (frame < 0) {
      ++missing;
    } else if (frames_[frame].listed) {
      --unused;  // it stays for this call
    }
  }
  if (missing <= unused) return;
  throw NoFrameError("longctx: " + std::to_string(missing) + " pages need a frame; of " +
                     std::to_string(num_frames()) + " frames " + std::to_string(unused) +
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
  ++clock_;
  const auto hold = [this](int32_t frame) {
    Frame& f = frames_[frame];
    ++f.holds;
    f.used = clock_;
    update_listing(frame);
    return frame;
  };
  // Those that are there are held first: they must not leave for the others.
  for (size_t i = 0; i < pages.size(); ++i) {
    const int32_t frame = find(pages[i]);
    if (frame < 0) continue;
    Frame& f = frames_[frame];
    ++(f.loading ? stats_.misses : stats_.hits);
    if (f.ahead && !f.loading) ++stats_.read_ahead_hits;
    f.ahead = false;
    (*frames)[i] = hold(frame);
  }
  for (size_t i = 0; i < pages.size(); ++i) {
    if ((*frames)[i] >= 0) continue;
    int32_t frame = find(pages[i]);  // there by now if another lane of this call shares it
    if (frame < 0) {
      frame = take_frame_to_fill(pages[i]);
      (*loads)[i] = 1;
    }
    ++stats_.misses;
    (*frames)[i] = hold(frame);
  }
}

void FrameTable::acquire_ahead(const std::vector<PageId>& pages, int64_t since,
                               std::vector<int32_t>* frames) {
  check(pages);
  const std::lock_guard<std::mutex> lock(mutex_);
  reserve(pages);
  frames->assign(pages.size(), -1);
  for (size_t i = 0; i < pages.size(); ++i) {
    if (find(pages[i]) >= 0) continue;
    if (free_.empty() && (oldest_ < 0 || frames_[oldest_].used > since)) return;
    const int32_t frame = take_frame_to_fill(pages[i]);
    frames_[frame].ahead = true;
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
    f.ahead = false;
    set_pin(pages[i], true);
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
      forget(f.id);
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
    all &= find(pages[i]) == frames[i];
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
    set_pin({lane, page}, pinned);
    update_listing(frame);
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
