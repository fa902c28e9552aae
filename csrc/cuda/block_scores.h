// What the launchers of block_scores share.
#pragma once
#include "longctx/params.h"

namespace longctx::cuda {

// Scores of block means (kMean, kMaxMean) and of strided antidiagonals. p.scores is already filled
// with the score of what no row sees.
void score_means(const BlockScoresParams& p);
void score_antidiagonals(const BlockScoresParams& p);

}  // namespace longctx::cuda
