// Copies new rows behind those of a cache, and then updates the pages of a summary. Two passes: the
// pages are recomputed from the cache, where the rows are in the processor's cache by then.
#include "kernels.h"
#include "kv_rows.h"
#include "longctx/new_keys.h"
#include "parallel.h"

namespace longctx::cpu {
namespace {

constexpr int64_t kItemBytes = 64 * 1024;  // below this the calling thread copies alone

class AppendKV {
 public:
  explicit AppendKV(const AppendKVParams& params) : p_(params) {}

  void run() {
    for (int64_t b = 0; b < p_.batch; ++b) {
      p_.lengths[b] = static_cast<int32_t>(new_keys(p_, b).length);
    }
    // Rows of all heads and batch entries, numbered through.
    const int64_t rows = p_.batch * p_.num_kv_heads * p_.num_entries;
    const int64_t row_bytes = (p_.head_dim + p_.head_dim_v) * element_bytes(p_.dtype);
    const int64_t rows_per_item = kItemBytes / clamp_index(row_bytes, 1, kItemBytes);
    const auto no_state = [] { return 0; };
    for_each_item((rows + rows_per_item - 1) / rows_per_item, no_state, [&](int64_t item, int) {
      const int64_t end = std::min((item + 1) * rows_per_item, rows);
      for (int64_t row = item * rows_per_item; row < end;) {
        const int64_t token = row % p_.num_entries, map = row / p_.num_entries;
        const int64_t last = std::min(p_.num_entries, token + end - row);
        copy(map / p_.num_kv_heads, map % p_.num_kv_heads, token, last);
        row += last - token;
      }
    });
  }

 private:
  // Tokens [first, last) of a head, as far as they are written.
  void copy(int64_t batch, int64_t head, int64_t first, int64_t last) {
    const NewKeys keys = new_keys(p_, batch);
    first = std::max(first, keys.first);
    last = std::min(last, keys.last);
    const auto copy_to = [&](const TensorView& cache, const TensorView& rows, int64_t dim) {
      const KeyRows targets(p_, cache, dim, batch, head);
      for (int64_t token = first; token < last; ++token) {
        char* target = targets.at(keys.start + token);
        if (target == nullptr) continue;
        std::memcpy(target, row_address(rows, element_bytes(p_.dtype), batch, head, token),
                    static_cast<size_t>(targets.row_bytes()));
      }
    };
    copy_to(p_.k_cache, p_.k, p_.head_dim);
    copy_to(p_.v_cache, p_.v, p_.head_dim_v);
  }

  const AppendKVParams& p_;
};

}  // namespace

void run_append_kv_cpu(const AppendKVParams& params) {
  AppendKV(params).run();
  if (params.has_summary) run_summarize_pages_cpu(params.summary);
}

}  // namespace longctx::cpu
