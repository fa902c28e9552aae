// What follows attention_mass_kernel: overlapping sums of diagonals become one per diagonal, masses
// of keys one per segment. Both read what was just written, 4 bytes an entry.
#pragma once
#include "cuda/attention_mass.cuh"

namespace longctx::cuda {

constexpr int kSumThreads = 128;

// A block of threads per slot; `diagonal_mass` outside of packed sequences is already 0.
LONGCTX_KERNEL(kSumThreads, 1)
mass_diagonals_kernel(const AttentionMassParams p, const MassGrid grid) {
  const int64_t slot = device::block_index() % grid.slots;
  const int64_t map = device::block_index() / grid.slots;
  const int64_t size = grid.strip_size();
  const Piece piece = piece_at(p.seqs, map / p.num_q_heads, slot, size,
                               [](const Sequence& seq) { return diagonal_span(seq); });
  if (piece.sequence < 0) return;
  const AxisSpan span = diagonal_span(sequence_at(p.seqs, piece.sequence));
  const int64_t end = p.seqs.cu_seqlens_q == nullptr ? p.num_diagonals : span.length;
  const float* window = grid.windows + (map * grid.slots + slot) * grid.window_size();
  const float* previous = window - grid.window_size();
  for (int64_t i = device::thread_index(); i < size; i += kSumThreads) {
    const int64_t diagonal = piece.number * size + i;
    if (diagonal >= end) break;
    float sum = 0.0f;
    if (diagonal < span.length) {
      sum = window[i];
      if (piece.number > 0 && i < kTileRows) sum += previous[size + i];
    }
    p.diagonal_mass[map * p.num_diagonals + span.begin + diagonal] = sum;
  }
}

// mass[segment] = the sum over the segment's keys. A block of threads per head and segment.
LONGCTX_KERNEL(kSumThreads, 1)
mass_segments_kernel(const AttentionMassParams p, const float* key_mass) {
  const int64_t map = device::block_index() / p.num_segments;
  const int64_t s = device::block_index() % p.num_segments;
  const float* keys = key_mass + map * p.seqs.seqlen_k;
  const int64_t begin = clamp_index(p.segment_offsets[s], 0, p.seqs.seqlen_k);
  const int64_t end = clamp_index(p.segment_offsets[s + 1], begin, p.seqs.seqlen_k);
  double sum = 0.0;
  for (int64_t key = begin + device::thread_index(); key < end; key += kSumThreads) {
    sum += static_cast<double>(keys[key]);
  }
  for (int mask = device::kWarpSize / 2; mask > 0; mask /= 2) {
    sum += device::shuffle_xor(sum, mask);
  }
  double* sums = reinterpret_cast<double*>(device::shared_memory());  // [warps]
  const int warp = device::warp_index();
  if (device::lane_index() == 0) sums[warp] = sum;
  device::sync_threads();
  if (device::thread_index() != 0) return;
  sum = 0.0;
  for (int i = 0; i < kSumThreads / device::kWarpSize; ++i) sum += sums[i];
  p.key_mass[map * p.num_segments + s] = static_cast<float>(sum);
}

}  // namespace longctx::cuda
