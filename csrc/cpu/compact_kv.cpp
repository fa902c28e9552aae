// Moves the listed rows of caches to the front, in place: sources ascend, so no row is written
// before it was read. The lists are read once, for all layers and heads.
#include <vector>

#include "kernels.h"
#include "kv_rows.h"
#include "parallel.h"

namespace longctx::cpu {
namespace {

class CompactKV {
 public:
  explicit CompactKV(const CompactKVParams& params) : p_(params) {}

  void run() {
    const int64_t lists = p_.batch * p_.index_heads;
    sources_.resize(static_cast<size_t>(lists * p_.num_entries));
    const auto no_state = [] { return 0; };
    for_each_item(lists, no_state, [&](int64_t list, int) {
      p_.lengths[list] =
          static_cast<int32_t>(kept_keys(list / p_.index_heads, list % p_.index_heads));
    });
    const int64_t heads = p_.batch * p_.num_kv_heads;
    for_each_item(2 * p_.num_layers * heads, no_state, [&](int64_t item, int) {
      const int64_t layer = item / (2 * heads), row = item % heads;
      const bool is_k = item / heads % 2 == 0;
      const TensorView& cache = is_k ? p_.k_cache[layer] : p_.v_cache[layer];
      const int64_t dim = is_k ? p_.head_dim : p_.head_dim_v;
      move(row / p_.num_kv_heads, row % p_.num_kv_heads, cache, dim);
    });
  }

 private:
  // The key that entries count from; below 0 where the draft is longer than the keys.
  int64_t base(int64_t batch) const {
    return p_.of_draft ? used_keys(p_, batch) - p_.num_draft_tokens : 0;
  }

  int32_t* sources(int64_t batch, int64_t index_head) {
    return sources_.data() + (batch * p_.index_heads + index_head) * p_.num_entries;
  }

  // Lists the keys that stay, and returns how many keys there are then.
  int64_t kept_keys(int64_t batch, int64_t index_head) {
    const int32_t* entries =
        p_.indices.data == nullptr ? nullptr : p_.indices.row(batch, index_head, 0);
    const int64_t used = used_keys(p_, batch);
    const int64_t counted = counted_entries(p_, batch, index_head);
    const int64_t first = base(batch);
    int32_t* kept = sources(batch, index_head);
    int64_t length = std::max<int64_t>(first, 0), last = length - 1;
    // Whether a key's page exists depends on its batch entry alone.
    const KeyRows pages(p_, TensorView(), 0, batch, 0);
    for (int64_t i = 0; i < counted; ++i) {
      if (entries != nullptr && entries[i] < 0) continue;
      const int64_t key = first + (entries == nullptr ? i : entries[i]);
      if (key <= last || key >= used || !pages.exists(key)) continue;
      *kept++ = static_cast<int32_t>(key);
      last = key;
      ++length;
    }
    return length;
  }

  void move(int64_t batch, int64_t head, const TensorView& cache, int64_t dim) {
    const int64_t index_head = head * p_.index_heads / p_.num_kv_heads;
    const int32_t* keys = sources(batch, index_head);
    const int64_t to = std::max<int64_t>(base(batch), 0);
    const int64_t count = p_.lengths[batch * p_.index_heads + index_head] - to;
    const KeyRows rows(p_, cache, dim, batch, head);
    int64_t stay = 0;  // rows in front that stand where they should
    while (stay < count && keys[stay] == to + stay) ++stay;
    for (int64_t i = stay; i < count; ++i) {
      if (i + kRowsAhead < count) rows.prefetch(keys[i + kRowsAhead]);
      char* target = rows.at(to + i);
      if (target == nullptr) continue;
      std::memmove(target, rows.at(keys[i]), static_cast<size_t>(rows.row_bytes()));
    }
  }

  const CompactKVParams& p_;
  std::vector<int32_t> sources_;  // [batch, index_heads, num_entries]
};

}  // namespace

void run_compact_kv_cpu(const CompactKVParams& params) { CompactKV(params).run(); }

}  // namespace longctx::cpu
