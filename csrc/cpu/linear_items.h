// The work items of linear attention on the CPU and where their chunks lie.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "linear_engine.h"
#include "longctx/sequence.h"
#include "parallel.h"

namespace longctx::cpu {

constexpr int64_t kMinSegmentChunks = 16;  // below, the states of segments cost more than they save

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// A segment of the sweep over a (sequence, head).
struct LinearItem {
  Sequence seq;
  int64_t sequence;
  int64_t head;
  int64_t first_step, last_step;  // of the sequence's sweep, a chunk each
  int64_t segment_state;          // where it starts, in the states of segments; -1: initial_state
  int64_t chunk_row;              // of the sequence's first chunk in chunk_states
  bool last;                      // ends the sweep
};

inline int64_t segments_of(const LinearAttentionParams& params, int64_t num_chunks) {
  if (!params.causal) return 1;
  int64_t wanted = params.num_segments;
  if (wanted == 0) {
    const int64_t sweeps = std::max<int64_t>(params.seqs.num_seqs * params.num_q_heads, 1);
    wanted = std::min(thread_pool().num_threads() / sweeps, num_chunks / kMinSegmentChunks);
  }
  return std::max<int64_t>(std::min(wanted, num_chunks), 1);
}

// `num_states` becomes the number of states where segments start.
inline std::vector<LinearItem> linear_items(const LinearAttentionParams& params,
                                            int64_t& num_states) {
  std::vector<LinearItem> items;
  int64_t chunk_row = 0;
  num_states = 0;
  for (int64_t s = 0; s < params.seqs.num_seqs; ++s) {
    const Sequence seq = sequence_at(params.seqs, s);
    if (params.seqs.cu_seqlens_k == nullptr) chunk_row = 0;
    const int64_t num_chunks = ceil_div(seq.k_len, kLinearChunk);
    const int64_t segments = segments_of(params, num_chunks);
    for (int64_t head = 0; head < params.num_q_heads; ++head) {
      for (int64_t i = 0; i < segments; ++i) {
        items.push_back({seq, s, head, num_chunks * i / segments, num_chunks * (i + 1) / segments,
                         segments > 1 ? num_states++ : -1, chunk_row, i + 1 == segments});
      }
    }
    chunk_row += num_chunks;
  }
  return items;
}

inline int64_t chunk_of(const LinearAttentionParams& params, const LinearItem& item, int64_t step) {
  return params.reverse ? ceil_div(item.seq.k_len, kLinearChunk) - 1 - step : step;
}

// The first token of a step's chunk, on the axis.
inline int64_t token_at(const LinearAttentionParams& params, const LinearItem& item, int64_t step) {
  return item.seq.k_begin + chunk_of(params, item, step) * kLinearChunk;
}

inline const char* row_at(const TensorView& view, int64_t size, int64_t batch, int64_t head,
                          int64_t row) {
  return static_cast<const char*>(view.data) +
         (batch * view.batch_stride + head * view.head_stride + row * view.seq_stride) * size;
}

// The keys and, with rows, the queries of a step's chunk, in the order of the sweep; counts may
// be 0.
inline LinearChunk chunk_at(const LinearAttentionParams& params, const LinearItem& item,
                            int64_t step, bool rows, bool keys) {
  const int64_t first = chunk_of(params, item, step) * kLinearChunk;
  const int64_t kv_head = item.head / (params.num_q_heads / params.num_kv_heads);
  const int64_t size = element_size(params.dtype);
  const auto count = [&](int64_t length) {
    return std::min<int64_t>(std::max<int64_t>(length - first, 0), kLinearChunk);
  };
  const auto find = [&](const TensorView& view, int64_t head, int64_t begin, int64_t num,
                        int64_t& stride) -> const void* {
    if (num == 0) return nullptr;
    const int64_t start = begin + first + (params.reverse ? num - 1 : 0);
    stride = params.reverse ? -view.seq_stride : view.seq_stride;
    return row_at(view, size, item.seq.batch_index, head, start);
  };
  LinearChunk result;
  result.num_rows = rows ? count(item.seq.q_len) : 0;
  result.num_keys = keys ? count(item.seq.k_len) : 0;
  result.q = find(params.q, item.head, item.seq.q_begin, result.num_rows, result.q_stride);
  result.k = find(params.k, kv_head, item.seq.k_begin, result.num_keys, result.k_stride);
  result.v = find(params.v, kv_head, item.seq.k_begin, result.num_keys, result.v_stride);
  return result;
}

}  // namespace longctx::cpu
