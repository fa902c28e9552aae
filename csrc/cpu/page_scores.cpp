// Scores of pages from their summaries: a summary is read once for all query rows that share it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>

#include "dense_chunk.h"
#include "kernels.h"
#include "key_scores_run.h"
#include "longctx/sequence.h"
#include "reduced_float.h"

namespace longctx::cpu {
namespace {

class Source {
 public:
  explicit Source(const PageScoresParams& params) : p_(params) {}

  const void* query(int64_t batch, int64_t head, int64_t token) const {
    return row_address(p_.q, element_bytes(p_.dtype), batch, head, token);
  }

  // Pages that begin at or before the token.
  int64_t visible(int64_t batch, int64_t token) const {
    if (p_.seqused_k == nullptr) return p_.num_pages;
    const int64_t used = clamp_index(p_.seqused_k[batch], 0, p_.num_pages * p_.page_size);
    const int64_t keys = clamp_index(used - p_.seqlen_q + token + 1, 0, used);
    return (keys + p_.page_size - 1) / p_.page_size;
  }

  bool ascending() const { return true; }

  void list(int64_t batch, int64_t head, int64_t, int64_t first, KeyRowList* list) const {
    const char* row = row_address(p_.summary, element_bytes(p_.dtype), batch, head, first);
    const int64_t step = p_.summary.seq_stride * element_bytes(p_.dtype);
    for (int64_t i = 0; i < list->count + list->ahead; ++i) list->rows[i] = row + i * step;
    list->in_order = true;
    if (p_.counts.data == nullptr) return;
    const int32_t* counts = p_.counts.row(batch, head, 0) + first;
    hide(list, first, [&](int64_t i) { return counts[i] <= 0; });
  }

  // The extremes of no key, inf and -inf, meet a zero in every query.
  template <class T>
  void look_at(const T* scores, int64_t first, KeyRowList* list) const {
    if (!p_.minmax) return;
    bool any = false;
    for (int64_t i = 0; i < list->count; ++i) any |= std::isnan(scores[i]);
    if (any) hide(list, first, [&](int64_t i) { return holds_nothing(list->rows[i]); });
  }

 private:
  template <class Hides>
  static void hide(KeyRowList* list, int64_t first, const Hides& hides) {
    for (int64_t i = 0; i < list->count; ++i) {
      const int64_t position = list->in_order ? first + i : list->positions[i];
      list->positions[i] = hides(i) ? kHidden : position;
    }
    list->in_order = false;
  }

  bool holds_nothing(const void* row) const {
    switch (p_.dtype) {
      case DType::kFloat64:
        return above<double>(row);
      case DType::kBFloat16:
        return above<BFloat16>(row);
      case DType::kFloat16:
        return above<Float16>(row);
      default:
        return above<float>(row);
    }
  }
  template <class In>
  bool above(const void* row) const {
    const In* low = static_cast<const In*>(row);
    return widen(low[0]) > widen(low[p_.head_dim]);
  }

  const PageScoresParams& p_;
};

template <class T>
class PageScores {
 public:
  explicit PageScores(const PageScoresParams& params) : p_(params) {
    job_.shape = {p_.dtype, p_.head_dim, p_.minmax, p_.softmax_scale, 0.0};
    job_.batch = p_.batch;
    job_.seqlen_q = p_.seqlen_q;
    job_.num_q_heads = p_.num_q_heads;
    job_.num_scores = p_.num_pages;
    job_.list_heads = p_.summary_heads;
    job_.head_reduce = p_.head_reduce;
    job_.query_reduce = p_.query_reduce;
    job_.scores = p_.scores;
  }

  void run() const {
    const Source source(p_);
    if (!p_.softmax) return run_key_scores_as<T>(job_, source, nullptr, nullptr);
    KeyScoresJob each = job_;
    each.head_reduce = HeadReduce::kNone;
    each.query_reduce = QueryReduce::kNone;
    const int64_t rows = p_.batch * p_.num_q_heads * p_.seqlen_q;
    const std::unique_ptr<T[]> scores(new T[static_cast<size_t>(rows * p_.num_pages)]);
    run_key_scores_as<T>(each, source, nullptr, scores.get());
    normalize(source, rows, scores.get());
    run_key_scores_as<T>(job_, source, scores.get(), nullptr);
  }

 private:
  void normalize(const Source& source, int64_t rows, T* scores) const {
    const KeyRowsEngine& engine = choose_key_rows(p_.dtype, active_isa());
    const auto nothing = [] { return FlushSubnormals(); };
    for_each_item(rows, nothing, [&](int64_t row, const FlushSubnormals&) {
      const int64_t token = row % p_.seqlen_q, head = row / p_.seqlen_q % p_.num_q_heads;
      const int64_t batch = row / p_.seqlen_q / p_.num_q_heads;
      const int64_t list_head = head * p_.summary_heads / p_.num_q_heads;
      const int32_t* counts =
          p_.counts.data == nullptr ? nullptr : p_.counts.row(batch, list_head, 0);
      engine.softmax(scores + row * p_.num_pages, counts, source.visible(batch, token));
    });
  }

  const PageScoresParams& p_;
  KeyScoresJob job_;
};

}  // namespace

void run_page_scores_cpu(const PageScoresParams& params) {
  if (params.dtype == DType::kFloat64) return PageScores<double>(params).run();
  PageScores<float>(params).run();
}

}  // namespace longctx::cpu
