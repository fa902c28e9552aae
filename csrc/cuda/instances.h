// Which (kernel, dtype, head_dim) this library was built with; csrc/cuda/instances.cmake says how.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace longctx::cuda {

struct Instance {
  const char* kernel;
  const char* family;  // sm_80: runs everywhere; sm_90a: Hopper only
  const char* dtype;
  int head_dim;
  int64_t shared_bytes;  // the most dynamic shared memory that a launch asks for
};
std::vector<Instance> instances();

// What a launcher asks before it takes a path that may not be built.
bool has_instance(const std::string& kernel, const std::string& family, const std::string& dtype,
                  int head_dim);

// Throws std::runtime_error: the kernel exists, but not in this build.
[[noreturn]] void missing_instance(const std::string& kernel, const std::string& family,
                                   const std::string& dtype, int head_dim);

}  // namespace longctx::cuda
