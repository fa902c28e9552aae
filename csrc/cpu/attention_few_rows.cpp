// attention on the CPU where a kv head has few query rows: decoding. Bound by reading K and V once.
#include "attention_few_rows.h"

#include <algorithm>
#include <vector>

#include "dense_chunk.h"
#include "few_rows_run.h"
#include "visit.h"

namespace longctx::cpu {
namespace {

// Ascending, disjoint intervals of keys.
using Intervals = std::vector<Interval>;

Intervals intersection(const Intervals& a, const Intervals& b) {
  Intervals result;
  for (size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    const Interval both{std::max(a[i].begin, b[j].begin), std::min(a[i].end, b[j].end)};
    if (both.begin < both.end) result.push_back(both);
    a[i].end < b[j].end ? ++i : ++j;
  }
  return result;
}

// a without b, which is part of it.
Intervals difference(const Intervals& a, const Intervals& b) {
  Intervals result;
  size_t j = 0;
  for (const Interval& whole : a) {
    int64_t begin = whole.begin;
    for (; j < b.size() && b[j].begin < whole.end; ++j) {
      if (begin < b[j].begin) result.push_back({begin, b[j].begin});
      begin = b[j].end;
    }
    if (begin < whole.end) result.push_back({begin, whole.end});
  }
  return result;
}

// Keys number [begin, end) of those in `keys`.
Intervals cut(const Intervals& keys, int64_t begin, int64_t end) {
  Intervals result;
  for (const Interval& run : keys) {
    const int64_t size = run.end - run.begin;
    const Interval part{run.begin + std::max<int64_t>(begin, 0), run.begin + std::min(end, size)};
    if (part.begin < part.end) result.push_back(part);
    begin -= size;
    end -= size;
  }
  return result;
}

int64_t count(const Intervals& keys) {
  int64_t total = 0;
  for (const Interval& run : keys) total += run.end - run.begin;
  return total;
}

class VisibleKeys {
 public:
  VisibleKeys() = default;
  VisibleKeys(Intervals keys, const char* k, int64_t k_step, const char* v, int64_t v_step)
      : keys_(std::move(keys)), k_(k), v_(v), k_step_(k_step), v_step_(v_step) {}

  // False when no key is left.
  bool next(KeyList* list) {
    list->count = 0;
    for (; run_ < keys_.size() && list->count < kListKeys; ++list->count) {
      const int64_t key = keys_[run_].begin++;
      list->k_rows[list->count] = k_ + key * k_step_;
      list->v_rows[list->count] = v_ + key * v_step_;
      if (keys_[run_].begin == keys_[run_].end) ++run_;
    }
    return list->count > 0;
  }

 private:
  Intervals keys_;
  size_t run_ = 0;
  const char *k_ = nullptr, *v_ = nullptr;  // row of key 0
  int64_t k_step_ = 0, v_step_ = 0;         // bytes
};

// Units are (batch entry, kv head).
class Source : public FewRowsSource {
 public:
  using Keys = VisibleKeys;

  explicit Source(const AttentionParams& params) : p_(params), visible_(p_.seqs.batch) {
    job_.shape = {p_.dtype, p_.head_dim, p_.head_dim_v, p_.softmax_scale, p_.softcap};
    job_.num_units = p_.seqs.batch * p_.num_kv_heads;
    job_.num_tokens = p_.seqs.seqlen_q;
    job_.heads = p_.num_q_heads / p_.num_kv_heads;
    job_.num_segments = choose_segments(p_.seqs.seqlen_k, job_.num_units);
    job_.own_keys = p_.seqs.seqlen_q > 1;
    for (int64_t b = 0; b < p_.seqs.batch; ++b) {
      const Sequence seq = sequence_at(p_.seqs, b);
      Visible& visible = visible_[b];
      visible.own.resize(p_.seqs.seqlen_q);
      for (int64_t t = 0; t < p_.seqs.seqlen_q; ++t) {
        visible_union(p_.mask, seq, t, t + 1, visible.own[t]);
        visible.common = t == 0 ? visible.own[t] : intersection(visible.common, visible.own[t]);
      }
      for (Intervals& own : visible.own) own = difference(own, visible.common);
    }
  }
  const FewRowsJob& job() const { return job_; }

  Keys keys(int64_t unit, int64_t segment) const {
    const int64_t batch = unit / p_.num_kv_heads, head = unit % p_.num_kv_heads;
    const Visible& visible = visible_[batch];
    const int64_t size = element_bytes(p_.dtype), total = count(visible.common);
    Intervals keys = segment < job_.num_segments
                         ? cut(visible.common, total * segment / job_.num_segments,
                               total * (segment + 1) / job_.num_segments)
                         : visible.own[segment - job_.num_segments];
    return {std::move(keys), row_address(p_.k, size, batch, head, 0), p_.k.seq_stride * size,
            row_address(p_.v, size, batch, head, 0), p_.v.seq_stride * size};
  }
  const void* query(int64_t unit, int64_t row) const {
    return row_address(p_.q, element_bytes(p_.dtype), unit / p_.num_kv_heads, head(unit, row),
                       row / job_.heads);
  }
  FewRowsOutput output(int64_t unit, int64_t row) const {
    const int64_t batch = unit / p_.num_kv_heads, token = row / job_.heads;
    const int64_t flat = (batch * p_.num_q_heads + head(unit, row)) * p_.seqs.seqlen_q + token;
    return {const_cast<char*>(
                row_address(p_.out, element_bytes(p_.dtype), batch, head(unit, row), token)),
            static_cast<char*>(p_.lse) + flat * (p_.dtype == DType::kFloat64 ? 8 : 4),
            p_.sinks == nullptr ? nullptr : p_.sinks + head(unit, row)};
  }

 private:
  struct Visible {
    Intervals common;            // what every token sees
    std::vector<Intervals> own;  // what each token sees besides
  };
  int64_t head(int64_t unit, int64_t row) const {
    return unit % p_.num_kv_heads * job_.heads + row % job_.heads;
  }

  const AttentionParams& p_;
  FewRowsJob job_;
  std::vector<Visible> visible_;  // [batch]
};

}  // namespace

bool has_few_rows(const AttentionParams& params) {
  constexpr int64_t kMaxRows = 8;  // above, the strips of the tile engines are as fast
  const int64_t rows = params.seqs.seqlen_q * (params.num_q_heads / params.num_kv_heads);
  return params.seqs.cu_seqlens_q == nullptr && rows <= kMaxRows;
}

void run_attention_few_rows(const AttentionParams& params) {
  const Source source(params);
  run_few_rows(source.job(), source);
}

}  // namespace longctx::cpu
