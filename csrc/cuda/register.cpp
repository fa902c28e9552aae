// Registers the CUDA backend: op name -> csrc/ops/<op>.h with this backend's launcher.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "cuda/stream.h"
#include "ops/merge_states.h"

// Only a CUDA torch defines this. Weak, so that the library also loads beside a CPU-only torch.
#pragma weak aoti_torch_get_current_cuda_stream

namespace longctx {
namespace cuda {

cudaStream_t current_stream() {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("longctx: no CUDA device, or a torch without CUDA");
  }
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op) {
  const cudaError_t error = cudaPeekAtLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("longctx::") + op + ": " + cudaGetErrorString(error));
  }
}

}  // namespace cuda

namespace {

// Makes the device of the first tensor current while the op runs.
template <auto op>
struct OnDevice;
template <class Result, class... Rest, Result (*op)(const Tensor&, Rest...)>
struct OnDevice<op> {
  static Result run(const Tensor& first, Rest... rest) {
    const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
    return op(first, rest...);
  }
};

}  // namespace
}  // namespace longctx

STABLE_TORCH_LIBRARY_IMPL(longctx, CUDA, m) {
  using namespace longctx;
  m.impl("merge_states", TORCH_BOX(&OnDevice<&merge_states<cuda::run_merge_states_cuda>>::run));
}
