// Block scores from antidiagonals (XAttention, arXiv 2503.16428): `stride` neighbouring queries in
// reverse order and `stride` neighbouring keys are one long row each, whose product is the sum over
// an antidiagonal of their square. So [n / stride, stride * head_dim] products replace q k^T, at
// 1 / stride of its cost; their softmax is summed per block as it goes by.
#include <algorithm>
#include <cstring>
#include <limits>

#include "block_scores.h"
#include "dense_chunk.h"
#include "flush_subnormals.h"
#include "longctx/mask.h"
#include "parallel.h"
#include "scratch.h"

namespace longctx::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kPassStrips = 8;                 // strips that share the packed keys of a chunk
constexpr int64_t kChunkBytes = int64_t{1} << 18;  // long rows: a full chunk would leave the L2

class Worker {
 public:
  Worker(const BlockScoresParams& p, const std::vector<SequenceMap>& maps)
      : p_(p),
        maps_(maps),
        engine_(choose_engine(p.dtype, active_isa())),
        loops_(choose_lane_kernels(active_isa())),
        element_size_(element_bytes(p.dtype)),
        dim_(p.stride * p.head_dim),
        block_groups_(p.map.block_size_k / p.stride) {
    shape_.dtype = p.dtype;
    shape_.head_dim = dim_;
    shape_.softmax_scale = p.softmax_scale / static_cast<double>(p.stride);
    shape_.scale_log2 = static_cast<float>(shape_.softmax_scale * 1.4426950408889634);
    chunk_groups_ = std::max<int64_t>(kKeyTile, block_groups_);
    while (2 * chunk_groups_ <= kChunkKeys &&
           2 * chunk_groups_ * dim_ * element_size_ <= kChunkBytes) {
      chunk_groups_ *= 2;
    }
    int64_t columns = 0;
    for (const SequenceMap& map : maps) columns = std::max(columns, map.num_columns);
    state_size_ = (columns + 1) * kStripRows;
    query_bytes_ = (engine_.query_bytes(shape_) + 63) / 64 * 64;
    ScratchPlan plan;
    const size_t queries = plan.add<char>(query_bytes_ * kPassStrips);
    const size_t packed = plan.add<char>(engine_.chunk_bytes(shape_));
    const size_t q_rows = plan.add<char>(kStripRows * dim_ * element_size_);
    const size_t k_rows = plan.add<char>(chunk_groups_ * dim_ * element_size_);
    const size_t tile = plan.add<double>(kChunkKeys * kStripRows);
    const size_t maxima = plan.add<float>(kPassStrips * state_size_);
    const size_t sums = plan.add<float>(kPassStrips * state_size_);
    const size_t chunk = plan.add<KeyChunk>(1);
    char* base = static_cast<char*>(thread_scratch(plan.bytes()));
    queries_ = base + queries;
    packed_ = base + packed;
    q_rows_ = base + q_rows;
    k_rows_ = base + k_rows;
    tile_ = base + tile;
    maxima_ = reinterpret_cast<float*>(base + maxima);
    sums_ = reinterpret_cast<float*>(base + sums);
    chunk_ = reinterpret_cast<KeyChunk*>(base + chunk);
    engine_.begin_thread();
  }
  ~Worker() { engine_.end_thread(); }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // Query groups [first, first + kPassStrips * kStripRows): whole rows of the map.
  void run(int64_t sequence, int64_t head, int64_t first) {
    map_ = &maps_[static_cast<size_t>(sequence)];
    head_ = head;
    first_ = first;
    q_groups_ = groups(map_->seq.q_len);
    k_groups_ = groups(map_->seq.k_len);
    const int64_t num_groups = std::min(kPassStrips * kStripRows, q_groups_ - first);
    for (int64_t strip = 0; strip * kStripRows < num_groups; ++strip) pack_strip(strip);
    const int64_t limit = num_seen(first + num_groups - 1);
    for (int64_t group = 0; group < limit; group += chunk_groups_) {
      const int64_t count = std::min(chunk_groups_, k_groups_ - group);
      load_keys(group, count);
      for (int64_t strip = 0; strip * kStripRows < num_groups; ++strip) {
        if (group < num_seen(last_group(strip))) add_chunk(strip, group, count);
      }
    }
    for (int64_t strip = 0; strip * kStripRows < num_groups; ++strip) write_strip(strip);
  }

