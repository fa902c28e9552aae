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
  const int64_t group = p.num_q_heads / plan.heads;
  const int64_t heads = p.num_q_heads / p.index_heads, first_head = head * heads;
  const int64_t unit_heads = heads / group, unit_head = first_head / group;
  const int64_t token_end = p.index_tokens == 1 ? p.seqs.seqlen_q : token + 1;

  float sum = 0;
  for (int64_t t = token; t < token_end; ++t) {
    const int64_t unit_token = plan.unit_tokens == 1 ? t : 0;
    const int64_t own_row = (t - unit_token) * group, end = group * plan.unit_tokens;
    int64_t count;  // rows of the token, from g on, that one block had: they have the same slots
    for (int64_t g = 0; g < group; g += count) {
      const int64_t first_row = (own_row + g) / plan.block_rows * plan.block_rows;
      const int64_t end_row = clamp_index(first_row + plan.block_rows, 0, end);
      count = clamp_index(end_row - own_row, 0, group) - g;
      const GatherUnit unit = {batch,
                               unit_head,
                               unit_token,
                               static_cast<int32_t>(first_row),
                               static_cast<int32_t>(end_row),
                               static_cast<int32_t>(group)};
      const SelectedKeys<uint16_t> keys(p, unit, plan.heads);
      const SlotRange range = keys.entry(p, entry);
      const int64_t slots = range.end - range.begin;
      for (int64_t i = device::lane_index(); i < slots * count * unit_heads;
           i += device::kWarpSize) {
        const int64_t row = i / slots, h = first_head + row / count * group + g + row % count;
        const int64_t state = (batch * p.num_q_heads + h) * p.seqs.seqlen_q + t;
        const float lse = static_cast<const float*>(p.lse)[state];
        const float score = plan.scores[state * plan.max_slots + range.begin + i % slots];
        if (score != -INFINITY) sum += expf(score - lse);
      }
    }
  }
  for (int mask = device::kWarpSize / 2; mask > 0; mask /= 2) {
    sum += device::shuffle_xor(sum, mask);
  }
  if (device::lane_index() == 0) p.key_mass[item] = sum;
}

}  // namespace longctx::cuda
