// The writer's side: slots and entries first, then the record that counts them.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "checksum.h"
#include "page_file.h"

namespace longctx::host {

void PageFile::check_order(const std::vector<PageId>& pages,
                           const std::vector<int64_t>& num_tokens) const {
  // Of each lane that the call has named so far: pages, and whether the last is full.
  std::vector<std::pair<int64_t, bool>> ends(lanes_.size(), {-1, true});
  for (size_t i = 0; i < pages.size(); ++i) {
    check_lane(pages[i].lane);
    auto& [length, full] = ends[pages[i].lane];
    if (length < 0) {
      const std::vector<Stored>& lane = lanes_[pages[i].lane];
      length = static_cast<int64_t>(lane.size());
      full = lane.empty() || lane.back().num_tokens == geometry_.page_size;
    }
    if (pages[i].page < 0 || pages[i].page > length || (pages[i].page == length && !full)) {
      fail("cannot take " + name(pages[i]) + ": the lane has " + std::to_string(length) +
           " pages, the last of them " + (full ? "full" : "partly filled"));
    }
    if (num_tokens[i] < 1 || num_tokens[i] > geometry_.page_size) {
      fail("cannot take " + name(pages[i]) + " with " + std::to_string(num_tokens[i]) + " tokens");
    }
    length = pages[i].page + 1;
    full = num_tokens[i] == geometry_.page_size;
  }
}

int PageFile::reserve_segments(int64_t num_entries) {
  // Room is taken before it is written, so that a full disk shows here and not when the page cache
  // is written back.
  const int64_t slot = geometry_.slot_bytes();
  for (; num_segments_ * kSegmentEntries < num_entries; ++num_segments_) {
    const int64_t begin = segment_offset(num_segments_, slot);
    const int64_t bytes = segment_offset(num_segments_ + 1, slot) - begin;
    int error = fallocate(file_.get(), 0, begin, bytes) == 0 ? 0 : errno;
    if (error == EOPNOTSUPP) error = ftruncate(file_.get(), begin + bytes) == 0 ? 0 : errno;
    if (error != 0) return error;
  }
  return 0;
}

int PageFile::write_entries(const std::vector<PageEntry>& entries) const {
  const int64_t slot = geometry_.slot_bytes();
  for (size_t i = 0; i < entries.size();) {
    const auto number = static_cast<int64_t>(entries[i].number);
    const size_t room = static_cast<size_t>(kSegmentEntries - number % kSegmentEntries);
    const size_t count = std::min(room, entries.size() - i);
    const int error =
        file_.write_at(&entries[i], count * sizeof(PageEntry), entry_offset(number, slot));
    if (error != 0) return error;
    i += count;
  }
  return 0;
}

void PageFile::append(const std::vector<PageId>& pages, const std::vector<int64_t>& num_tokens,
                      const std::vector<const void*>& addresses) {
  check_writable();
  const std::lock_guard<std::mutex> append_lock(append_mutex_);
  check_order(pages, num_tokens);
  if (pages.empty()) return;
  const auto full = [this](PageId id, int error) {
    fail("is full: " + name(id) + " was not stored (" + errno_text(error) +
         "); what was committed stays readable");
  };
  if (const int error = flush_cuts(); error != 0) full(pages.front(), error);
  const int64_t slot = geometry_.slot_bytes();
  std::vector<PageEntry> entries(pages.size());
  for (size_t i = 0; i < pages.size(); ++i) {
    const int64_t number = num_entries_ + static_cast<int64_t>(i);
    int error = reserve_segments(number + 1);
    if (error != 0) full(pages[i], error);
    const size_t bytes = static_cast<size_t>(geometry_.page_bytes());
    error = file_.write_at(addresses[i], bytes, slot_offset(number, slot));
    if (error != 0) full(pages[i], error);
    PageEntry& entry = entries[i];
    entry.number = static_cast<uint64_t>(number);
    entry.lane = static_cast<uint32_t>(pages[i].lane);
    entry.page = static_cast<uint32_t>(pages[i].page);
    entry.num_tokens = static_cast<uint32_t>(num_tokens[i]);
    entry.kind = kPage;
    entry.page_checksum = page_checksum(addresses[i], bytes);
    entry.checksum = checksum_of(entry);
  }
  const int error = write_entries(entries);
  if (error != 0) full(pages.front(), error);
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  for (const PageEntry& entry : entries) apply(entry, num_entries_++);
  bytes_written_ += static_cast<int64_t>(pages.size()) * geometry_.page_bytes();
}

void PageFile::share(int64_t lane, int64_t source, int64_t num_pages) {
  check_writable();
  check_lane(lane);
  check_lane(source);
  const std::lock_guard<std::mutex> append_lock(append_mutex_);
  const auto length = static_cast<int64_t>(lanes_[source].size());
  if (num_pages < 0 || num_pages > length || !are_alike(lane, source)) {
    fail("cannot give lane " + std::to_string(lane) + " the first " + std::to_string(num_pages) +
         " of " + std::to_string(length) + " pages of lane " + std::to_string(source));
  }
  if (lane == source && num_pages == length) return;
  const auto earlier = cuts_.find(source);
  const int64_t origin = earlier == cuts_.end() ? source : earlier->second.source;
  cuts_[lane] = {origin, num_pages};
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  apply_cuts({{lane, {source, num_pages}}});
}

int PageFile::flush_cuts() {
  std::vector<PageEntry> entries;
  for (const auto& [lane, cut] : cuts_) {
    PageEntry entry{};
    entry.number = static_cast<uint64_t>(num_entries_) + entries.size();
    entry.lane = static_cast<uint32_t>(lane);
    entry.page = static_cast<uint32_t>(cut.num_pages);
    entry.num_tokens = static_cast<uint32_t>(cuts_.size() - entries.size() - 1);
    entry.kind = kCut;
    entry.page_checksum = static_cast<uint32_t>(cut.source);
    entry.checksum = checksum_of(entry);
    entries.push_back(entry);
  }
  if (entries.empty()) return 0;
  int error = reserve_segments(num_entries_ + static_cast<int64_t>(entries.size()));
  if (error == 0) error = write_entries(entries);
  if (error != 0) return error;
  for (const PageEntry& entry : entries) freed_.push_back(static_cast<int64_t>(entry.number));
  num_entries_ += static_cast<int64_t>(entries.size());
  cuts_.clear();
  return 0;
}

int64_t PageFile::mark() {
  check_writable();
  const std::lock_guard<std::mutex> append_lock(append_mutex_);
  const int error = flush_cuts();
  if (error != 0) fail("is full: a cut was not stored (" + errno_text(error) + ")");
  freed_at_mark_ = freed_.size();
  return num_entries_;
}

void PageFile::commit(bool sync) {
  check_writable();
  const std::lock_guard<std::mutex> append_lock(append_mutex_);
  const auto flush = [this, sync] {
    if (sync && fdatasync(file_.get()) != 0)
      fail("was not written to the disk: " + errno_text(errno));
  };
  int error = flush_cuts();
  if (error != 0) fail("was not committed: it is full (" + errno_text(error) + ")");
  if (committed_.num_entries == static_cast<uint64_t>(num_entries_)) return flush();
  flush();
  CommitRecord record{committed_.sequence + 1, static_cast<uint64_t>(num_entries_), 0, 0};
  record.checksum = checksum_of(record);
  error = file_.write_at(&record, sizeof(record), record_offset(record.sequence));
  if (error != 0) fail("was not committed: " + errno_text(error));
  flush();
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  committed_ = record;
  const int64_t slot = geometry_.slot_bytes();
  for (const int64_t entry : freed_) {
    // Where the file system knows no holes the room stays taken; nothing else depends on it.
    (void)fallocate(file_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                    slot_offset(entry, slot), slot);
  }
  freed_.clear();
}

void PageFile::rollback(int64_t mark) {
  check_writable();
  const std::lock_guard<std::mutex> append_lock(append_mutex_);
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  const auto committed = static_cast<int64_t>(committed_.num_entries);
  if (mark > num_entries_ || (mark >= 0 && mark < committed)) {
    fail("cannot go back to entry " + std::to_string(mark));
  }
  if (mark == num_entries_ && cuts_.empty()) return;
  std::vector<int64_t> freed = std::move(freed_);
  freed.resize(mark < 0 ? 0 : freed_at_mark_);
  for (std::vector<Stored>& pages : lanes_) pages.clear();
  cuts_.clear();
  num_entries_ = 0;
  replay(mark < 0 ? committed : mark);
  freed_ = std::move(freed);
}

}  // namespace longctx::host
