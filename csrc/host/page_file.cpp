#include "page_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "checksum.h"

namespace longctx::host {
namespace {

bool plausible(const PageGeometry& g) {
  const int64_t sizes[] = {g.num_layers, g.batch,      g.num_kv_heads, g.page_size,
                           g.head_dim,   g.head_dim_v, g.element_bytes};
  constexpr int64_t kMost = int64_t{1} << 20;
  if (std::any_of(std::begin(sizes), std::end(sizes),
                  [](int64_t s) { return s < 1 || s > kMost; })) {
    return false;
  }
  const double lanes = static_cast<double>(g.num_layers) * g.batch * g.num_kv_heads;
  const double bytes =
      static_cast<double>(g.page_size) * (g.head_dim + g.head_dim_v) * g.element_bytes;
  return g.element_bytes <= 8 && lanes <= kMost * 16.0 && bytes <= kMost * 1024.0 &&
         std::memchr(g.dtype, 0, sizeof(g.dtype)) != nullptr;
}

}  // namespace

PageFile::PageFile(std::string path, const PageGeometry& geometry, bool writable, int num_threads)
    : path_(std::move(path)),
      geometry_(geometry),
      writable_(writable),
      pool_(num_threads),
      lanes_(static_cast<size_t>(geometry.num_lanes())),
      changed_(lanes_.size()) {}

std::unique_ptr<PageFile> PageFile::create(const std::string& path, const PageGeometry& geometry,
                                           bool overwrite, bool direct, int num_threads) {
  const std::string about = "longctx: page file " + path + " ";
  if (!plausible(geometry)) throw PageFileError(about + "cannot have pages of this geometry");
  // A writer of the file that is there would go on writing to a file that nobody finds.
  FileDescriptor old;
  if (overwrite) {
    old = FileDescriptor(::open(path.c_str(), O_RDWR | O_CLOEXEC));
    if (old.is_open() && flock(old.get(), LOCK_EX | LOCK_NB) != 0) {
      throw PageFileError(about + "is being written: a file has one writer at a time");
    }
  }
  const std::string draft = path + ".new-" + std::to_string(getpid());
  std::unique_ptr<PageFile> file(new PageFile(path, geometry, true, num_threads));
  file->file_ = FileDescriptor(::open(draft.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (!file->file_.is_open()) file->fail("cannot be created: " + errno_text(errno));

  FileHeader header{};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.version = kFormatVersion;
  header.geometry = geometry;
  header.checksum = crc32c(&geometry, sizeof(geometry));
  char blocks[kFirstSegment] = {};
  std::memcpy(blocks, &header, sizeof(header));
  for (uint64_t sequence = 0; sequence < kCommitRecords; ++sequence) {
    CommitRecord record{sequence, 0, 0, 0};
    record.checksum = checksum_of(record);
    std::memcpy(blocks + record_offset(sequence), &record, sizeof(record));
    file->committed_ = record;
  }
  int error = file->file_.write_at(blocks, sizeof(blocks), 0);
  if (error == 0 && flock(file->file_.get(), LOCK_EX | LOCK_NB) != 0) error = errno;
  if (error == 0) {
    // link() fails where a file is, rename() replaces it.
    const int result =
        overwrite ? rename(draft.c_str(), path.c_str()) : link(draft.c_str(), path.c_str());
    if (result != 0) error = errno;
  }
  if (error != 0 || !overwrite) unlink(draft.c_str());
  if (error == EEXIST) file->fail("exists already");
  if (error != 0) file->fail("cannot be created: " + errno_text(error));
  if (direct) file->open_direct();
  return file;
}

std::unique_ptr<PageFile> PageFile::open(const std::string& path, bool writable, bool direct,
                                         int num_threads) {
  const std::string about = "longctx: page file " + path + " ";
  FileDescriptor fd(::open(path.c_str(), (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC));
  if (!fd.is_open()) throw PageFileError(about + "cannot be opened: " + errno_text(errno));
  if (writable && flock(fd.get(), LOCK_EX | LOCK_NB) != 0) {
    throw PageFileError(about + "is being written: a file has one writer at a time");
  }
  FileHeader header{};
  size_t done = 0;
  const int error = fd.read_at(&header, sizeof(header), 0, &done);
  if (error != 0) throw PageFileError(about + "cannot be read: " + errno_text(error));
  if (done < sizeof(header) || std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0) {
    throw PageFileError(about + "is not a page file: it does not begin like one");
  }
  if (header.version != kFormatVersion) {
    throw PageFileError(about + "has format version " + std::to_string(header.version) +
                        "; this build reads version " + std::to_string(kFormatVersion));
  }
  if (header.checksum != crc32c(&header.geometry, sizeof(header.geometry)) ||
      !plausible(header.geometry)) {
    throw PageFileError(about +
                        "is damaged: its header has another checksum than when it was written");
  }
  std::unique_ptr<PageFile> file(new PageFile(path, header.geometry, writable, num_threads));
  file->file_ = std::move(fd);
  if (direct) file->open_direct();
  file->committed_ = file->read_commit_record();
  file->replay(static_cast<int64_t>(file->committed_.num_entries));
  const int64_t slot = file->geometry_.slot_bytes();
  file->num_segments_ = std::max<int64_t>(0, file->file_size() - kFirstSegment) /
                        (segment_offset(1, slot) - segment_offset(0, slot));
  return file;
}

void PageFile::open_direct() {
  if (geometry_.page_bytes() % kBlockBytes != 0) {
    fail("cannot be read past the page cache: its pages of " +
         std::to_string(geometry_.page_bytes()) + " bytes are not multiples of " +
         std::to_string(kBlockBytes));
  }
  direct_ = FileDescriptor(::open(path_.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC));
  if (!direct_.is_open()) fail("cannot be read past the page cache: " + errno_text(errno));
}

void PageFile::close_in_child() {
  file_.close();
  direct_.close();
}

int64_t PageFile::num_pages(int64_t lane) const {
  check_lane(lane);
  const std::shared_lock<std::shared_mutex> lock(mutex_);
  return static_cast<int64_t>(lanes_[lane].size());
}

int64_t PageFile::num_tokens(int64_t lane) const {
  check_lane(lane);
  const std::shared_lock<std::shared_mutex> lock(mutex_);
  const std::vector<Stored>& pages = lanes_[lane];
  if (pages.empty()) return 0;
  return static_cast<int64_t>(pages.size() - 1) * geometry_.page_size + pages.back().num_tokens;
}

int64_t PageFile::bytes_read() const { return bytes_read_; }
int64_t PageFile::bytes_written() const { return bytes_written_; }

int64_t PageFile::file_size() const {
  struct stat status;
  if (fstat(file_.get(), &status) != 0) fail("cannot be read: " + errno_text(errno));
  return status.st_size;
}

std::string PageFile::name(PageId id) const {
  const int64_t head = id.lane % geometry_.num_kv_heads;
  const int64_t sequence = id.lane / geometry_.num_kv_heads % geometry_.batch;
  const int64_t layer = id.lane / geometry_.num_kv_heads / geometry_.batch;
  return "page " + std::to_string(id.page) + " of layer " + std::to_string(layer) + ", sequence " +
         std::to_string(sequence) + ", kv head " + std::to_string(head);
}

void PageFile::fail(const std::string& what) const {
  throw PageFileError("longctx: page file " + path_ + " " + what);
}

void PageFile::check_lane(int64_t lane) const {
  if (lane < 0 || lane >= geometry_.num_lanes()) fail("has no lane " + std::to_string(lane));
}

void PageFile::check_writable() const {
  if (!writable_) fail("is open for reading only");
}

}  // namespace longctx::host
