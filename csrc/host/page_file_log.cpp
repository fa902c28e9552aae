// The log of entries: what every process makes of it, the writer when it opens a file and readers
// whenever they refresh.
#include <unistd.h>

#include <algorithm>

#include "page_file.h"

namespace longctx::host {

CommitRecord PageFile::read_commit_record() const {
  // A writer at work may be met in the middle of a record, so a bad one is looked at again.
  constexpr int kTries = 200;
  for (int tries = 1;; ++tries) {
    CommitRecord records[kCommitRecords] = {};
    int damaged = -1;
    for (int i = 0; i < kCommitRecords; ++i) {
      size_t done = 0;
      const int error = file_.read_at(&records[i], sizeof(CommitRecord), record_offset(i), &done);
      if (error != 0) fail("cannot be read: " + errno_text(error));
      if (done < sizeof(CommitRecord))
        fail("is truncated: commit record " + std::to_string(i) + " is missing");
      if (records[i].checksum != checksum_of(records[i])) damaged = i;
    }
    const bool second = records[1].sequence > records[0].sequence;
    const CommitRecord& newest = records[second ? 1 : 0];
    const CommitRecord& other = records[second ? 0 : 1];
    if (damaged < 0 && newest.sequence == other.sequence + 1) return newest;
    if (tries == kTries) {
      fail("is damaged: commit record " + std::to_string(damaged < 0 ? 0 : damaged) +
           " is not what was written");
    }
    usleep(50);
  }
}

void PageFile::replay(int64_t end) {
  const int64_t slot = geometry_.slot_bytes();
  const int64_t size = file_size();
  std::vector<PageEntry> entries(kSegmentEntries);
  while (num_entries_ < end) {
    const int64_t first = num_entries_;
    const int64_t count = std::min(end - first, kSegmentEntries - first % kSegmentEntries);
    size_t done = 0;
    const int error =
        file_.read_at(entries.data(), count * sizeof(PageEntry), entry_offset(first, slot), &done);
    if (error != 0) fail("cannot be read: " + errno_text(error));
    for (int64_t i = 0; i < count; ++i) {
      const PageEntry& entry = entries[i];
      const std::string which =
          "page number " + std::to_string(first + i) + " of " + std::to_string(end);
      if (done < (i + 1) * sizeof(PageEntry))
        fail("is truncated: the entry of " + which + " is missing");
      if (entry.checksum != checksum_of(entry) ||
          entry.number != static_cast<uint64_t>(first + i)) {
        fail("is damaged: the entry of " + which + " is not what was written");
      }
      const int64_t slot_end = slot_offset(first + i, slot) + geometry_.page_bytes();
      if (entry.kind == kPage && slot_end > size) {
        fail("is truncated: " + name({entry.lane, entry.page}) + " ends at byte " +
             std::to_string(slot_end) + ", the file at byte " + std::to_string(size));
      }
      apply(entry, first + i);
    }
    num_entries_ = first + count;
  }
  if (!replayed_cuts_.empty()) fail("is damaged: the last cut is not complete");
  freed_.clear();  // their room was given back when they were committed
}

void PageFile::apply(const PageEntry& entry, int64_t number) {
  const auto misplaced = [this, number] {
    fail("is damaged: entry " + std::to_string(number) + " does not fit those before it");
  };
  if (entry.lane >= lanes_.size()) misplaced();
  std::vector<Stored>& pages = lanes_[entry.lane];
  if (entry.kind == kPage) {
    if (!replayed_cuts_.empty() || entry.page > pages.size() ||
        entry.num_tokens > geometry_.page_size) {
      misplaced();
    }
    free_pages(entry.lane, entry.page);
    changed_[entry.lane] = std::min<int64_t>(changed_[entry.lane], entry.page);
    pages.resize(entry.page);
    pages.push_back({number, entry.num_tokens, entry.page_checksum});
    return;
  }
  const int64_t source = entry.page_checksum;
  if (entry.kind != kCut || entry.page_checksum >= lanes_.size() ||
      !are_alike(entry.lane, source) || entry.page > lanes_[source].size()) {
    misplaced();
  }
  freed_.push_back(number);
  replayed_cuts_.push_back({entry.lane, {source, entry.page}});
  if (entry.num_tokens > 0) return;
  apply_cuts(replayed_cuts_);
  replayed_cuts_.clear();
}

// ---- lanes that share pages ---------------------------------------------------------------------

bool PageFile::are_alike(int64_t lane, int64_t other) const {
  const int64_t heads = geometry_.num_kv_heads;
  return lane % heads == other % heads &&
         lane / heads / geometry_.batch == other / heads / geometry_.batch;
}

int64_t PageFile::common_pages(int64_t lane, int64_t other) const {
  // Lanes part once: what they share are their first pages.
  const std::vector<Stored>&a = lanes_[lane], &b = lanes_[other];
  int64_t common = 0;
  for (auto end = static_cast<int64_t>(std::min(a.size(), b.size())); common < end;) {
    const int64_t middle = (common + end) / 2;
    if (a[middle].entry == b[middle].entry) {
      common = middle + 1;
    } else {
      end = middle;
    }
  }
  return common;
}

// The lane's pages from `begin` on go back to the disk, but for those that other lanes have too.
void PageFile::free_pages(int64_t lane, int64_t begin) {
  const std::vector<Stored>& pages = lanes_[lane];
  if (begin >= static_cast<int64_t>(pages.size())) return;
  const int64_t heads = geometry_.num_kv_heads, lanes = geometry_.batch * heads;
  const int64_t first = lane / lanes * lanes + lane % heads;
  for (int64_t other = first; other < first + lanes; other += heads) {
    if (other != lane) begin = std::max(begin, common_pages(lane, other));
  }
  for (size_t page = begin; page < pages.size(); ++page) freed_.push_back(pages[page].entry);
}

void PageFile::apply_cuts(const std::vector<std::pair<int64_t, Cut>>& cuts) {
  struct Change {
    int64_t common;
    std::vector<Stored> added;
  };
  std::vector<Change> changes;  // what comes behind the pages that stay
  for (const auto& [lane, cut] : cuts) {
    const int64_t common = std::min(cut.num_pages, common_pages(lane, cut.source));
    const std::vector<Stored>& source = lanes_[cut.source];
    changes.push_back({common, {source.begin() + common, source.begin() + cut.num_pages}});
  }
  for (size_t i = 0; i < cuts.size(); ++i) {
    const int64_t lane = cuts[i].first;
    std::vector<Stored>& pages = lanes_[lane];
    const auto& [common, added] = changes[i];
    free_pages(lane, common);
    changed_[lane] = std::min(changed_[lane], common);
    pages.resize(common);
    pages.insert(pages.end(), added.begin(), added.end());
  }
}

int64_t PageFile::num_shared(int64_t lane, int64_t other) const {
  check_lane(lane);
  check_lane(other);
  const std::shared_lock<std::shared_mutex> lock(mutex_);
  return common_pages(lane, other);
}

std::vector<int64_t> PageFile::refresh() {
  if (writable_) return {};
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  const CommitRecord newest = read_commit_record();
  if (newest.sequence == committed_.sequence) return {};
  for (size_t lane = 0; lane < lanes_.size(); ++lane) {
    changed_[lane] = static_cast<int64_t>(lanes_[lane].size());
  }
  replay(static_cast<int64_t>(newest.num_entries));
  committed_ = newest;
  return changed_;
}

}  // namespace longctx::host