 private:
  int64_t groups(int64_t length) const { return (length + p_.stride - 1) / p_.stride; }
  int64_t q_count(int64_t group) const {
    return std::min(p_.stride, map_->seq.q_len - group * p_.stride);
  }
  int64_t k_count(int64_t group) const {
    return std::min(p_.stride, map_->seq.k_len - group * p_.stride);
  }
  int64_t last_group(int64_t strip) const {
    return std::min(first_ + (strip + 1) * kStripRows, q_groups_) - 1;
  }
  // Query group `group` sees key groups [0, num_seen).
  int64_t num_seen(int64_t group) const {
    if (!p_.map.causal) return k_groups_;
    const int64_t last = map_->first_position + group * p_.stride + q_count(group) - 1;
    return last < 0 ? 0 : std::min(last / p_.stride + 1, k_groups_);
  }
  float* maxima(int64_t strip) const { return maxima_ + strip * state_size_; }
  float* sums(int64_t strip) const { return sums_ + strip * state_size_; }

  // Long rows of reversed queries; what a short group lacks is zero.
  void pack_strip(int64_t strip) {
    const void* rows[kStripRows];
    int lanes = 0;
    for (int64_t g = first_ + strip * kStripRows; g <= last_group(strip); ++g, ++lanes) {
      char* row = q_rows_ + lanes * dim_ * element_size_;
      rows[lanes] = row;
      const int64_t row_bytes = p_.head_dim * element_size_;
      for (int64_t i = 0; i < p_.stride; ++i, row += row_bytes) {
        const int64_t query = g * p_.stride + q_count(g) - 1 - i;
        if (i < q_count(g)) {
          std::memcpy(row,
                      row_address(p_.q, element_size_, map_->seq.batch_index, head_,
                                  map_->seq.q_begin + query),
                      row_bytes);
        } else {
          std::memset(row, 0, row_bytes);
        }
      }
    }
    engine_.pack_queries(shape_, rows, lanes, queries_ + strip * query_bytes_);
  }

  void load_keys(int64_t group, int64_t count) {
    const int64_t kv_head = head_ * p_.num_kv_heads / p_.num_q_heads;
    const auto key = [&](int64_t i) {
      return row_address(p_.k, element_size_, map_->seq.batch_index, kv_head,
                         map_->seq.k_begin + group * p_.stride + i);
    };
    const char* rows = key(0);
    const int64_t num_keys = std::min(count * p_.stride, map_->seq.k_len - group * p_.stride);
    if (p_.k.seq_stride != p_.head_dim || num_keys < count * p_.stride) {
      const int64_t row_bytes = p_.head_dim * element_size_;
      for (int64_t i = 0; i < num_keys; ++i)
        std::memcpy(k_rows_ + i * row_bytes, key(i), row_bytes);
      std::memset(k_rows_ + num_keys * row_bytes, 0, (count * p_.stride - num_keys) * row_bytes);
      rows = k_rows_;
    }
    set_dense_chunk(chunk_, rows, dim_, element_size_, group, count);
    engine_.pack_chunk(shape_, *chunk_, false, packed_);
  }

  void add_chunk(int64_t strip, int64_t group, int64_t count) {
    engine_.scores(shape_, queries_ + strip * query_bytes_, *chunk_, packed_, tile_);
    float* s_t = as_float(p_.dtype, tile_, chunk_->num_slots() * kStripRows);
    const int64_t first = first_ + strip * kStripRows;
    const int lanes = static_cast<int>(last_group(strip) - first + 1);
    correct_short_groups(first, lanes, group, count, s_t);
    // mask, up to the end of the last block; sums leave -inf out
    const int64_t blocks = (count + block_groups_ - 1) / block_groups_;
    const float hidden = p_.softmax ? -kInf : 0.0f;
    for (int lane = 0; lane < kStripRows; ++lane) {
      const int64_t seen = lane < lanes ? clamp_index(num_seen(first + lane) - group, 0, count) : 0;
      for (int64_t i = seen; i < blocks * block_groups_; ++i) s_t[i * kStripRows + lane] = hidden;
    }
    const int64_t state = group / block_groups_ * kStripRows;
    if (p_.softmax) {
      loops_.softmax_groups(s_t, blocks, block_groups_, maxima(strip) + state, sums(strip) + state);
      return;
    }
    float* totals = sums(strip) + state;
    std::fill_n(totals, blocks * kStripRows, 0.0f);
    for (int64_t i = 0; i < blocks * block_groups_; ++i) {
      for (int lane = 0; lane < kStripRows; ++lane) {
        totals[i / block_groups_ * kStripRows + lane] += s_t[i * kStripRows + lane];
      }
    }
  }

