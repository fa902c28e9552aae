// The arguments that block_scores and select_blocks share, checked once.
#pragma once
#include <algorithm>
#include <iterator>

#include "checks.h"

namespace longctx {

// The position of `name` in `names`, a list of legal values in the order of an enum.
template <class Enum, size_t n>
Enum enum_named(const Checker& check, const char* argument, const Name& name,
                const char* const (&names)[n], const char* rule) {
  const auto found = std::find(std::begin(names), std::end(names), name.text);
  check.require(found != std::end(names), argument, rule, "'" + name.text + "'");
  return static_cast<Enum>(found - std::begin(names));
}

// Fills the map but its sequences.
inline BlockMapParams block_map(const Checker& check, int64_t block_size_q, int64_t block_size_k,
                                bool causal, std::optional<int64_t> q_offset, bool packed) {
  const auto one_of = [&](const char* name, int64_t value, const char* rule,
                          std::initializer_list<int64_t> legal) {
    check.require(std::find(legal.begin(), legal.end(), value) != legal.end(), name, rule, value);
  };
  one_of("block_size_q", block_size_q, "be 16, 32, 64 or 128", {16, 32, 64, 128});
  one_of("block_size_k", block_size_k, "be 1, 8, 16, 32, 64 or 128", {1, 8, 16, 32, 64, 128});
  constexpr int64_t kFarthest = int64_t{1} << 40;  // keeps positions far from overflow
  const int64_t offset = q_offset.value_or(0);
  check.require(offset > -kFarthest && offset < kFarthest, "q_offset", "be a key position", offset);
  check.require(!packed || offset == 0, "q_offset", "not be combined with packed sequences",
                offset);
  BlockMapParams map;
  map.block_size_q = block_size_q;
  map.block_size_k = block_size_k;
  map.causal = causal;
  map.has_q_offset = q_offset.has_value() && !packed;
  map.q_offset = offset;
  return map;
}

}  // namespace longctx
