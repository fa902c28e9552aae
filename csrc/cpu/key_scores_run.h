// Scores of query rows and rows of keys, or of summaries of keys: runs key_rows.h over a call,
// hides what a token does not see and reduces over heads and tokens while the scores are in the
// cache. Every score is computed alone, so that results do not depend on how the work is split.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

#include "flush_subnormals.h"
#include "key_rows.h"
#include "parallel.h"
#include "scratch.h"

namespace longctx::cpu {

constexpr int64_t kHidden = std::numeric_limits<int64_t>::max();

// Rows of keys that follow each other in a row of scores.
struct KeyRowList {
  int64_t count = 0;
  int64_t ahead = 0;                         // rows behind them that are only prefetched
  const void* rows[kListRows + kRowsAhead];  // all may be read, also of what is hidden
  bool in_order = true;                      // none is hidden and positions ascend by 1
  int64_t positions[kListRows];              // a token sees those below its own; kHidden: nobody
};

struct KeyScoresJob {
  KeyRowsShape shape;
  int64_t batch = 0;
  int64_t seqlen_q = 0;
  int64_t num_q_heads = 0;
  int64_t num_scores = 0;    // of a row
  int64_t list_heads = 1;    // query heads of the same list head read the same rows
  bool token_lists = false;  // each token reads rows of its own
  HeadReduce head_reduce = HeadReduce::kNone;
  QueryReduce query_reduce = QueryReduce::kNone;
  float* scores = nullptr;  // [batch, out heads, out rows, num_scores]

  int64_t group_size() const { return num_q_heads / list_heads; }
  int64_t out_rows() const { return query_reduce == QueryReduce::kNone ? seqlen_q : 1; }
  int64_t out_heads() const {
    return head_reduce == HeadReduce::kNone     ? num_q_heads
           : head_reduce == HeadReduce::kAllSum ? 1
                                                : list_heads;
  }
};

// Source says what there is:
//   const void* query(batch, head, token);
//   int64_t visible(batch, token): positions below it are seen; ascending by token;
//   bool ascending(): score i of a row stands at position i;
//   void list(batch, list_head, token, first, KeyRowList*): count is given, and ahead as a wish;
//   void look_at(const T* scores, first, KeyRowList*): hides what its scores tell not to exist.
template <class T, class Source>
class KeyScoresWorker {
 public:
  // scored: T [batch, num_q_heads, seqlen_q, num_scores], scores that are already made, or null.
  // raw: the same, to be written instead of job.scores, or null.
  KeyScoresWorker(const KeyRowsEngine& engine, const KeyScoresJob& job, const Source& source,
                  T* scored, T* raw)
      : engine_(engine), job_(job), source_(source), scored_(scored), raw_(raw) {
    constexpr int64_t kTileRows = 32;
    block_tokens_ = job.token_lists ? 1
                                    : std::clamp<int64_t>(kTileRows / job.group_size(), 1,
                                                          std::max<int64_t>(job.seqlen_q, 1));
    const int64_t rows = block_tokens_ * job.group_size();
    ScratchPlan plan;
    const size_t list = plan.add<KeyRowList>(1);
    const size_t tile = plan.add<T>(rows * kListRows);
    const size_t heads = plan.add<T>(block_tokens_ * kListRows);
    const size_t totals = plan.add<T>(job.group_size() * kListRows);
    const size_t queries = plan.add<const void*>(rows);
    const size_t packed = plan.add<char>(engine.query_bytes(job.shape, rows));
    char* base = static_cast<char*>(thread_scratch(plan.bytes()));
    list_ = new (base + list) KeyRowList;
    tile_ = reinterpret_cast<T*>(base + tile);
    head_sums_ = reinterpret_cast<T*>(base + heads);
    totals_ = reinterpret_cast<T*>(base + totals);
    queries_ = reinterpret_cast<const void**>(base + queries);
    packed_ = base + packed;
  }
  KeyScoresWorker(const KeyScoresWorker&) = delete;
  KeyScoresWorker& operator=(const KeyScoresWorker&) = delete;

