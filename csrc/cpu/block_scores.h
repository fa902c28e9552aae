// What the two kernels of block_scores share.
#pragma once
#include <vector>

#include "lane_kernels.h"
#include "longctx/block_map.h"
#include "strip_engine.h"

namespace longctx::cpu {

inline std::vector<SequenceMap> sequence_maps(const BlockMapParams& map) {
  std::vector<SequenceMap> maps;
  int64_t first_row = 0;
  for (int64_t s = 0; s < map.seqs.num_seqs; ++s) {
    if (map.seqs.cu_seqlens_q == nullptr) first_row = 0;
    maps.push_back(sequence_map(map, s, first_row));
    first_row += maps.back().num_rows;
  }
  return maps;
}

inline float* scores_row(const BlockScoresParams& p, const SequenceMap& map, int64_t head,
                         int64_t row) {
  return p.scores +
         ((map.seq.batch_index * p.num_q_heads + head) * p.map.num_q_blocks + map.first_row + row) *
             p.map.num_k_blocks;
}

// Scores of block means (kMean, kMaxMean) and of strided antidiagonals. p.scores is already filled
// with the score of what no row sees.
void score_means(const BlockScoresParams& p, const std::vector<SequenceMap>& maps);
void score_antidiagonals(const BlockScoresParams& p, const std::vector<SequenceMap>& maps);

}  // namespace longctx::cpu
