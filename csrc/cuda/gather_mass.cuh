// The probabilities that gather_attention gave to the keys of an entry, from their scores and the
// lse of the rows: exp(score - lse), summed over the query heads and tokens that share the entry.
// One warp an entry; the sum has a fixed order.
#pragma once
#include "cuda/gather_attention.h"
#include "cuda/gather_keys.cuh"

namespace longctx::cuda {

constexpr int kMassWarps = 4;

LONGCTX_KERNEL(kMassWarps* device::kWarpSize, 1)
gather_mass_kernel(const LONGCTX_GRID_CONSTANT GatherAttentionParams p, const GatherPlan plan) {
  const int64_t item = device::block_index() * kMassWarps + device::warp_index();
  if (item >= p.seqs.batch * p.index_heads * p.index_tokens * (p.num_entries + 1)) return;
  const int64_t entry = item % (p.num_entries + 1);
  const int64_t list = item / (p.num_entries + 1);
  const int64_t token = list % p.index_tokens, head = list / p.index_tokens % p.index_heads;
  const int64_t batch = list / p.index_tokens / p.index_heads;
  const int64_t rows = p.num_q_heads / p.index_heads, first_head = head * rows;
  const int64_t unit_head = first_head * plan.heads / p.num_q_heads;
  const int64_t token_end = p.index_tokens == 1 ? p.seqs.seqlen_q : token + 1;

  float sum = 0;
  for (int64_t t = token; t < token_end; ++t) {
    const SelectedKeys<uint16_t> keys(p, {batch, unit_head, t, 0, 1, 1}, plan.heads);
    const SlotRange range = keys.entry(p, entry);
    const int64_t slots = range.end - range.begin;
    for (int64_t i = device::lane_index(); i < slots * rows; i += device::kWarpSize) {
      const int64_t state = (batch * p.num_q_heads + first_head + i / slots) * p.seqs.seqlen_q + t;
      const float lse = static_cast<const float*>(p.lse)[state];
      const float score = plan.scores[state * plan.max_slots + range.begin + i % slots];
      if (score != -INFINITY) sum += expf(score - lse);
    }
  }
  for (int mask = device::kWarpSize / 2; mask > 0; mask /= 2) {
    sum += device::shuffle_xor(sum, mask);
  }
  if (device::lane_index() == 0) p.key_mass[item] = sum;
}

}  // namespace longctx::cuda
