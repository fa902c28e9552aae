// Block scores from means: q and k are read once and averaged per block; the products of the means
// cost 1 / (block_size_q * block_size_k) of q k^T.
#include "block_scores.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dense_chunk.h"
#include "flush_subnormals.h"
#include "kernels.h"
#include "parallel.h"
#include "reduced_float.h"
#include "scratch.h"

namespace longctx::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kPassStrips = 8;      // strips that share the packed means of a chunk
constexpr int64_t kBlocksPerItem = 16;  // blocks that one work item averages

// The means of every block of a tensor: [heads][blocks of all sequences][head_dim].
struct Means {
  DType dtype;
  int64_t head_dim = 0;
  std::vector<int64_t> first_block;  // per sequence, and the total at the end
  std::vector<char> data;

  char* at(int64_t head, int64_t sequence, int64_t block) {
    const int64_t index =
        head * first_block.back() + first_block[static_cast<size_t>(sequence)] + block;
    return data.data() + index * head_dim * element_bytes(dtype);
  }
};

// float -> the 16-bit type of `dtype`.
void narrow_row(DType dtype, const float* from, int64_t n, void* to) {
  for (int64_t i = 0; i < n; ++i) {
    dtype == DType::kBFloat16 ? narrow(from[i], static_cast<BFloat16*>(to)[i])
                              : narrow(from[i], static_cast<Float16*>(to)[i]);
  }
}

// `dtype` is that of the means: that of the tensor, or float32 for a 16-bit tensor.
Means block_means(const BlockScoresParams& p, const std::vector<SequenceMap>& maps, bool of_q,
                  DType dtype) {
  const TensorView& tensor = of_q ? p.q : p.k;
  const int64_t heads = of_q ? p.num_q_heads : p.num_kv_heads;
  const int64_t block_size = of_q ? p.map.block_size_q : p.map.block_size_k;
  const LaneKernels& loops = choose_lane_kernels(active_isa());
  Means means{dtype, p.head_dim, {0}, {}};
  struct Item {
    int64_t sequence, first_block, num_blocks;
  };
  std::vector<Item> items;
  for (size_t s = 0; s < maps.size(); ++s) {
    const int64_t blocks = of_q ? maps[s].num_rows : maps[s].num_columns;
    means.first_block.push_back(means.first_block.back() + blocks);
    for (int64_t b = 0; b < blocks; b += kBlocksPerItem) {
      items.push_back({static_cast<int64_t>(s), b, std::min(kBlocksPerItem, blocks - b)});
    }
  }
  means.data.resize(
      static_cast<size_t>(heads * means.first_block.back() * p.head_dim * element_bytes(dtype)));
  const auto wide_row = [&] { return std::vector<float>(static_cast<size_t>(p.head_dim)); };
  for_each_item(heads * static_cast<int64_t>(items.size()), wide_row,
                [&](int64_t index, std::vector<float>& wide) {
                  const int64_t head = index % heads;
                  const Item& item = items[static_cast<size_t>(index / heads)];
                  const Sequence& seq = maps[static_cast<size_t>(item.sequence)].seq;
                  const int64_t begin = of_q ? seq.q_begin : seq.k_begin;
                  const int64_t length = of_q ? seq.q_len : seq.k_len;
                  for (int64_t b = item.first_block; b < item.first_block + item.num_blocks; ++b) {
                    const void* rows = row_address(tensor, element_bytes(p.dtype), seq.batch_index,
                                                   head, begin + b * block_size);
                    const int64_t count = std::min(block_size, length - b * block_size);
                    char* mean = means.at(head, item.sequence, b);
                    const bool narrows = element_bytes(dtype) == 2;
                    loops.mean_rows(p.dtype, rows, tensor.seq_stride, count, p.head_dim,
                                    narrows ? static_cast<void*>(wide.data()) : mean);
                    if (narrows) narrow_row(dtype, wide.data(), p.head_dim, mean);
                  }
                });
  return means;
}

// Softmax over the visible blocks of a row, in place; what lies behind them is already 0.
void softmax_row(float* row, int64_t num_visible) {
  const float top = num_visible > 0 ? *std::max_element(row, row + num_visible) : -kInf;
  if (top == -kInf) {
    std::fill_n(row, num_visible, 0.0f);
    return;
  }
  float sum = 0.0f;
  for (int64_t j = 0; j < num_visible; ++j) sum += row[j] = std::exp(row[j] - top);
  for (int64_t j = 0; j < num_visible; ++j) row[j] /= sum;
}

