// Which keys the new tokens of a batch entry become.
#pragma once
#include "longctx/params.h"
#include "longctx/sequence.h"

namespace longctx {

// Token i is key start + i, for tokens [first, last): those that count, at keys that there is room
// for.
struct NewKeys {
  int64_t start = 0;
  int64_t first = 0;
  int64_t last = 0;
  int64_t length = 0;  // of all keys then
};

LONGCTX_HD inline NewKeys new_keys(const AppendKVParams& p, int64_t batch) {
  NewKeys keys;
  keys.start = p.starts == nullptr ? p.start : p.starts[batch];
  const int64_t count = p.counts.data == nullptr
                            ? p.num_entries
                            : clamp_index(*p.counts.row(batch, 0, 0), 0, p.num_entries);
  keys.first = clamp_index(-keys.start, 0, count);
  keys.last = clamp_index(p.seqlen_k - keys.start, keys.first, count);
  keys.length = clamp_index(keys.start + count, 0, p.seqlen_k);
  return keys;
}

}  // namespace longctx
