// attention and block_sparse_attention on the CPU: flash attention (Dao et al., 2022) over the key
// tiles that a query block visits.
// A work item is a block of query rows and those heads of one kv head that visit the same keys. Its
// (head, row) pairs fill strips, its keys come in chunks, and each chunk is packed once for all
// strips. Items own their rows, so results do not depend on the thread count.
#include <cstring>
#include <limits>
#include <memory>

#include "attention_few_rows.h"
#include "flush_subnormals.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "strip_mask.h"
#include "visit.h"

namespace longctx::cpu {
namespace {

// Strips of an item: enough to share a packed chunk, few enough that their states stay in L2.
constexpr int64_t kMaxStrips = 16;

int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Item {
  int64_t sequence;
  int64_t q_block;   // within the sequence
  int64_t list_row;  // of the block list
  int64_t first_head;
  int64_t weight;  // about how many keys it visits
};

struct Problem {
  const AttentionParams& params;
  const BlockList* blocks;  // null: dense
  const StripEngine& engine;
  const StripShape& shape;
  int64_t block_rows = 0;      // query rows of an item
  int64_t heads_per_item = 1;  // query heads of an item; divides the group
  int64_t num_threads = 1;
  std::vector<Item> items;  // heavy ones first

  int64_t strips() const { return ceil_div(block_rows * heads_per_item, kStripRows); }
  char* element(const TensorView& view, int64_t batch, int64_t head, int64_t row) const {
    return static_cast<char*>(view.data) +
           (batch * view.batch_stride + head * view.head_stride + row * view.seq_stride) *
               element_size(params.dtype);
  }
  size_t lse_size() const { return params.dtype == DType::kFloat64 ? 8 : 4; }
  char* lse_at(int64_t batch, int64_t head, int64_t row) const {
    const int64_t index = (batch * params.num_q_heads + head) * params.seqs.seqlen_q + row;
    return static_cast<char*>(params.lse) + index * static_cast<int64_t>(lse_size());
  }
};

// Rows of the query axis that belong to no sequence: out = 0, lse = -inf.
void fill_unowned_rows(const Problem& problem) {
  const AttentionParams& p = problem.params;
  const int32_t* offsets = p.seqs.cu_seqlens_q;
  if (offsets == nullptr) return;
  bool partition = offsets[0] == 0 && offsets[p.seqs.num_seqs] == p.seqs.seqlen_q;
  for (int64_t s = 0; s < p.seqs.num_seqs; ++s) partition &= offsets[s] <= offsets[s + 1];
  if (partition) return;
  for (int64_t head = 0; head < p.num_q_heads; ++head) {
    for (int64_t row = 0; row < p.seqs.seqlen_q; ++row) {
      std::memset(problem.element(p.out, 0, head, row), 0, p.head_dim_v * element_size(p.dtype));
      char* lse = problem.lse_at(0, head, row);
      if (p.dtype == DType::kFloat64) {
        *reinterpret_cast<double*>(lse) = -std::numeric_limits<double>::infinity();
      } else {
        *reinterpret_cast<float*>(lse) = -std::numeric_limits<float>::infinity();
      }
    }
  }
}

int64_t count_visible(const RowMask& row) {
  const auto length = [](const Interval& i) { return std::max<int64_t>(i.end - i.begin, 0); };
  return std::min(length(row.window) + length(row.sinks),
                  length(row.ranges[0]) + length(row.ranges[1]));
}

void make_items(Problem& problem) {
  const AttentionParams& p = problem.params;
  int64_t list_row = 0;
  for (int64_t s = 0; s < p.seqs.num_seqs; ++s) {
    const Sequence seq = sequence_at(p.seqs, s);
    const int64_t num_blocks = ceil_div(seq.q_len, problem.block_rows);
    if (p.seqs.cu_seqlens_q == nullptr) list_row = 0;
    for (int64_t block = 0; block < num_blocks; ++block, ++list_row) {
      const int64_t last = std::min((block + 1) * problem.block_rows, seq.q_len) - 1;
      const int64_t visible = count_visible(row_mask(p.mask, seq, last));
      for (int64_t head = 0; head < p.num_q_heads; head += problem.heads_per_item) {
        int64_t weight = visible;
        if (problem.blocks != nullptr) {
          const BlockRow row =
              block_row(*problem.blocks, seq.batch_index,
                        pattern_head(*problem.blocks, head, p.num_q_heads), list_row);
          weight = (row.end - row.begin) * problem.blocks->block_size_k;
        }
        problem.items.push_back({s, block, list_row, head, weight});
      }
    }
  }
  // Weights count in powers of two: within one, a head's items follow each other and find its keys
  // in the cache.
  const auto magnitude = [](int64_t weight) {
    int bits = 0;
    for (; weight > 0; weight /= 2) ++bits;
    return bits;
  };
  std::stable_sort(problem.items.begin(), problem.items.end(), [&](const Item& a, const Item& b) {
    const int ma = magnitude(a.weight), mb = magnitude(b.weight);
    if (ma != mb) return ma > mb;
    if (a.sequence != b.sequence) return a.sequence < b.sequence;
    if (a.first_head != b.first_head) return a.first_head < b.first_head;
    return a.q_block > b.q_block;
  });
}

// What one thread keeps while it works off items.
class Worker {
 public:
  explicit Worker(const Problem& problem)
      : problem_(problem), engine_(problem.engine), shape_(problem.shape) {
    query_stride_ = round_up(engine_.query_bytes(shape_));
    state_stride_ = round_up(engine_.state_bytes(shape_));
    const int64_t strips = problem.strips();
    ScratchPlan plan;
    const size_t queries = plan.add<char>(query_stride_ * strips);
    const size_t states = plan.add<char>(state_stride_ * strips);
    const size_t packed = plan.add<char>(engine_.chunk_bytes(shape_));
    const size_t masks = plan.add<StripMask>(strips);
    const size_t chunks = plan.add<KeyChunk>(2);
    char* base = static_cast<char*>(thread_scratch(plan.bytes()));
    queries_ = base + queries;
    states_ = base + states;
    packed_ = base + packed;
    masks_ = reinterpret_cast<StripMask*>(base + masks);
    chunk_ = reinterpret_cast<KeyChunk*>(base + chunks);
    next_ = chunk_ + 1;
    std::uninitialized_default_construct_n(masks_, strips);
    std::uninitialized_default_construct_n(chunk_, 2);
    engine_.begin_thread();
  }
  ~Worker() { engine_.end_thread(); }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // Items come in ascending order: the one `num_threads` further on is probably this thread's next,
  // so that its first keys can be prefetched while this one computes.
  void run(int64_t index) {
    if (upcoming_.index != index) {
      open(index);
      std::swap(chunk_, next_);
    }
    std::swap(current_, upcoming_);
    upcoming_.index = -1;
    start(problem_.items[index]);
    for (bool more = current_.any; more; std::swap(chunk_, next_)) {
      more = current_.source.next(next_);
      bool next_known = more;
      if (!more) next_known = open(index + problem_.num_threads);
      visit(*chunk_, next_known ? next_ : nullptr);
    }
    write_out();
  }