class Worker {
 public:
  Worker(const BlockScoresParams& p, const std::vector<SequenceMap>& maps, Means& q_means,
         Means& k_means)
      : p_(p),
        maps_(maps),
        q_means_(q_means),
        k_means_(k_means),
        engine_(choose_engine(k_means.dtype, active_isa())),
        loops_(choose_lane_kernels(active_isa())) {
    shape_.dtype = k_means.dtype;
    shape_.head_dim = p.head_dim;
    shape_.softmax_scale = p.softmax_scale;
    shape_.scale_log2 = static_cast<float>(p.softmax_scale * 1.4426950408889634);
    query_bytes_ = (engine_.query_bytes(shape_) + 63) / 64 * 64;
    ScratchPlan plan;
    const size_t queries = plan.add<char>(query_bytes_ * kPassStrips);
    const size_t packed = plan.add<char>(engine_.chunk_bytes(shape_));
    const size_t tile = plan.add<double>(kChunkKeys * kStripRows);
    const size_t chunk = plan.add<KeyChunk>(1);
    char* base = static_cast<char*>(thread_scratch(plan.bytes()));
    queries_ = base + queries;
    packed_ = base + packed;
    tile_ = base + tile;
    chunk_ = reinterpret_cast<KeyChunk*>(base + chunk);
    engine_.begin_thread();
  }
  ~Worker() { engine_.end_thread(); }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // Rows [first, first + kPassStrips * kStripRows) of the map, one mean a lane.
  void run_means(int64_t sequence, int64_t head, int64_t first) {
    const SequenceMap& map = begin(sequence, head);
    const int64_t num_rows = std::min(kPassStrips * kStripRows, map.num_rows - first);
    pack(num_rows, [&](int64_t i) { return q_means_.at(head, sequence, first + i); });
    const int64_t limit = map.num_visible(p_.map, first + num_rows - 1);
    for_each_tile(limit, num_rows, [&](int64_t column, int64_t count, int64_t lane, float* tile) {
      const int64_t lanes = std::min<int64_t>(kStripRows, num_rows - lane);
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t row = first + lane + i;
        const int64_t end = std::min(column + count, map.num_visible(p_.map, row));
        float* scores = scores_row(p_, map, head, row);
        for (int64_t j = column; j < end; ++j) scores[j] = tile[(j - column) * kStripRows + i];
      }
    });
    for (int64_t i = 0; p_.softmax && i < num_rows; ++i) {
      softmax_row(scores_row(p_, map, head, first + i), map.num_visible(p_.map, first + i));
    }
  }

  // Row `row` of the map: the maximum over its queries, a query a lane.
  void run_maxima(int64_t sequence, int64_t head, int64_t row) {
    const SequenceMap& map = begin(sequence, head);
    const int64_t first = row * p_.map.block_size_q;
    const int64_t num_rows = std::min(p_.map.block_size_q, map.seq.q_len - first);
    pack(num_rows, [&](int64_t i) {
      return row_address(p_.q, element_bytes(p_.dtype), map.seq.batch_index, head,
                         map.seq.q_begin + first + i);
    });
    const int64_t limit = map.num_visible(p_.map, row);
    float* scores = scores_row(p_, map, head, row);
    std::fill_n(scores, limit, -kInf);
    for_each_tile(limit, num_rows, [&](int64_t column, int64_t count, int64_t lane, float* tile) {
      const int64_t position = map.first_position + first + lane;
      const int64_t lanes = std::min<int64_t>(kStripRows, num_rows - lane);
      for (int64_t i = 0; i < kStripRows; ++i) {  // mask
        int64_t seen = i < lanes ? count : 0;
        if (p_.map.causal && i < lanes) {
          const int64_t blocks = position + i < 0 ? 0 : (position + i) / p_.map.block_size_k + 1;
          seen = clamp_index(blocks - column, 0, count);
        }
        for (int64_t j = seen; j < count; ++j) tile[j * kStripRows + i] = -kInf;
      }
      loops_.max_lanes(tile, count, scores + column);
    });
    if (p_.softmax) softmax_row(scores, limit);
  }

 private:
  const SequenceMap& begin(int64_t sequence, int64_t head) {
    sequence_ = sequence;
    kv_head_ = head * p_.num_kv_heads / p_.num_q_heads;
    return maps_[static_cast<size_t>(sequence)];
  }

  template <class RowAt>
  void pack(int64_t num_rows, const RowAt& row_at) {
    for (int64_t first = 0; first < num_rows; first += kStripRows) {
      const void* rows[kStripRows];
      const int lanes = static_cast<int>(std::min<int64_t>(kStripRows, num_rows - first));
      for (int lane = 0; lane < lanes; ++lane) rows[lane] = row_at(first + lane);
      engine_.pack_queries(shape_, rows, lanes, queries_ + first / kStripRows * query_bytes_);
    }
  }

  // visit(first column, columns, first row, scores [columns][kStripRows]) for each chunk of the
  // columns [0, limit) and each strip of the packed rows.
  template <class Visit>
  void for_each_tile(int64_t limit, int64_t num_rows, const Visit& visit) {
    for (int64_t column = 0; column < limit; column += kChunkKeys) {
      const int64_t count = std::min<int64_t>(kChunkKeys, limit - column);
      set_dense_chunk(chunk_, k_means_.at(kv_head_, sequence_, column), p_.head_dim,
                      element_bytes(k_means_.dtype), column, count);
      engine_.pack_chunk(shape_, *chunk_, false, packed_);
      for (int64_t row = 0; row < num_rows; row += kStripRows) {
        engine_.scores(shape_, queries_ + row / kStripRows * query_bytes_, *chunk_, packed_, tile_);
        visit(column, count, row, as_float(shape_.dtype, tile_, chunk_->num_slots() * kStripRows));
      }
    }
  }

  const BlockScoresParams& p_;
  const std::vector<SequenceMap>& maps_;
  Means& q_means_;
  Means& k_means_;
  const StripEngine& engine_;
  const FlushSubnormals flush_;
  const LaneKernels& loops_;
  StripShape shape_;
  int64_t query_bytes_;
  char *queries_, *packed_, *tile_;
  KeyChunk* chunk_;
  int64_t sequence_ = 0, kv_head_ = 0;
};

}  // namespace

