// The probabilities of attention, summed over the query rows: per key (or segment of keys) and per
// diagonal. Rows are counted from the sequence's last one backwards, so that a key's slot plus the
// lane of a row is their diagonal.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "dense_chunk.h"
#include "flush_subnormals.h"
#include "kernels.h"
#include "lane_kernels.h"
#include "longctx/mask.h"
#include "parallel.h"
#include "scratch.h"
#include "strip_mask.h"
#include "visit.h"

namespace longctx::cpu {
namespace {

constexpr int64_t kMassKeys = 128;  // keys of a chunk: their probabilities stay in the L1 cache
constexpr int64_t kPassStrips = 8;  // strips that share the packed keys of a chunk
constexpr int64_t kPassRows = kPassStrips * kStripRows;
constexpr int64_t kMaxHeads = 4;   // heads of a group that do so
constexpr int64_t kMinItems = 16;  // heads are split into key segments until there are as many
constexpr int64_t kTrackSize = kMassKeys + kPassRows;

int64_t heads_per_item(int64_t group_size) {
  int64_t heads = std::min(group_size, kMaxHeads);
  while (group_size % heads != 0) --heads;
  return heads;
}

struct Problem {
  const AttentionMassParams& p;
  StripShape shape;
  const StripEngine& engine;
  const LaneKernels& loops;
  int64_t heads;         // per item
  int64_t num_segments;  // of the key axis; the same for every thread count
  int64_t segment_keys;
  float* key_mass;       // [batch, num_q_heads, seqlen_k] or null
  float* diagonal_mass;  // [num_segments, batch, num_q_heads, num_diagonals] or null
};

class Worker {
 public:
  explicit Worker(const Problem& problem) : w_(problem), shape_(problem.shape) {
    query_bytes_ = (w_.engine.query_bytes(shape_) + 63) / 64 * 64;
    ScratchPlan plan;
    const size_t queries = plan.add<char>(query_bytes_ * w_.heads * kPassStrips);
    const size_t packed = plan.add<char>(w_.engine.chunk_bytes(shape_));
    const size_t tile = plan.add<double>(kMassKeys * kStripRows);
    const size_t sums = plan.add<float>(kMassKeys * kTracks);
    const size_t tracks = plan.add<float>(kTracks * kTrackSize);
    const size_t diagonals = plan.add<float>(kTrackSize + kTracks);
    const size_t lse = plan.add<double>(w_.heads * kPassRows);
    const size_t masks = plan.add<StripMask>(kPassStrips);
    const size_t chunk_masks = plan.add<ChunkMask>(kPassStrips);
    const size_t chunks = plan.add<KeyChunk>(2);
    char* base = static_cast<char*>(thread_scratch(plan.bytes()));
    queries_ = base + queries;
    packed_ = base + packed;
    tile_ = base + tile;
    sums_ = reinterpret_cast<float*>(base + sums);
    tracks_ = reinterpret_cast<float*>(base + tracks);
    diagonals_ = reinterpret_cast<float*>(base + diagonals);
    lse_ = base + lse;
    masks_ = reinterpret_cast<StripMask*>(base + masks);
    chunk_masks_ = reinterpret_cast<ChunkMask*>(base + chunk_masks);
    chunk_ = reinterpret_cast<KeyChunk*>(base + chunks);
    next_ = chunk_ + 1;
    w_.engine.begin_thread();
  }
  ~Worker() { w_.engine.end_thread(); }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  void run(int64_t sequence, int64_t first_head, int64_t segment) {
    seq_ = sequence_at(w_.p.seqs, sequence);
    first_head_ = first_head;
    segment_ = segment;
    const Interval keys{segment * w_.segment_keys,
                        std::min((segment + 1) * w_.segment_keys, seq_.k_len)};
    for (int64_t first = 0; first < seq_.q_len; first += kPassRows) {
      const int64_t num_rows = std::min(kPassRows, seq_.q_len - first);
      visible_union(w_.p.mask, seq_, seq_.q_len - first - num_rows, seq_.q_len - first, visible_);
      if (visible_.empty()) continue;
      const Interval seen{std::max(keys.begin, visible_.front().begin),
                          std::min(keys.end, visible_.back().end)};
      if (seen.begin >= seen.end) continue;
      load_rows(first, num_rows);
      set_chunk(next_, seen.begin, seen.end);
      for (int64_t key = seen.begin; key < seen.end; key += kMassKeys) {
        std::swap(chunk_, next_);
        set_chunk(next_, key + kMassKeys, seen.end);
        visit_chunk(key);
      }
    }
  }

