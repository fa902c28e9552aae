// Runs few_rows.h over all query rows of a call.
// A unit is a set of query rows that read the same kv head: `num_tokens` tokens with `heads` query
// heads each. The keys that all its rows see are cut into segments; keys that only one token sees
// (the last ones, where tokens follow each other) make one more segment of that token alone. A work
// item is a segment; what it finds is joined per query row at the end. Segments follow from the
// shape alone, so results do not depend on the thread count.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "few_rows.h"
#include "flush_subnormals.h"
#include "parallel.h"
#include "scratch.h"

namespace longctx::cpu {

struct FewRowsJob {
  FewRowsShape shape;
  int64_t num_units = 0;
  int64_t num_tokens = 1;    // of a unit
  int64_t heads = 1;         // rows of a token; row t * heads + h is head h of token t
  int64_t num_segments = 1;  // of the keys that all rows of a unit see
  bool own_keys = false;     // tokens see keys of their own as well
  int64_t num_masses = 0;    // EntryMass of a row; 0: not wanted

  int64_t num_rows() const { return num_tokens * heads; }
  int64_t items_per_unit() const { return num_segments + (own_keys ? num_tokens : 0); }
  int64_t partials_per_row() const { return num_segments + (own_keys ? 1 : 0); }
};

// Segments of up to `num_keys` keys: long enough to hide their start, enough of them for threads.
inline int64_t choose_segments(int64_t num_keys, int64_t num_units) {
  constexpr int64_t kEnoughItems = 256;
  const int64_t by_length = (num_keys + kListKeys - 1) / kListKeys;
  const int64_t by_items = (kEnoughItems + num_units - 1) / std::max<int64_t>(num_units, 1);
  return std::max<int64_t>(std::min(by_length, by_items), 1);
}

// Source says which rows and keys there are, and where results go:
//   Keys keys(unit, segment): segments from num_segments on are the own keys of their tokens;
//   bool Keys::next(KeyList*): the next keys; false when none is left;
//   const void* query(unit, row);
//   FewRowsOutput output(unit, row);
// and, where FewRowsSource does not do:
//   const float* query_rope(unit, row): angles of the row's position; null: not rotated;
//   void reduce_masses(EntryMass* [num_units][num_rows][num_masses]): when all else is done.
struct FewRowsOutput {
  void* out;  // [head_dim_v]
  void* lse;  // float, or double for float64
  const float* sink = nullptr;
  // Of each segment alone, if wanted: segment i goes this many bytes behind segment 0.
  void* segment_out = nullptr;
  void* segment_lse = nullptr;
  int64_t segment_out_step = 0;
  int64_t segment_lse_step = 0;
};

struct FewRowsSource {
  const float* query_rope(int64_t, int64_t) const { return nullptr; }
  template <class T>
  void reduce_masses(const EntryMass<T>*) const {}
};

template <class T, class Source>
class FewRowsWorker {
 public:
  using Keys = typename Source::Keys;

  FewRowsWorker(const FewRowsEngine& engine, const FewRowsJob& job, const Source& source,
                char* partials, EntryMass<T>* masses)
      : engine_(engine),
        job_(job),
        source_(source),
        partials_(partials),
        masses_(masses),
        rows_(job.num_rows()),
        rope_(job.num_rows()),
        mass_rows_(job.num_rows()) {
    ScratchPlan plan;
    const size_t queries = plan.add<char>(engine.query_bytes(job.shape, job.num_rows()));
    const size_t state = plan.add<char>(engine.state_bytes(job.shape, job.num_rows()));
    const size_t work = plan.add<char>(engine.work_bytes(job.shape, job.num_rows()));
    const size_t lists = plan.add<KeyList>(2);
    char* base = static_cast<char*>(thread_scratch(plan.bytes()));
    queries_ = base + queries;
    state_ = base + state;
    work_ = base + work;
    list_ = reinterpret_cast<KeyList*>(base + lists);
    ahead_list_ = list_ + 1;
    std::uninitialized_default_construct_n(list_, 2);
  }
  FewRowsWorker(const FewRowsWorker&) = delete;
  FewRowsWorker& operator=(const FewRowsWorker&) = delete;

  // Items come in ascending order: the one `num_threads` further on is probably this thread's next,
  // so that its first keys can be prefetched while this one computes.
  void run(int64_t item, int64_t num_threads) {
    if (ahead_item_ != item) {
      look_ahead(item);
      prefetch_first();
    }
    std::swap(list_, ahead_list_);
    std::swap(keys_, ahead_keys_);
    ahead_item_ = -1;
    const int64_t unit = item / job_.items_per_unit();
    const int64_t segment = item % job_.items_per_unit();
    const int64_t token = segment - job_.num_segments;
    const int64_t first_row = token < 0 ? 0 : token * job_.heads;
    const int64_t num_rows = token < 0 ? job_.num_rows() : job_.heads;
    for (int64_t r = 0; r < num_rows; ++r) {
      rows_[r] = const_cast<void*>(source_.query(unit, first_row + r));
      rope_[r] = source_.query_rope(unit, first_row + r);
      mass_rows_[r] = masses_ + (unit * job_.num_rows() + first_row + r) * job_.num_masses;
    }
    engine_.pack_queries(job_.shape, rows_.data(), rope_.data(), num_rows, queries_);
    engine_.reset(job_.shape, num_rows, state_);
    for (bool more = list_->count > 0; more;) {
      more = keys_.next(ahead_list_);
      if (!more) look_ahead(item + num_threads);
      engine_.accumulate(job_.shape, num_rows, queries_, *list_,
                         ahead_list_->count > 0 ? ahead_list_ : nullptr,
                         job_.num_masses > 0 ? mass_rows_.data() : nullptr, work_, state_);
      if (more) std::swap(list_, ahead_list_);
    }
    for (int64_t r = 0; r < num_rows; ++r) {
      rows_[r] = partial(unit, first_row + r, std::min(segment, job_.num_segments));
    }
    engine_.store(job_.shape, num_rows, state_, rows_.data());
  }

