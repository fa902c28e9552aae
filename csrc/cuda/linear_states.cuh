// States of linear attention between passes: the scan over segments, and chunks that nobody owns.
#pragma once
#include "cuda/linear_items.cuh"

namespace longctx::cuda {

constexpr int kScanThreads = 256;

struct LinearScan {
  int64_t state_size = 0;      // head_dim * state_dim
  int64_t blocks_per_map = 0;  // ceil(state_size / kScanThreads)
  int64_t num_segments = 1;
  const float* initial_state = nullptr;  // [num_maps, state_size]; null: zero
  const float* local_states = nullptr;   // [num_maps, num_segments, state_size]
  const float* carries = nullptr;        // [num_maps, num_segments]
  float* starts = nullptr;               // like local_states, and may be the same; null: not wanted
  float* final_state = nullptr;          // [num_maps, state_size]; null: not wanted
};

// The state where each segment starts, from what the segments before it add. A thread owns an
// element of the state of a (sequence, head).
LONGCTX_KERNEL(kScanThreads, 1)
scan_linear_states_kernel(const LinearScan scan) {
  const int64_t map = device::block_index() / scan.blocks_per_map;
  const int64_t element =
      device::block_index() % scan.blocks_per_map * kScanThreads + device::thread_index();
  if (element >= scan.state_size) return;
  const int64_t first = map * scan.num_segments;
  float state =
      scan.initial_state == nullptr ? 0.0f : scan.initial_state[map * scan.state_size + element];
  const int64_t last = scan.num_segments - 1;
  for (int64_t segment = 0; segment <= last; ++segment) {
    const int64_t at = (first + segment) * scan.state_size + element;
    const bool wanted = segment < last || scan.final_state != nullptr;
    const float local = wanted ? scan.local_states[at] : 0.0f;
    if (scan.starts != nullptr) scan.starts[at] = state;
    if (!wanted) return;
    const float carry = scan.carries[first + segment];
    // A carry of 0 forgets, whatever was there.
    state = carry == 0.0f ? local : local + carry * state;
  }
  scan.final_state[map * scan.state_size + element] = state;
}

// Chunks at the tail of chunk_states that no packed sequence owns: zero.
LONGCTX_KERNEL(kScanThreads, 1)
fill_unowned_chunks_kernel(const LinearAttentionParams p) {
  const int64_t chunk = device::block_index() % p.num_chunks;
  if (chunk < chunks_before(p.seqs, p.seqs.num_seqs)) return;
  const int64_t size = p.head_dim * p.state_dim();
  float* state = static_cast<float*>(p.chunk_states) + device::block_index() * size;
  for (int64_t i = device::thread_index(); i < size; i += kScanThreads) state[i] = 0.0f;
}

}  // namespace longctx::cuda
