// Fixed-size pages on disk, appended and committed by one writer, read by any number of readers in
// this and other processes. The format and why it survives a killed writer: page_format.h.
#pragma once
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "file_descriptor.h"
#include "page_format.h"
#include "read_pool.h"

namespace longctx::host {

// What is wrong with a file: one sentence that names the file and, where it is one, the page.
class PageFileError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class PageFile {
 public:
  // A new file, which appears at `path` whole and locked; one that is there is replaced only if
  // `overwrite`.
  static std::unique_ptr<PageFile> create(const std::string& path, const PageGeometry& geometry,
                                          bool overwrite, bool direct, int num_threads);
  // Every committed entry is checked here, the pages themselves when they are read or by verify().
  static std::unique_ptr<PageFile> open(const std::string& path, bool writable, bool direct,
                                        int num_threads);

  const PageGeometry& geometry() const { return geometry_; }
  const std::string& path() const { return path_; }
  bool writable() const { return writable_; }

  int64_t num_pages(int64_t lane) const;
  // Tokens of the lane's pages: all full but the last.
  int64_t num_tokens(int64_t lane) const;
  int64_t bytes_read() const;
  int64_t bytes_written() const;

  // Stores `addresses[i]`, `num_tokens[i]` rows in use, as page `pages[i].page` of its lane, which
  // is its next one or one it has (then later ones are gone). All or none. Read by others after
  // commit().
  void append(const std::vector<PageId>& pages, const std::vector<int64_t>& num_tokens,
              const std::vector<const void*>& addresses);
  // Gives the lane the first `num_pages` pages of `source`, another sequence of its layer and head,
  // in place of what it has: they are stored once. With the lane itself as source it is cut. Needs
  // no room: it is written down with the next pages or the next commit, which also gives the disk
  // back the room of pages that no lane has any more.
  void share(int64_t lane, int64_t source, int64_t num_pages);
  // How many first pages the two lanes share.
  int64_t num_shared(int64_t lane, int64_t other) const;
  // What was appended and cut until now survives the end of this process; with `sync` that of the
  // machine.
  void commit(bool sync);
  // Writes down what was shared and cut: a point that rollback() can go back to.
  int64_t mark();
  // Forgets what was appended, shared and cut since mark(), or with -1 since the last commit.
  void rollback(int64_t mark);

  // Reads page i to addresses[i] (page_bytes each) and compares its checksum.
  void read(const std::vector<PageId>& pages, const std::vector<void*>& addresses);
  // Sees what the writer has committed since: of each lane, from which page on it is not what it
  // was. Empty if nothing was committed.
  std::vector<int64_t> refresh();
  // Reads every page and compares its checksum.
  void verify();
  // In a forked child, which has inherited the open file and with it the lock: lets go of both, so
  // that they end with the parent. Takes no mutex, since threads that are not here may hold them.
  void close_in_child();

 private:
  struct Stored {
    int64_t entry;
    uint32_t num_tokens;
    uint32_t checksum;
  };
  // Of a lane that was cut or got pages of another since the last entry was written.
  struct Cut {
    int64_t source;
    int64_t num_pages;
  };
  enum class ReadResult { kGood, kShort, kDamaged, kFailed };

  PageFile(std::string path, const PageGeometry& geometry, bool writable, int num_threads);
  void open_direct();
  CommitRecord read_commit_record() const;
  void replay(int64_t end);
  void apply(const PageEntry& entry, int64_t number);
  void apply_cuts(const std::vector<std::pair<int64_t, Cut>>& cuts);
  bool are_alike(int64_t lane, int64_t other) const;
  int64_t common_pages(int64_t lane, int64_t other) const;
  void free_pages(int64_t lane, int64_t begin);
  int flush_cuts();
  void check_order(const std::vector<PageId>& pages, const std::vector<int64_t>& num_tokens) const;
  int write_entries(const std::vector<PageEntry>& entries) const;
  int reserve_segments(int64_t num_entries);
  ReadResult read_slot(const Stored& stored, void* address, int* error) const;
  std::string name(PageId id) const;
  [[noreturn]] void fail(const std::string& what) const;
  [[noreturn]] void fail_read(PageId id, const Stored& stored, ReadResult result, int error) const;
  void check_lane(int64_t lane) const;
  void check_writable() const;
  int64_t file_size() const;

  std::mutex append_mutex_;  // one append, cut or commit at a time
  const std::string path_;
  const PageGeometry geometry_;
  const bool writable_;
  FileDescriptor file_;
  FileDescriptor direct_;  // O_DIRECT, for reads; closed: reads go through the page cache
  mutable ReadPool pool_;
  mutable std::shared_mutex mutex_;         // of everything below
  std::vector<std::vector<Stored>> lanes_;  // [num_lanes][pages of the lane]
  std::vector<int64_t> freed_;   // entries whose slots go back to the disk at the next commit
  std::map<int64_t, Cut> cuts_;  // by lane; sources count as they are in the file
  std::vector<std::pair<int64_t, Cut>> replayed_cuts_;  // of a group that is not complete
  std::vector<int64_t> changed_;  // [num_lanes] the first page that replay() has changed
  CommitRecord committed_{};
  int64_t num_entries_ = 0;   // committed or not
  int64_t num_segments_ = 0;  // with room on the disk
  size_t freed_at_mark_ = 0;
  mutable std::atomic<int64_t> bytes_read_{0};
  std::atomic<int64_t> bytes_written_{0};
};

}  // namespace longctx::host
