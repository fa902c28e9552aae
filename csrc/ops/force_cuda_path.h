// _force_cuda_path: tests and benchmarks choose the kernel of 16-bit attention on CUDA.
#pragma once
#include "checks.h"
#include "cuda/attention_path.h"

namespace longctx {

inline void force_cuda_path(const Name& path) {
  using cuda::ForcedPath;
  const std::pair<const char*, ForcedPath> choices[] = {
      {"auto", ForcedPath::kAuto}, {"sm80", ForcedPath::kSm80}, {"sm90", ForcedPath::kSm90}};
  for (const auto& [name, choice] : choices) {
    if (path.text == name) return cuda::force_attention_path(choice);
  }
  Checker("_force_cuda_path").fail("path", "be auto, sm80 or sm90", path.text);
}

}  // namespace longctx
