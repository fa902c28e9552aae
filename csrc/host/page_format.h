// The page file on disk. All integers are little-endian.
//
//   block 0      FileHeader: what the pages hold; written once
//   blocks 1, 2  CommitRecord, written in turns: the one with the higher sequence says how many
//   entries count segments     each: a block of kSegmentEntries PageEntry, then as many page slots
//
// A page is appended by writing its slot and its entry; it exists from the moment that a commit
// record counts it. Nothing that a record counts is ever overwritten, so a process may die between
// any two writes, and readers need no lock.
#pragma once
#include <cstddef>
#include <cstdint>

#include "checksum.h"

namespace longctx::host {

constexpr int64_t kBlockBytes = 4096;
constexpr int64_t kCommitRecords = 2;
constexpr char kMagic[8] = {'l', 'c', 't', 'x', 'p', 'a', 'g', 'e'};
constexpr uint32_t kFormatVersion = 2;

// A page holds `page_size` rows of K, then as many of V, of one layer, batch entry and kv head: a
// "lane", numbered (layer * batch + sequence) * num_kv_heads + head.
struct PageGeometry {
  int64_t num_layers;
  int64_t batch;
  int64_t num_kv_heads;
  int64_t page_size;
  int64_t head_dim;
  int64_t head_dim_v;
  int64_t element_bytes;
  char dtype[16];

  int64_t num_lanes() const { return num_layers * batch * num_kv_heads; }
  int64_t page_bytes() const { return page_size * (head_dim + head_dim_v) * element_bytes; }
  int64_t slot_bytes() const {
    return (page_bytes() + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
  }
};

struct PageId {
  int64_t lane;
  int64_t page;
};

struct FileHeader {
  char magic[8];
  uint32_t version;
  uint32_t checksum;  // of the geometry
  PageGeometry geometry;
};

struct CommitRecord {
  uint64_t sequence;
  uint64_t num_entries;
  uint32_t checksum;  // of the fields before
  uint32_t unused;
};

enum EntryKind : uint32_t {
  kPage = 1,  // page `page` of `lane` is in this entry's slot; pages behind it are gone
  // `lane` has the first `page` pages of lane `source`, which may be itself; the slot is unused.
  // Cuts that follow each other count from what the lanes were before the first of them, and apply
  // together with the last: `num_tokens` says how many are to come.
  kCut = 2,
};

struct PageEntry {
  uint64_t number;  // of the entry in the file: an entry in the wrong place is damage
  uint32_t lane;
  uint32_t page;
  uint32_t num_tokens;  // rows in use, at most page_size; only a lane's last page may have fewer
  uint32_t kind;
  uint32_t page_checksum;  // of a cut: its source
  uint32_t checksum;       // of the fields before
};
static_assert(sizeof(PageEntry) == 32, "a block holds a whole number of entries");

constexpr int64_t kSegmentEntries = kBlockBytes / static_cast<int64_t>(sizeof(PageEntry));
constexpr int64_t kFirstSegment = (1 + kCommitRecords) * kBlockBytes;

inline uint32_t checksum_of(const CommitRecord& record) {
  return crc32c(&record, offsetof(CommitRecord, checksum));
}
inline uint32_t checksum_of(const PageEntry& entry) {
  return crc32c(&entry, offsetof(PageEntry, checksum));
}

inline int64_t record_offset(uint64_t sequence) {
  return kBlockBytes * (1 + static_cast<int64_t>(sequence % kCommitRecords));
}
inline int64_t segment_offset(int64_t segment, int64_t slot_bytes) {
  return kFirstSegment + segment * (kBlockBytes + kSegmentEntries * slot_bytes);
}
inline int64_t entry_offset(int64_t entry, int64_t slot_bytes) {
  return segment_offset(entry / kSegmentEntries, slot_bytes) +
         entry % kSegmentEntries * static_cast<int64_t>(sizeof(PageEntry));
}
inline int64_t slot_offset(int64_t entry, int64_t slot_bytes) {
  return segment_offset(entry / kSegmentEntries, slot_bytes) + kBlockBytes +
         entry % kSegmentEntries * slot_bytes;
}

}  // namespace longctx::host