  // Scores [begin, end) of the rows of a unit: the query heads of a list head, or all of them where
  // these are summed.
  void run(int64_t batch, int64_t unit, int64_t begin, int64_t end) {
    const bool all = job_.head_reduce == HeadReduce::kAllSum;
    const int64_t first_head = all ? 0 : unit;
    const int64_t last_head = all ? job_.list_heads : unit + 1;
    // Where positions ascend, nobody sees what follows the last that the last token sees.
    int64_t seen = end;
    if (source_.ascending()) {
      seen = job_.seqlen_q == 0 ? 0 : std::min(end, source_.visible(batch, job_.seqlen_q - 1));
    }
    packed_for_ = -1;
    for (int64_t first = begin; first < end; first += kListRows) {
      place_ = {batch, unit, first, std::min(kListRows, end - first)};
      list_->count = std::clamp<int64_t>(seen - first, 0, place_.count);
      for (int64_t token = 0; token < job_.seqlen_q; token += block_tokens_) {
        const int64_t tokens = std::min(block_tokens_, job_.seqlen_q - token);
        // Rows that other tokens have just read need no prefetch.
        const int64_t ahead =
            token > 0 && !job_.token_lists ? 0 : std::max<int64_t>(seen - first - list_->count, 0);
        for (int64_t head = first_head; head < last_head; ++head) {
          list_->ahead = std::min(ahead, kRowsAhead);
          score(head, token, tokens);
          fold_heads(head == first_head, token, tokens);
        }
        if (job_.head_reduce != HeadReduce::kNone) {
          for (int64_t t = 0; t < tokens; ++t) emit(0, token + t, head_sums_ + t * kListRows);
        }
      }
      if (job_.query_reduce != QueryReduce::kNone) {
        for (int64_t slot = 0; slot < slots(); ++slot) finish(slot);
      }
    }
  }

 private:
  static constexpr T kInf = std::numeric_limits<T>::infinity();

  // What is being computed: scores [first, first + count) of a unit.
  struct Place {
    int64_t batch, unit, first, count;
  };

  int64_t slots() const { return job_.head_reduce == HeadReduce::kNone ? job_.group_size() : 1; }

  // Fills the tile: row t * group_size + g is query head g of token t.
  void score(int64_t head, int64_t token, int64_t tokens) {
    if (list_->count == 0) return;
    const int64_t group = job_.group_size();
    source_.list(place_.batch, head, token, place_.first, list_);
    if (scored_ != nullptr) {
      for (int64_t r = 0; r < tokens * group; ++r) {
        const int64_t q_head = head * group + r % group;
        const T* from = scored_ + raw_row(q_head, token + r / group) + place_.first;
        engine_.combine(Combine::kCopy, from, list_->count, tile_ + r * kListRows);
      }
      return;
    }
    const int64_t packed_for = head * job_.seqlen_q + token;
    if (packed_for_ != packed_for) {
      for (int64_t r = 0; r < tokens * group; ++r) {
        queries_[r] = source_.query(place_.batch, head * group + r % group, token + r / group);
      }
      engine_.pack_queries(job_.shape, queries_, tokens * group, packed_);
      packed_for_ = packed_for;
    }
    engine_.score(job_.shape, tokens * group, packed_, list_->rows, list_->count, list_->ahead,
                  tile_);
    source_.look_at(tile_, place_.first, list_);
  }