  // The scale counts on `stride` pairs; the last group of queries or keys may have fewer.
  void correct_short_groups(int64_t first, int lanes, int64_t group, int64_t count,
                            float* s_t) const {
    const auto correct = [&](int lane, int64_t i) {
      const int64_t pairs = std::min(q_count(first + lane), k_count(group + i));
      s_t[i * kStripRows + lane] *= static_cast<float>(p_.stride) / static_cast<float>(pairs);
    };
    const bool short_q = q_count(first + lanes - 1) < p_.stride;
    const bool short_k = k_count(group + count - 1) < p_.stride;
    for (int64_t i = 0; short_q && i < count; ++i) correct(lanes - 1, i);
    for (int lane = 0; short_k && lane < lanes - short_q; ++lane) correct(lane, count - 1);
  }

  // Adds the strip's share of its map rows: the mean over the groups of a row that see a key.
  void write_strip(int64_t strip) {
    const int64_t first = first_ + strip * kStripRows;
    const int64_t columns = (num_seen(last_group(strip)) + block_groups_ - 1) / block_groups_;
    if (columns == 0) return;
    if (p_.softmax) loops_.normalize_groups(maxima(strip), columns, sums(strip));
    for (int64_t begin = first; begin <= last_group(strip);) {
      const int64_t row = begin * p_.stride / p_.map.block_size_q;
      const int64_t end = std::min(row_groups(row).end, last_group(strip) + 1);
      float* scores = scores_row(p_, *map_, head_, row);
      const int64_t seeing = p_.softmax ? num_seeing(row) : 0;
      for (int64_t column = 0; column < columns; ++column) {
        const int64_t divisor = p_.softmax ? seeing : num_pairs(row, column);
        if (divisor == 0) continue;
        const float* state = sums(strip) + column * kStripRows;
        float sum = 0.0f;
        for (int64_t g = begin; g < end; ++g) sum += state[g - first];
        if (scores[column] == -kInf) scores[column] = 0.0f;
        scores[column] += sum / static_cast<float>(divisor);
      }
      begin = end;
    }
  }

  // Query groups of a map row: [first, last).
  Interval row_groups(int64_t row) const {
    const int64_t size = p_.map.block_size_q / p_.stride;
    return {row * size, std::min((row + 1) * size, q_groups_)};
  }
  int64_t num_seeing(int64_t row) const {
    const Interval groups = row_groups(row);
    int64_t count = 0;
    for (int64_t g = groups.begin; g < groups.end; ++g) count += num_seen(g) > 0;
    return count;
  }
  // Pairs of a query group of `row` and a key group of `column` that are seen.
  int64_t num_pairs(int64_t row, int64_t column) const {
    const Interval groups = row_groups(row);
    const int64_t begin = column * block_groups_;
    int64_t count = 0;
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      count += clamp_index(num_seen(g) - begin, 0, block_groups_);
    }
    return count;
  }

  const BlockScoresParams& p_;
  const std::vector<SequenceMap>& maps_;
  const StripEngine& engine_;
  const FlushSubnormals flush_;
  const LaneKernels& loops_;
  StripShape shape_;
  int64_t element_size_;
  int64_t dim_;           // of a long row
  int64_t block_groups_;  // key groups of a block
  int64_t chunk_groups_ = 0;
  int64_t state_size_ = 0;  // of a strip: [blocks][kStripRows]
  int64_t query_bytes_ = 0;
  char *queries_, *packed_, *q_rows_, *k_rows_, *tile_;
  float *maxima_, *sums_;
  KeyChunk* chunk_;

  const SequenceMap* map_ = nullptr;
  int64_t head_ = 0, first_ = 0, q_groups_ = 0, k_groups_ = 0;
};

}  // namespace

void score_antidiagonals(const BlockScoresParams& p, const std::vector<SequenceMap>& maps) {
  struct Item {
    int64_t sequence, first_group;
  };
  std::vector<Item> items;  // later rows see more: they come first
  for (size_t s = 0; s < maps.size(); ++s) {
    const int64_t rows = std::min(maps[s].seq.q_len, maps[s].num_rows * p.map.block_size_q);
    for (int64_t row = 0; row < rows; row += kPassStrips * kStripRows * p.stride) {
      items.push_back({static_cast<int64_t>(s), row / p.stride});
    }
  }
  std::reverse(items.begin(), items.end());
  for_each_item(
      p.num_q_heads * static_cast<int64_t>(items.size()), [&] { return Worker(p, maps); },
      [&](int64_t index, Worker& worker) {
        const Item& item = items[static_cast<size_t>(index / p.num_q_heads)];
        worker.run(item.sequence, index % p.num_q_heads, item.first_group);
      });
}

}  // namespace longctx::cpu