 private:
  static int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  void* queries(int64_t strip) { return queries_ + strip * query_stride_; }
  void* state(int64_t strip) { return states_ + strip * state_stride_; }

  // Pair i of the item is row i % num_rows of head i / num_rows; 32 pairs make a strip.
  int64_t head_of(int64_t pair) const { return first_head_ + pair / num_rows_; }
  int64_t row_of(int64_t pair) const { return row_begin_ + pair % num_rows_; }
  int lanes(int64_t strip) const {
    return static_cast<int>(std::min<int64_t>(kStripRows, num_pairs_ - strip * kStripRows));
  }

  // The keys of an item.
  struct Visit {
    int64_t index = -1;
    bool any = false;
    std::vector<Interval> visible;
    ChunkSource source;
  };

  // Makes item `index` the upcoming one and fills `next_` with its first keys; false if it has
  // none.
  bool open(int64_t index) {
    upcoming_.any = false;
    if (index >= static_cast<int64_t>(problem_.items.size())) return false;
    const AttentionParams& p = problem_.params;
    const Item& item = problem_.items[index];
    const Sequence seq = sequence_at(p.seqs, item.sequence);
    const int64_t row_begin = item.q_block * problem_.block_rows;
    const int64_t row_end = std::min(row_begin + problem_.block_rows, seq.q_len);
    const int64_t kv_head = item.first_head * p.num_kv_heads / p.num_q_heads;
    const KeyRows rows{problem_.element(p.k, seq.batch_index, kv_head, seq.k_begin),
                       problem_.element(p.v, seq.batch_index, kv_head, seq.k_begin), p.k.seq_stride,
                       p.v.seq_stride, element_size(p.dtype)};
    visible_union(p.mask, seq, row_begin, row_end, upcoming_.visible);
    KeyRuns runs(upcoming_.visible, seq.k_len);
    if (problem_.blocks != nullptr) {
      const int64_t head = pattern_head(*problem_.blocks, item.first_head, p.num_q_heads);
      runs = KeyRuns(upcoming_.visible, seq.k_len,
                     block_row(*problem_.blocks, seq.batch_index, head, item.list_row),
                     problem_.blocks->block_size_k);
    }
    upcoming_.index = index;
    upcoming_.source = ChunkSource(runs, rows);
    upcoming_.any = upcoming_.source.next(next_);
    return upcoming_.any;
  }