 private:
  // Row `backwards` of the sequence, counted from its last.
  int64_t row_of(int64_t backwards) const { return seq_.q_len - 1 - backwards; }
  int lanes(int64_t strip) const {
    return static_cast<int>(std::min<int64_t>(kStripRows, num_rows_ - strip * kStripRows));
  }
  void* queries(int64_t head, int64_t strip) const {
    return queries_ + (head * kPassStrips + strip) * query_bytes_;
  }
  int64_t lse_bytes() const { return w_.p.dtype == DType::kFloat64 ? 8 : 4; }

  // Packs the queries, masks and lse of the rows [first, first + num_rows) of every head.
  void load_rows(int64_t first, int64_t num_rows) {
    first_backwards_ = first;
    num_rows_ = num_rows;
    num_strips_ = (num_rows + kStripRows - 1) / kStripRows;
    const int64_t size = element_bytes(w_.p.dtype);
    for (int64_t strip = 0; strip < num_strips_; ++strip) {
      int64_t rows[kStripRows];
      for (int lane = 0; lane < lanes(strip); ++lane) {
        rows[lane] = row_of(first + strip * kStripRows + lane);
      }
      masks_[strip].init(w_.p.mask, seq_, rows, lanes(strip));
      for (int64_t h = 0; h < w_.heads; ++h) {
        const void* q_rows[kStripRows];
        for (int lane = 0; lane < lanes(strip); ++lane) {
          q_rows[lane] = row_address(w_.p.q, size, seq_.batch_index, first_head_ + h,
                                     seq_.q_begin + rows[lane]);
        }
        w_.engine.pack_queries(shape_, q_rows, lanes(strip), queries(h, strip));
        for (int lane = 0; lane < kStripRows; ++lane) {
          load_lse(h, strip * kStripRows + lane, lane < lanes(strip) ? rows[lane] : -1);
        }
      }
    }
  }

  // The log of a row's softmax denominator; -inf for padding, which gives probability 0.
  void load_lse(int64_t h, int64_t index, int64_t row) {
    const int64_t head = first_head_ + h;
    const auto load = [&](auto* target, const auto* source) {
      using T = std::decay_t<decltype(*target)>;
      T lse = -std::numeric_limits<T>::infinity();
      if (row >= 0) {
        lse = source[(seq_.batch_index * w_.p.num_q_heads + head) * w_.p.seqs.seqlen_q +
                     seq_.q_begin + row];
      }
      if (w_.p.sinks != nullptr && lse > -std::numeric_limits<T>::infinity()) {
        const T sink = w_.p.sinks[head];
        const T top = std::max(lse, sink);
        lse = top + std::log(std::exp(lse - top) + std::exp(sink - top));
      }
      target[h * kPassRows + index] = lse;
    };
    if (w_.p.dtype == DType::kFloat64) {
      load(reinterpret_cast<double*>(lse_), static_cast<const double*>(w_.p.lse));
    } else {
      load(reinterpret_cast<float*>(lse_), static_cast<const float*>(w_.p.lse));
    }
  }