void score_means(const BlockScoresParams& p, const std::vector<SequenceMap>& maps) {
  const bool of_means = p.method == BlockScoreMethod::kMean;
  const DType wide = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  Means q_means{wide, p.head_dim, {0}, {}};
  if (of_means) q_means = block_means(p, maps, true, wide);
  // A strip takes one dtype, so the means that full queries meet are rounded to that of q.
  Means k_means = block_means(p, maps, false, of_means ? wide : p.dtype);

  struct Item {
    int64_t sequence, first_row;
  };
  std::vector<Item> items;  // later rows see more: they come first
  const int64_t rows_per_item = of_means ? kPassStrips * kStripRows : 1;
  for (size_t s = 0; s < maps.size(); ++s) {
    for (int64_t row = 0; row < maps[s].num_rows; row += rows_per_item) {
      items.push_back({static_cast<int64_t>(s), row});
    }
  }
  std::reverse(items.begin(), items.end());
  for_each_item(
      p.num_q_heads * static_cast<int64_t>(items.size()),
      [&] { return Worker(p, maps, q_means, k_means); },
      [&](int64_t index, Worker& worker) {
        const Item& item = items[static_cast<size_t>(index / p.num_q_heads)];
        const int64_t head = index % p.num_q_heads;
        if (of_means) {
          worker.run_means(item.sequence, head, item.first_row);
        } else {
          worker.run_maxima(item.sequence, head, item.first_row);
        }
      });
}

void run_block_scores_cpu(const BlockScoresParams& p) {
  const int64_t size = p.map.seqs.batch * p.num_q_heads * p.map.num_q_blocks * p.map.num_k_blocks;
  std::fill_n(p.scores, size, p.softmax ? 0.0f : -kInf);
  const std::vector<SequenceMap> maps = sequence_maps(p.map);
  if (p.method == BlockScoreMethod::kAntidiagonal) {
    score_antidiagonals(p, maps);
  } else {
    score_means(p, maps);
  }
}

}  // namespace longctx::cpu
