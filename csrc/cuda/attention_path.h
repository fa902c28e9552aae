// Which kernel a call of attention or block_sparse_attention runs: the one place that decides.
#pragma once
#include <cstdint>

#include "cuda/runtime.h"
#include "longctx/params.h"

namespace longctx::cuda {

enum class AttentionPath : int32_t {
  kSm90,     // csrc/cuda/sm90/attention.cuh: TMA and WGMMA
  kSm80,     // attention.cuh: everywhere
  kFloat32,  // attention_fp32.cuh
};

struct AttentionChoice {
  AttentionPath path = AttentionPath::kSm80;
  const char* reason = "";  // a few words, for people
};

// From shapes, host scalars and the device alone. `blocks` is null for dense attention.
AttentionChoice choose_attention_path(const AttentionParams& params, const BlockList* blocks,
                                      const DeviceLimits& limits);

// For tests and benchmarks: 16-bit calls take this path if it supports them, and raise if not.
enum class ForcedPath : int32_t { kAuto, kSm80, kSm90 };
void force_attention_path(ForcedPath path);

const char* path_name(AttentionPath path);

}  // namespace longctx::cuda
