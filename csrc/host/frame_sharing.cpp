// Which lanes have a page: rings of lanes that share one, and lanes that let go of theirs.
#include <algorithm>

#include "frame_table.h"

namespace longctx::host {

bool FrameTable::is_shared_with(PageId id, int64_t lane) const {
  for (int64_t l = next_sharer(id); l != id.lane; l = next_sharer({l, id.page})) {
    if (l == lane) return true;
  }
  return false;
}

int64_t FrameTable::first_sharer(PageId id) const {
  int64_t first = id.lane;
  for (int64_t l = next_sharer(id); l != id.lane; l = next_sharer({l, id.page})) {
    first = std::min(first, l);
  }
  return first;
}

void FrameTable::set_frame(PageId id, int32_t frame) {
  int64_t lane = id.lane;
  do {
    (*table_)[cell({lane, id.page})] = frame;
    lane = next_sharer({lane, id.page});
  } while (lane != id.lane);
}

void FrameTable::forget(PageId id) {
  int64_t lane = id.lane;
  do {
    set_pin({lane, id.page}, false);
    lane = next_sharer({lane, id.page});
  } while (lane != id.lane);
  set_frame(id, -1);
}

void FrameTable::set_pin(PageId id, bool pinned) {
  char& pin = pinned_[cell(id)];
  if ((pin != 0) == pinned) return;
  pin = pinned ? 1 : 0;
  frames_[find(id)].pins += pinned ? 1 : -1;
}

// The lane has the page no longer; its frame is free if no other lane has.
void FrameTable::leave(PageId id) {
  const int32_t frame = find(id);
  const int64_t next = next_sharer(id);
  if (frame >= 0) set_pin(id, false);
  if (next == id.lane) {
    if (frame >= 0) free_frame(frame);
    return;
  }
  int64_t previous = next;
  while (next_sharer({previous, id.page}) != id.lane) previous = next_sharer({previous, id.page});
  sharers_[cell({previous, id.page})] = static_cast<int32_t>(next);
  sharers_[cell(id)] = static_cast<int32_t>(id.lane);
  (*table_)[cell(id)] = -1;
  if (frame < 0) return;
  frames_[frame].id.lane = next;
  update_listing(frame);
}

int64_t FrameTable::share(int64_t lane, int64_t source, int64_t num_pages) {
  check({{lane, 0}, {source, num_pages}});
  if (lane == source) return num_pages;
  const std::lock_guard<std::mutex> lock(mutex_);
  reserve_pages(num_pages);
  if (sharers_.empty()) {
    sharers_.resize(static_cast<size_t>(num_lanes_ * capacity_));
    for (int64_t l = 0; l < num_lanes_; ++l) {
      std::fill_n(sharers_.begin() + l * capacity_, capacity_, static_cast<int32_t>(l));
    }
  }
  // Lanes part once: what they share are their first pages.
  int64_t common = 0;
  for (int64_t end = num_pages; common < end;) {
    const int64_t middle = (common + end) / 2;
    if (is_shared_with({lane, middle}, source)) {
      common = middle + 1;
    } else {
      end = middle;
    }
  }
  require_unheld(lane, common, num_pages);
  for (int64_t page = common; page < num_pages; ++page) {
    leave({lane, page});
    sharers_[cell({lane, page})] = sharers_[cell({source, page})];
    sharers_[cell({source, page})] = static_cast<int32_t>(lane);
    (*table_)[cell({lane, page})] = find({source, page});
  }
  return common;
}

void FrameTable::require_unheld(int64_t lane, int64_t begin, int64_t end) const {
  for (int64_t page = begin; page < std::min(end, capacity_); ++page) {
    const PageId id{lane, page};
    const int32_t frame = find(id);
    if (frame >= 0 && frames_[frame].holds > 0 && next_sharer(id) == lane) {
      throw std::runtime_error("longctx: a page that is being read cannot be dropped");
    }
  }
}

void FrameTable::drop(int64_t lane, int64_t begin) {
  check({{lane, begin}});
  const std::lock_guard<std::mutex> lock(mutex_);
  require_unheld(lane, begin, capacity_);
  for (int64_t page = begin; page < capacity_; ++page) leave({lane, page});
}

}  // namespace longctx::host