  // Joins the segments of query row `row` of the whole job.
  void merge(int64_t row) {
    const int64_t unit = row / job_.num_rows();
    const int64_t r = row % job_.num_rows();
    const FewRowsOutput output = source_.output(unit, r);
    for (int64_t i = 0; output.segment_out != nullptr && i < job_.num_segments; ++i) {
      engine_.merge(job_.shape, partial(unit, r, i), PartialRow<T>::size(job_.shape.head_dim_v), 1,
                    nullptr, static_cast<char*>(output.segment_out) + i * output.segment_out_step,
                    static_cast<char*>(output.segment_lse) + i * output.segment_lse_step);
    }
    engine_.merge(job_.shape, partial(unit, r, 0), PartialRow<T>::size(job_.shape.head_dim_v),
                  job_.partials_per_row(), output.sink, output.out, output.lse);
  }

  static int64_t partial_bytes(const FewRowsJob& job) {
    return job.num_units * job.num_rows() * job.partials_per_row() *
           PartialRow<T>::size(job.shape.head_dim_v) * static_cast<int64_t>(sizeof(T));
  }

 private:
  // [num_units][num_rows][partials_per_row][PartialRow<T>::size]
  void* partial(int64_t unit, int64_t row, int64_t segment) const {
    const int64_t index = (unit * job_.num_rows() + row) * job_.partials_per_row() + segment;
    return partials_ + index * PartialRow<T>::size(job_.shape.head_dim_v) * sizeof(T);
  }

  // Fills the list ahead with the first keys of `item`.
  void look_ahead(int64_t item) {
    ahead_list_->count = 0;
    ahead_item_ = -1;
    if (item >= job_.num_units * job_.items_per_unit()) return;
    ahead_item_ = item;
    ahead_keys_ = source_.keys(item / job_.items_per_unit(), item % job_.items_per_unit());
    if (!ahead_keys_.next(ahead_list_)) ahead_list_->count = 0;
  }

  void prefetch_first() const {
    const FewRowsShape& shape = job_.shape;
    const int64_t size = shape.dtype == DType::kFloat64   ? 8
                         : shape.dtype == DType::kFloat32 ? 4
                                                          : 2;
    const auto prefetch = [](const void* row, int64_t bytes) {
      for (int64_t b = 0; b < bytes; b += 64) {
        __builtin_prefetch(static_cast<const char*>(row) + b, 0, 2);
      }
    };
    const bool scattered = ahead_list_->scattered;
    const int64_t keys = scattered ? kScatteredKeys : kPrefetchKeys;
    for (int64_t i = 0; i < std::min(ahead_list_->count, keys); ++i) {
      prefetch(ahead_list_->k_rows[i], shape.head_dim * size);
      if (scattered) prefetch(ahead_list_->v_rows[i], shape.head_dim_v * size);
    }
  }

  const FewRowsEngine& engine_;
  const FewRowsJob& job_;
  const Source& source_;
  char* partials_;
  EntryMass<T>* masses_;
  std::vector<void*> rows_;         // [num_rows]
  std::vector<const float*> rope_;  // [num_rows]
  std::vector<void*> mass_rows_;    // [num_rows]
  const FlushSubnormals flush_;
  char *queries_, *state_, *work_;
  KeyList *list_, *ahead_list_;
  Keys keys_, ahead_keys_;
  int64_t ahead_item_ = -1;
};

template <class T, class Source>
void run_few_rows_as(const FewRowsEngine& engine, const FewRowsJob& job, const Source& source) {
  using Worker = FewRowsWorker<T, Source>;
  const std::unique_ptr<char[]> partials(new char[Worker::partial_bytes(job)]);
  std::vector<EntryMass<T>> masses(job.num_units * job.num_rows() * job.num_masses);
  const int64_t num_threads = thread_pool().num_threads();
  const auto worker = [&] { return Worker(engine, job, source, partials.get(), masses.data()); };
  for_each_item(job.num_units * job.items_per_unit(), worker,
                [&](int64_t item, Worker& w) { w.run(item, num_threads); });
  for_each_item(job.num_units * job.num_rows(), worker,
                [](int64_t row, Worker& w) { w.merge(row); });
  if (job.num_masses > 0) source.reduce_masses(masses.data());
}

template <class Source>
void run_few_rows(const FewRowsJob& job, const Source& source) {
  if (job.num_rows() == 0) return;
  const FewRowsEngine& engine = choose_few_rows(job.shape.dtype, active_isa());
  if (job.shape.dtype == DType::kFloat64) return run_few_rows_as<double>(engine, job, source);
  run_few_rows_as<float>(engine, job, source);
}

}  // namespace longctx::cpu