  // The first keys of [key, end); empty behind its end.
  void set_chunk(KeyChunk* chunk, int64_t key, int64_t end) const {
    const int64_t size = element_bytes(w_.p.dtype);
    const int64_t kv_head = first_head_ * w_.p.num_kv_heads / w_.p.num_q_heads;
    set_dense_chunk(chunk, row_address(w_.p.k, size, seq_.batch_index, kv_head, seq_.k_begin + key),
                    w_.p.k.seq_stride, size, key, clamp_index(end - key, 0, kMassKeys));
  }

  void visit_chunk(int64_t key) {
    bool any = false;
    for (int64_t strip = 0; strip < num_strips_; ++strip) {
      strip_seen_[strip] = masks_[strip].apply(*chunk_, &chunk_masks_[strip]);
      any |= strip_seen_[strip];
    }
    if (!any) return;
    w_.engine.pack_chunk(shape_, *chunk_, false, packed_);
    for (int64_t h = 0; h < w_.heads; ++h) visit_head(h, key);
  }

  void visit_head(int64_t h, int64_t key) {
    const int64_t count = chunk_->num_keys;
    const int64_t num_slots = chunk_->num_slots();
    if (w_.key_mass != nullptr) std::fill_n(sums_, num_slots * kTracks, 0.0f);
    const int64_t track_elements = num_slots + num_strips_ * kStripRows - kTracks;
    for (int t = 0; t < kTracks && w_.diagonal_mass != nullptr; ++t) {
      std::fill_n(tracks_ + t * kTrackSize, track_elements, 0.0f);
    }
    for (int64_t strip = 0; strip < num_strips_; ++strip) {
      if (!strip_seen_[strip]) continue;
      // Each strip of each head fetches its share of the next chunk.
      const int64_t share = h * num_strips_ + strip, num_shares = w_.heads * num_strips_;
      chunk_->upcoming = {next_, next_->num_keys * share / num_shares,
                          next_->num_keys * (share + 1) / num_shares};
      // p = exp(q k^T - lse)
      w_.engine.probabilities(shape_, queries(h, strip), *chunk_, packed_, chunk_masks_[strip],
                              lse_ + (h * kPassRows + strip * kStripRows) * lse_bytes(), tile_);
      const float* p_t = as_float(w_.p.dtype, tile_, num_slots * kStripRows);
      if (w_.key_mass != nullptr) w_.loops.add_lanes(p_t, num_slots, sums_);
      if (w_.diagonal_mass != nullptr) {
        w_.loops.add_tracks(p_t, num_slots, tracks_ + strip * kStripRows, kTrackSize);
      }
    }
    const int64_t map = seq_.batch_index * w_.p.num_q_heads + first_head_ + h;
    if (w_.key_mass != nullptr) {
      float* mass = w_.key_mass + map * w_.p.seqs.seqlen_k + seq_.k_begin + key;
      for (int64_t slot = 0; slot < count; ++slot) {
        float sum = 0.0f;
        for (int i = 0; i < kTracks; ++i) sum += sums_[slot * kTracks + i];
        mass[slot] += sum;
      }
    }
    if (w_.diagonal_mass != nullptr) {
      std::fill_n(diagonals_, kTrackSize + kTracks, 0.0f);
      w_.loops.sum_tracks(tracks_, kTrackSize, track_elements, diagonals_);
      const int64_t maps = w_.p.seqs.batch * w_.p.num_q_heads;
      float* mass = w_.diagonal_mass + (segment_ * maps + map) * w_.p.num_diagonals + seq_.q_begin +
                    seq_.k_begin + key + first_backwards_;
      for (int64_t i = 0; i < count + num_rows_ - 1; ++i) mass[i] += diagonals_[i];
    }
  }

  const Problem& w_;
  const FlushSubnormals flush_;
  const StripShape& shape_;
  int64_t query_bytes_;
  char *queries_, *packed_, *tile_, *lse_;
  float *sums_, *tracks_, *diagonals_;
  StripMask* masks_;
  ChunkMask* chunk_masks_;
  KeyChunk *chunk_, *next_;
  bool strip_seen_[kPassStrips];
  std::vector<Interval> visible_;

