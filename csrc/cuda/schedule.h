// The order in which attention works off the rows of a block list.
#pragma once
#include <cstdint>

#include "longctx/params.h"

namespace longctx::cuda {

// Fills order [pattern_batch * pattern_heads * num_q_blocks] with the rows of the list, longest
// first, so that no long row starts when the others are done. Lengths count in powers of two:
// within one, a head's rows follow each other, later rows first, and find its keys in the cache.
void order_rows_longest_first(const char* op, const BlockList& blocks, int32_t* order);

}  // namespace longctx::cuda
