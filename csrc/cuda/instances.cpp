#include "cuda/instances.h"

#include <algorithm>
#include <stdexcept>

namespace longctx::cuda {

bool has_instance(const std::string& kernel, const std::string& family, const std::string& dtype,
                  int head_dim) {
  static const std::vector<Instance> built = instances();
  return std::any_of(built.begin(), built.end(), [&](const Instance& instance) {
    return instance.kernel == kernel && instance.family == family && instance.dtype == dtype &&
           instance.head_dim == head_dim;
  });
}

void missing_instance(const std::string& kernel, const std::string& family,
                      const std::string& dtype, int head_dim) {
  throw std::runtime_error("longctx::" + kernel + ": this build has no " + family + " kernel for " +
                           dtype + " with head_dim " + std::to_string(head_dim) +
                           "; build with -DLONGCTX_CUDA_INSTANCES=all");
}

}  // namespace longctx::cuda