  void start(const Item& item) {
    const AttentionParams& p = problem_.params;
    seq_ = sequence_at(p.seqs, item.sequence);
    row_begin_ = item.q_block * problem_.block_rows;
    num_rows_ = std::min(problem_.block_rows, seq_.q_len - row_begin_);
    first_head_ = item.first_head;
    num_pairs_ = num_rows_ * problem_.heads_per_item;
    num_strips_ = ceil_div(num_pairs_, kStripRows);
    for (int64_t strip = 0; strip < num_strips_; ++strip) {
      const void* q_rows[kStripRows];
      int64_t rows[kStripRows];
      for (int lane = 0; lane < lanes(strip); ++lane) {
        const int64_t pair = strip * kStripRows + lane;
        rows[lane] = row_of(pair);
        q_rows[lane] =
            problem_.element(p.q, seq_.batch_index, head_of(pair), seq_.q_begin + rows[lane]);
      }
      engine_.pack_queries(shape_, q_rows, lanes(strip), queries(strip));
      engine_.reset(shape_, state(strip));
      masks_[strip].init(p.mask, seq_, rows, lanes(strip));
    }
  }

  void visit(KeyChunk& chunk, const KeyChunk* next) {
    engine_.pack_chunk(shape_, chunk, true, packed_);
    const int64_t next_slots = next == nullptr ? 0 : next->num_slots();
    for (int64_t strip = 0; strip < num_strips_; ++strip) {
      chunk.upcoming = {next, next_slots * strip / num_strips_,
                        next_slots * (strip + 1) / num_strips_};
      if (!masks_[strip].apply(chunk, &chunk_mask_)) continue;
      engine_.accumulate(shape_, queries(strip), chunk, packed_, chunk_mask_, state(strip));
    }
  }

