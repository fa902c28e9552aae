#pragma once
#include "attention_problem.h"

namespace longctx::simt_tests {

// Runs attention or block_sparse_attention in every mode; on Hopper by its own kernel, which must
// take the call.
void check_attention(const Case& c, bool hopper);

}  // namespace longctx::simt_tests
