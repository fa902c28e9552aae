// How page_scores and token_scores reduce scores over query heads and tokens, checked once.
#pragma once
#include "ops/block_map.h"

namespace longctx {

inline HeadReduce head_reduce_named(const Checker& check, const Name& name) {
  static constexpr const char* kNames[] = {"none", "group_mean", "group_max", "group_sum",
                                           "all_sum"};
  return enum_named<HeadReduce>(check, "head_reduce", name, kNames,
                                "be 'none', 'group_mean', 'group_max', 'group_sum' or 'all_sum'");
}

inline QueryReduce query_reduce_named(const Checker& check, const Name& name) {
  static constexpr const char* kNames[] = {"none", "mean", "max"};
  return enum_named<QueryReduce>(check, "query_reduce", name, kNames, "be 'none', 'mean' or 'max'");
}

// float32 [batch, heads, rows, num_scores]; key_heads are the heads that groups of query heads
// share.
inline Tensor new_scores(const Tensor& q, HeadReduce head_reduce, QueryReduce query_reduce,
                         int64_t key_heads, int64_t num_scores) {
  const int64_t heads = head_reduce == HeadReduce::kNone     ? q.size(1)
                        : head_reduce == HeadReduce::kAllSum ? 1
                                                             : key_heads;
  const int64_t rows = query_reduce == QueryReduce::kNone ? q.size(2) : 1;
  return new_tensor(q, {q.size(0), heads, rows, num_scores}, ScalarType::Float);
}

}  // namespace longctx
