// Reading pages: several at a time, each compared with its checksum.
#include <algorithm>
#include <cerrno>
#include <cstdlib>

#include "checksum.h"
#include "page_file.h"

namespace longctx::host {

PageFile::ReadResult PageFile::read_slot(const Stored& stored, void* address, int* error) const {
  const size_t bytes = static_cast<size_t>(geometry_.page_bytes());
  const FileDescriptor& file = direct_.is_open() ? direct_ : file_;
  size_t done = 0;
  *error = file.read_at(address, bytes, slot_offset(stored.entry, geometry_.slot_bytes()), &done);
  if (*error != 0) return ReadResult::kFailed;
  bytes_read_ += static_cast<int64_t>(done);
  if (done < bytes) return ReadResult::kShort;
  return page_checksum(address, bytes) == stored.checksum ? ReadResult::kGood
                                                          : ReadResult::kDamaged;
}

void PageFile::fail_read(PageId id, const Stored& stored, ReadResult result, int error) const {
  if (result == ReadResult::kFailed) fail("cannot be read: " + name(id) + ": " + errno_text(error));
  const int64_t offset = slot_offset(stored.entry, geometry_.slot_bytes());
  if (result == ReadResult::kShort) {
    fail("is truncated: " + name(id) + " at byte " + std::to_string(offset) + " is not all there");
  }
  fail("is damaged: " + name(id) + " at byte " + std::to_string(offset) +
       " has another checksum than when it was written");
}

void PageFile::read(const std::vector<PageId>& pages, const std::vector<void*>& addresses) {
  std::vector<Stored> stored(pages.size());
  {
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    for (size_t i = 0; i < pages.size(); ++i) {
      check_lane(pages[i].lane);
      const std::vector<Stored>& lane = lanes_[pages[i].lane];
      if (pages[i].page < 0 || pages[i].page >= static_cast<int64_t>(lane.size())) {
        fail("has no " + name(pages[i]) + ": the lane has " + std::to_string(lane.size()) +
             " pages");
      }
      stored[i] = lane[pages[i].page];
    }
  }
  std::vector<ReadResult> results(pages.size());
  std::vector<int> errors(pages.size());
  pool_.run(static_cast<int64_t>(pages.size()),
            [&](int64_t i) { results[i] = read_slot(stored[i], addresses[i], &errors[i]); });
  const auto bad = std::find_if(results.begin(), results.end(),
                                [](ReadResult result) { return result != ReadResult::kGood; });
  if (bad == results.end()) return;
  const size_t i = static_cast<size_t>(bad - results.begin());
  if (!writable_) {
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    if (read_commit_record().sequence != committed_.sequence) {
      fail("has been written to, and " + name(pages[i]) +
           " is not what it was: see what there is by `refresh`");
    }
  }
  fail_read(pages[i], stored[i], results[i], errors[i]);
}

void PageFile::verify() {
  std::vector<std::pair<Stored, PageId>> all;
  {
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    for (size_t lane = 0; lane < lanes_.size(); ++lane) {
      for (size_t page = 0; page < lanes_[lane].size(); ++page) {
        all.push_back(
            {lanes_[lane][page], {static_cast<int64_t>(lane), static_cast<int64_t>(page)}});
      }
    }
  }
  std::sort(all.begin(), all.end(),
            [](const auto& a, const auto& b) { return a.first.entry < b.first.entry; });
  constexpr int64_t kChunk = 32;
  std::mutex worst_mutex;
  size_t worst = all.size();
  ReadResult worst_result = ReadResult::kGood;
  int worst_error = 0;
  const auto count = static_cast<int64_t>(all.size());
  pool_.run((count + kChunk - 1) / kChunk, [&](int64_t chunk) {
    // Aligned as O_DIRECT wants it.
    const std::unique_ptr<void, void (*)(void*)> buffer(
        std::aligned_alloc(kBlockBytes, static_cast<size_t>(geometry_.slot_bytes())), std::free);
    for (int64_t i = chunk * kChunk; i < std::min(count, (chunk + 1) * kChunk); ++i) {
      int error = ENOMEM;
      const ReadResult result =
          buffer ? read_slot(all[i].first, buffer.get(), &error) : ReadResult::kFailed;
      if (result == ReadResult::kGood) continue;
      const std::lock_guard<std::mutex> lock(worst_mutex);
      if (static_cast<size_t>(i) < worst) {
        worst = static_cast<size_t>(i);
        worst_result = result;
        worst_error = error;
      }
    }
  });
  if (worst < all.size()) fail_read(all[worst].second, all[worst].first, worst_result, worst_error);
}

}  // namespace longctx::host
