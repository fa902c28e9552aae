// Scores of keys: each row of K that a token may see, or that is listed, is read once for all query
// rows that share it.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "dense_chunk.h"
#include "kernels.h"
#include "key_scores_run.h"
#include "longctx/sequence.h"

namespace longctx::cpu {
namespace {

class Source {
 public:
  explicit Source(const TokenScoresParams& params)
      : p_(params), nothing_(static_cast<size_t>(params.head_dim * element_bytes(params.dtype))) {}

  // Query heads of the same list head score the same rows.
  int64_t list_heads() const {
    const bool own = p_.candidates.data != nullptr && p_.candidate_heads == p_.num_q_heads;
    return own ? p_.num_q_heads : p_.num_kv_heads;
  }

  const void* query(int64_t batch, int64_t head, int64_t token) const {
    return row_address(p_.q, element_bytes(p_.dtype), batch, head, token);
  }

  int64_t visible(int64_t batch, int64_t token) const {
    const Sequence seq = sequence_at(p_.seqs, batch);
    return clamp_index(seq.diagonal() + token + 1, 0, seq.k_len);
  }

  bool ascending() const { return p_.candidates.data == nullptr; }

  void list(int64_t batch, int64_t head, int64_t token, int64_t first, KeyRowList* list) const {
    const Rows rows(p_, batch, head * p_.num_kv_heads / list_heads());
    list->in_order = ascending();
    if (!ascending()) {
      const int64_t candidate_head = head * p_.candidate_heads / list_heads();
      const int32_t* candidates = p_.candidates.row(batch, candidate_head, token) + first;
      const int64_t used = sequence_at(p_.seqs, batch).k_len;
      for (int64_t i = 0; i < list->count + list->ahead; ++i) {
        const int64_t key = candidates[i];
        const void* address = key >= 0 && key < used ? rows.find(key) : nullptr;
        set(list, i, key, address);
      }
    } else if (p_.pages.page_table != nullptr) {
      for (int64_t i = 0; i < list->count + list->ahead; ++i) {
        set(list, i, first + i, rows.find(first + i));
      }
    } else {
      const char* row = static_cast<const char*>(rows.find(first));
      const int64_t step = p_.k.seq_stride * element_bytes(p_.dtype);
      for (int64_t i = 0; i < list->count + list->ahead; ++i) list->rows[i] = row + i * step;
    }
  }

  template <class T>
  void look_at(const T*, int64_t, KeyRowList*) const {}

 private:
  // The keys of a kv head of a batch entry.
  class Rows {
   public:
    Rows(const TokenScoresParams& params, int64_t batch, int64_t kv_head) : p_(params) {
      const bool in_pages = p_.pages.page_table != nullptr;
      data_ = row_address(p_.k, element_bytes(p_.dtype), in_pages ? 0 : batch, kv_head, 0);
      if (in_pages) pages_ = p_.pages.page_table + batch * p_.pages.max_pages;
    }
    // Null where the page of the key does not exist.
    const void* find(int64_t key) const {
      int64_t offset = key * p_.k.seq_stride;
      if (pages_ != nullptr) {
        const int64_t page = pages_[key / p_.pages.page_size];
        if (page < 0 || page >= p_.pages.num_pages) return nullptr;
        offset = page * p_.k.batch_stride + key % p_.pages.page_size * p_.k.seq_stride;
      }
      return data_ + offset * element_bytes(p_.dtype);
    }

   private:
    const TokenScoresParams& p_;
    const char* data_;
    const int32_t* pages_ = nullptr;
  };

  void set(KeyRowList* list, int64_t i, int64_t position, const void* row) const {
    list->rows[i] = row != nullptr ? row : nothing_.data();
    if (i < list->count) list->positions[i] = row != nullptr ? position : kHidden;
    if (row == nullptr) list->in_order = false;
  }

  const TokenScoresParams& p_;
  std::vector<char> nothing_;  // a row of zeros
};

template <class T>
void run_as(const TokenScoresParams& p) {
  const Source source(p);
  KeyScoresJob job;
  job.shape = {p.dtype, p.head_dim, false, p.softmax_scale, p.softcap};
  job.batch = p.seqs.batch;
  job.seqlen_q = p.seqs.seqlen_q;
  job.num_q_heads = p.num_q_heads;
  job.num_scores = p.num_scores;
  job.list_heads = source.list_heads();
  job.token_lists = p.candidate_rows > 1;
  job.head_reduce = p.head_reduce;
  job.query_reduce = p.query_reduce;
  job.scores = p.scores;
  run_key_scores_as<T>(job, source, nullptr, nullptr);
}

}  // namespace

void run_token_scores_cpu(const TokenScoresParams& params) {
  if (params.dtype == DType::kFloat64) return run_as<double>(params);
  run_as<float>(params);
}

}  // namespace longctx::cpu