  void write_out() {
    const AttentionParams& p = problem_.params;
    for (int64_t strip = 0; strip < num_strips_; ++strip) {
      void* out_rows[kStripRows];
      float sinks[kStripRows];
      alignas(64) double lse[kStripRows];  // of float or double
      for (int lane = 0; lane < lanes(strip); ++lane) {
        const int64_t pair = strip * kStripRows + lane;
        out_rows[lane] =
            problem_.element(p.out, seq_.batch_index, head_of(pair), seq_.q_begin + row_of(pair));
        if (p.sinks != nullptr) sinks[lane] = p.sinks[head_of(pair)];
      }
      engine_.finish(shape_, state(strip), p.sinks == nullptr ? nullptr : sinks, lanes(strip),
                     out_rows, lse);
      for (int lane = 0; lane < lanes(strip); ++lane) {
        const int64_t pair = strip * kStripRows + lane;
        std::memcpy(problem_.lse_at(seq_.batch_index, head_of(pair), seq_.q_begin + row_of(pair)),
                    reinterpret_cast<const char*>(lse) + lane * problem_.lse_size(),
                    problem_.lse_size());
      }
    }
  }

  const Problem& problem_;
  const StripEngine& engine_;
  const FlushSubnormals flush_;
  const StripShape& shape_;
  int64_t query_stride_, state_stride_;
  char *queries_, *states_, *packed_;
  StripMask* masks_;
  KeyChunk *chunk_, *next_;
  ChunkMask chunk_mask_;
  Visit current_, upcoming_;

  Sequence seq_;
  int64_t row_begin_ = 0, num_rows_ = 0, first_head_ = 0, num_pairs_ = 0, num_strips_ = 0;
};

// The largest divisor of the group that keeps an item within kMaxStrips.
int64_t heads_for(int64_t group_size, int64_t block_rows) {
  for (int64_t heads = group_size; heads > 1; --heads) {
    if (group_size % heads == 0 && heads * block_rows <= kMaxStrips * kStripRows) return heads;
  }
  return 1;
}

// Dense attention may choose its query blocks: large ones share the packed keys among many rows,
// as long as every thread still gets several items.
int64_t choose_block_rows(const AttentionParams& p, int64_t group_size) {
  int64_t rows = std::max<int64_t>(kMaxStrips * kStripRows / group_size, kStripRows);
  rows = rows / kStripRows * kStripRows;
  const auto items = [&] {
    return p.num_kv_heads * (p.seqs.num_seqs + ceil_div(p.seqs.batch * p.seqs.seqlen_q, rows));
  };
  while (rows >= 4 * kStripRows && items() < 8 * thread_pool().num_threads()) rows /= 2;
  return rows;
}

void run_items(const AttentionParams& p, const BlockList* blocks) {
  if (p.num_q_heads == 0 || p.seqs.seqlen_q == 0) return;
  constexpr double kLog2E = 1.4426950408889634;
  const StripShape shape{p.dtype,         p.head_dim,
                         p.head_dim_v,    static_cast<float>(p.softmax_scale * kLog2E),
                         p.softmax_scale, p.softcap};
  Problem problem{p, blocks, choose_engine(p.dtype, active_isa()), shape, 0, 1, 1, {}};
  const int64_t group_size = p.num_q_heads / p.num_kv_heads;
  problem.block_rows = blocks == nullptr ? choose_block_rows(p, group_size) : blocks->block_size_q;
  const bool shared = blocks == nullptr || blocks->pattern_heads <= p.num_kv_heads;
  problem.heads_per_item = shared ? heads_for(group_size, problem.block_rows) : 1;
  problem.num_threads = thread_pool().num_threads();
  fill_unowned_rows(problem);
  make_items(problem);
  for_each_item(
      static_cast<int64_t>(problem.items.size()), [&] { return Worker(problem); },
      [&](int64_t item, Worker& worker) { worker.run(item); });
}

}  // namespace

void run_attention_cpu(const AttentionParams& params) {
  if (has_few_rows(params)) return run_attention_few_rows(params);
  run_items(params, nullptr);
}

void run_block_sparse_attention_cpu(const BlockSparseAttentionParams& params) {
  run_items(params, &params.blocks);
}

}  // namespace longctx::cpu