  Sequence seq_;
  int64_t first_head_ = 0, segment_ = 0, first_backwards_ = 0, num_rows_ = 0, num_strips_ = 0;
};

// mass[segment] = the sum over the segment's keys.
void sum_segments(const AttentionMassParams& p, const float* key_mass) {
  const int64_t maps = p.seqs.batch * p.num_q_heads;
  for_each_item(
      maps, [] { return 0; },
      [&](int64_t map, int) {
        const float* keys = key_mass + map * p.seqs.seqlen_k;
        for (int64_t s = 0; s < p.num_segments; ++s) {
          const int64_t begin = clamp_index(p.segment_offsets[s], 0, p.seqs.seqlen_k);
          const int64_t end = clamp_index(p.segment_offsets[s + 1], begin, p.seqs.seqlen_k);
          double sum = 0.0;
          for (int64_t key = begin; key < end; ++key) sum += keys[key];
          p.key_mass[map * p.num_segments + s] = static_cast<float>(sum);
        }
      });
}

}  // namespace

void run_attention_mass_cpu(const AttentionMassParams& p) {
  constexpr double kLog2E = 1.4426950408889634;
  StripShape shape;
  shape.dtype = p.dtype;
  shape.head_dim = p.head_dim;
  shape.scale_log2 = static_cast<float>(p.softmax_scale * kLog2E);
  shape.softmax_scale = p.softmax_scale;
  shape.softcap = p.softcap;
  const int64_t maps = p.seqs.batch * p.num_q_heads;
  const int64_t heads = heads_per_item(p.num_q_heads / p.num_kv_heads);
  const int64_t head_items = p.seqs.num_seqs * (p.num_q_heads / heads);
  const int64_t chunks = (p.seqs.seqlen_k + kMassKeys - 1) / kMassKeys;
  const int64_t segments =
      head_items == 0 ? 1 : clamp_index((kMinItems + head_items - 1) / head_items, 1, chunks);
  const int64_t segment_chunks = segments == 0 ? 0 : (chunks + segments - 1) / segments;

  std::vector<float> keys(p.segment_offsets == nullptr || p.key_mass == nullptr
                              ? 0
                              : static_cast<size_t>(maps * p.seqs.seqlen_k));
  std::vector<float> partial(p.diagonal_mass == nullptr || segments <= 1
                                 ? 0
                                 : static_cast<size_t>(segments * maps * p.num_diagonals));
  const Problem problem{p,
                        shape,
                        choose_engine(p.dtype, active_isa()),
                        choose_lane_kernels(active_isa()),
                        heads,
                        segments,
                        segment_chunks * kMassKeys,
                        keys.empty() ? p.key_mass : keys.data(),
                        partial.empty() ? p.diagonal_mass : partial.data()};
  if (p.key_mass != nullptr) {
    std::fill_n(problem.key_mass, maps * p.seqs.seqlen_k, 0.0f);
  }
  if (p.diagonal_mass != nullptr) {
    std::fill_n(problem.diagonal_mass, std::max<int64_t>(segments, 1) * maps * p.num_diagonals,
                0.0f);
  }
  const int64_t heads_of_item = p.num_q_heads / heads;
  for_each_item(
      head_items * segments, [&] { return Worker(problem); },
      [&](int64_t item, Worker& worker) {
        const int64_t head_item = item % head_items;
        worker.run(head_item / heads_of_item, head_item % heads_of_item * heads, item / head_items);
      });
  if (p.segment_offsets != nullptr && p.key_mass != nullptr) sum_segments(p, problem.key_mass);
  if (!partial.empty()) {
    const int64_t count = maps * p.num_diagonals;
    for (int64_t i = 0; i < count; ++i) {
      float sum = 0.0f;
      for (int64_t s = 0; s < segments; ++s) sum += partial[static_cast<size_t>(s * count + i)];
      p.diagonal_mass[i] = sum;
    }
  }
}

}  // namespace longctx::cpu
