// The path of attention for few query rows (attention.cpp chooses it).
#pragma once
#include "longctx/params.h"

namespace longctx::cpu {

// Whether a kv head has so few query rows that reading K and V once is what takes the time.
bool has_few_rows(const AttentionParams& params);
void run_attention_few_rows(const AttentionParams& params);

}  // namespace longctx::cpu