  void fold_heads(bool is_first, int64_t token, int64_t tokens) {
    const int64_t group = job_.group_size();
    const Combine combine =
        job_.head_reduce == HeadReduce::kGroupMax ? Combine::kMax : Combine::kAdd;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t g = 0; g < group; ++g) {
        T* row = tile_ + (t * group + g) * kListRows;
        // What does not exist for one head does not for the sum over all.
        if (job_.head_reduce == HeadReduce::kAllSum) hide(kHidden, -kInf, row);
        if (job_.head_reduce == HeadReduce::kNone) {
          emit(g, token + t, row);
        } else {
          engine_.combine(is_first && g == 0 ? Combine::kCopy : combine, row, list_->count,
                          head_sums_ + t * kListRows);
        }
      }
    }
  }

  // `row` holds the scores of one token, heads reduced.
  void emit(int64_t slot, int64_t token, T* row) {
    hide(source_.visible(place_.batch, token),
         job_.query_reduce == QueryReduce::kMean ? T(0) : -kInf, row);
    if (job_.query_reduce == QueryReduce::kNone) return write(slot, token, row, divisor());
    T* total = totals_ + slot * kListRows;
    const Combine combine = job_.query_reduce == QueryReduce::kMax ? Combine::kMax : Combine::kAdd;
    engine_.combine(token == 0 ? Combine::kCopy : combine, row, list_->count, total);
  }

  double divisor() const {
    return job_.head_reduce == HeadReduce::kGroupMean ? static_cast<double>(job_.group_size()) : 1;
  }

  void hide(int64_t visible, T value, T* row) const {
    if (list_->in_order) {
      const int64_t seen = std::clamp<int64_t>(visible - place_.first, 0, list_->count);
      std::fill(row + seen, row + list_->count, value);
      return;
    }
    for (int64_t i = 0; i < list_->count; ++i) {
      if (list_->positions[i] >= visible) row[i] = value;
    }
  }

  // The reduced scores of a row of tokens: a mean is taken over those that see the key.
  void finish(int64_t slot) {
    T* total = totals_ + slot * kListRows;
    if (job_.seqlen_q == 0) {
      list_->count = 0;
    } else if (job_.query_reduce == QueryReduce::kMean) {
      const int64_t all_see = source_.visible(place_.batch, 0);
      for (int64_t i = 0; i < list_->count; ++i) {
        const int64_t position = list_->in_order ? place_.first + i : list_->positions[i];
        int64_t tokens = job_.seqlen_q;
        if (position >= all_see) {
          while (tokens > 0 && source_.visible(place_.batch, job_.seqlen_q - tokens) <= position) {
            --tokens;
          }
        }
        total[i] = tokens == 0 ? -kInf : total[i] / static_cast<T>(tokens);
      }
    }
    write(slot, 0, total, divisor());
  }

  void write(int64_t slot, int64_t row, const T* from, double by) const {
    const int64_t out_head = job_.head_reduce == HeadReduce::kNone
                                 ? place_.unit * job_.group_size() + slot
                                 : place_.unit;
    if (raw_ != nullptr) {
      T* to = raw_ + raw_row(out_head, row) + place_.first;
      engine_.combine(Combine::kCopy, from, list_->count, to);
      std::fill(to + list_->count, to + place_.count, -kInf);
      return;
    }
    const int64_t index = (place_.batch * job_.out_heads() + out_head) * job_.out_rows() + row;
    float* to = job_.scores + index * job_.num_scores + place_.first;
    engine_.round_scores(from, list_->count, by, to);
    std::fill(to + list_->count, to + place_.count, -std::numeric_limits<float>::infinity());
  }

  int64_t raw_row(int64_t head, int64_t token) const {
    return ((place_.batch * job_.num_q_heads + head) * job_.seqlen_q + token) * job_.num_scores;
  }

  const KeyRowsEngine& engine_;
  const KeyScoresJob& job_;
  const Source& source_;
  T* scored_;
  T* raw_;
  int64_t block_tokens_;
  Place place_{};
  int64_t packed_for_ = -1;  // list head and first token of the packed queries
  const FlushSubnormals flush_;
  KeyRowList* list_;
  T* tile_;               // [block_tokens * group_size][kListRows]
  T* head_sums_;          // [block_tokens][kListRows]
  T* totals_;             // [group_size][kListRows]
  const void** queries_;  // [block_tokens * group_size]
  char* packed_;
};

template <class T, class Source>
void run_key_scores_as(const KeyScoresJob& job, const Source& source, T* scored, T* raw) {
  const KeyRowsEngine& engine = choose_key_rows(job.shape.dtype, active_isa());
  const int64_t units = job.batch * (job.head_reduce == HeadReduce::kAllSum ? 1 : job.list_heads);
  if (units == 0 || job.num_scores == 0) return;
  const int64_t threads = thread_pool().num_threads();
  const int64_t wanted = threads == 1 ? 1 : (4 * threads + units - 1) / units;
  const int64_t lists = (job.num_scores + kListRows - 1) / kListRows;
  const int64_t pieces = std::min(wanted, lists);
  for_each_item(
      units * pieces, [&] { return KeyScoresWorker<T, Source>(engine, job, source, scored, raw); },
      [&](int64_t item, KeyScoresWorker<T, Source>& worker) {
        const int64_t unit = item / pieces, piece = item % pieces;
        const int64_t heads = units / job.batch;
        worker.run(unit / heads, unit % heads, lists * piece / pieces * kListRows,
                   std::min(lists * (piece + 1) / pieces * kListRows, job.num_scores));
      });
}

}  // namespace longctx::cpu
