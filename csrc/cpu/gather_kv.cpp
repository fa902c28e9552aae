// Rows of k and v at the listed keys, copied out in the order of the list; zeros where there is
// none.
#include "kernels.h"
#include "kv_rows.h"
#include "parallel.h"

namespace longctx::cpu {
namespace {

constexpr int64_t kEntriesPerItem = 256;

class GatherKV {
 public:
  explicit GatherKV(const GatherKVParams& params) : p_(params) {}

  void run() const {
    const int64_t pieces = (p_.num_entries + kEntriesPerItem - 1) / kEntriesPerItem;
    for_each_item(
        p_.batch * p_.num_kv_heads * pieces, [] { return 0; },
        [&](int64_t item, int) {
          const int64_t row = item / pieces, begin = item % pieces * kEntriesPerItem;
          gather(row / p_.num_kv_heads, row % p_.num_kv_heads, begin,
                 std::min(begin + kEntriesPerItem, p_.num_entries));
        });
  }

 private:
  void gather(int64_t batch, int64_t head, int64_t begin, int64_t end) const {
    const int64_t index_head = head * p_.index_heads / p_.num_kv_heads;
    const int32_t* keys = p_.indices.row(batch, index_head, 0);
    const int64_t used = used_keys(p_, batch);
    const int64_t counted = std::min(end, counted_entries(p_, batch, index_head));
    const auto named = [&](int64_t entry) {
      return entry < counted && keys[entry] >= 0 && keys[entry] < used;
    };
    const KeyRows k(p_, p_.k, p_.head_dim, batch, head);
    const KeyRows v(p_, p_.v, p_.head_dim_v, batch, head);
    const int64_t first = (batch * p_.num_kv_heads + head) * p_.num_entries;
    for (int64_t i = begin - kRowsAhead; i < end; ++i) {
      const int64_t ahead = i + kRowsAhead;
      if (ahead < end && named(ahead)) {
        k.prefetch(keys[ahead]);
        v.prefetch(keys[ahead]);
      }
      if (i < begin) continue;
      copy(k, named(i), keys[i], static_cast<char*>(p_.k_out) + (first + i) * k.row_bytes());
      copy(v, named(i), keys[i], static_cast<char*>(p_.v_out) + (first + i) * v.row_bytes());
    }
  }

  static void copy(const KeyRows& rows, bool named, int64_t key, char* to) {
    const char* from = named ? rows.at(key) : nullptr;
    if (from == nullptr) {
      std::memset(to, 0, static_cast<size_t>(rows.row_bytes()));
    } else {
      std::memcpy(to, from, static_cast<size_t>(rows.row_bytes()));
    }
  }

  const GatherKVParams& p_;
};

}  // namespace

void run_gather_kv_cpu(const GatherKVParams& params) { GatherKV(params).run(); }

}  // namespace longctx::cpu
