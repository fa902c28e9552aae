// Registers the CUDA backend: op name -> csrc/ops/<op>.h with this backend's launcher.
#include <torch/csrc/stable/accelerator.h>

#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cuda/attention_path.h"
#include "cuda/instances.h"
#include "cuda/kernels.h"
#include "cuda/runtime.h"
#include "ops/attention.h"
#include "ops/attention_mass.h"
#include "ops/block_scores.h"
#include "ops/block_sparse_attention.h"
#include "ops/force_cuda_path.h"
#include "ops/merge_states.h"
#include "ops/select_blocks.h"

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

void check(const char* op, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("longctx::") + op + ": " + cudaGetErrorString(error));
  }
}

const DeviceLimits& device_limits() {
  constexpr int kMaxDevices = 64;
  static DeviceLimits limits[kMaxDevices];
  static std::once_flag asked[kMaxDevices];
  int device = 0;
  check("device_limits", cudaGetDevice(&device));
  std::call_once(asked[device], [&] {
    const auto ask = [&](cudaDeviceAttr attribute, int& value) {
      check("device_limits", cudaDeviceGetAttribute(&value, attribute, device));
    };
    ask(cudaDevAttrComputeCapabilityMajor, limits[device].compute_major);
    ask(cudaDevAttrComputeCapabilityMinor, limits[device].compute_minor);
    ask(cudaDevAttrMultiProcessorCount, limits[device].num_multiprocessors);
    ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, limits[device].shared_memory_per_block);
  });
  return limits[device];
}

Workspace::Workspace(int64_t bytes) {
  if (bytes == 0) return;
  int device = 0;
  check("workspace", cudaGetDevice(&device));
  const torch::stable::Device where(torch::headeronly::DeviceType::CUDA, device);
  auto tensor = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, where);
  data_ = tensor.mutable_data_ptr();
  owner_ = new Tensor(std::move(tensor));
}

Workspace::~Workspace() { delete static_cast<Tensor*>(owner_); }

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

// Which kernel attention takes on the current device and why, by dtype/head_dim, for tensors as
// torch lays them out. Nothing without a device.
void write_attention_paths(std::ostream& json) {
  int num_devices = 0;
  if (cudaGetDeviceCount(&num_devices) != cudaSuccess || num_devices == 0) return;
  const std::pair<const char*, DType> dtypes[] = {
      {"float32", DType::kFloat32}, {"bfloat16", DType::kBFloat16}, {"float16", DType::kFloat16}};
  const char* separator = "";
  for (const auto& [name, dtype] : dtypes) {
    for (const int64_t head_dim : {64, 96, 128, 192, 256}) {
      constexpr int64_t kRows = 1024;
      AttentionParams params;
      params.dtype = dtype;
      params.seqs.batch = params.seqs.num_seqs = params.num_q_heads = params.num_kv_heads = 1;
      params.seqs.seqlen_q = params.seqs.seqlen_k = kRows;
      params.head_dim = params.head_dim_v = head_dim;
      params.q = {nullptr, kRows * head_dim, kRows * head_dim, head_dim};
      params.k = params.v = params.out = params.q;
      const auto choice = cuda::choose_attention_path(params, nullptr, cuda::device_limits());
      json << separator << "\"" << name << "/" << head_dim << "\": \""
           << cuda::path_name(choice.path) << ": " << choice.reason << "\"";
      separator = ", ";
    }
  }
}

// JSON: how this library was compiled, what its instances ask of shared memory, by
// kernel/family/dtype/head_dim, and which attention kernel this device would run.
std::string build_info() {
  std::ostringstream json;
  json << "{\"nvcc\": \"" << LONGCTX_NVCC_VERSION << "\", \"architectures\": \""
       << LONGCTX_CUDA_ARCHITECTURES << "\", \"cutlass\": \"" << LONGCTX_CUTLASS_VERSION
       << "\", \"shared_bytes\": {";
  const char* separator = "";
  for (const cuda::Instance& instance : cuda::instances()) {
    json << separator << "\"" << instance.kernel << "/" << instance.family << "/" << instance.dtype
         << "/" << instance.head_dim << "\": " << instance.shared_bytes;
    separator = ", ";
  }
  json << "}, \"attention\": {";
  write_attention_paths(json);
  json << "}}";
  return json.str();
}

}  // namespace
}  // namespace longctx

STABLE_TORCH_LIBRARY_IMPL(longctx, CompositeExplicitAutograd, m) {
  m.impl("_force_cuda_path", TORCH_BOX(&longctx::force_cuda_path));
  m.impl("cuda_build_info", TORCH_BOX(&longctx::build_info));
}

STABLE_TORCH_LIBRARY_IMPL(longctx, CUDA, m) {
  using namespace longctx;
  m.impl("attention", TORCH_BOX(&OnDevice<&attention<cuda::run_attention_cuda>>::run));
  m.impl("attention_mass",
         TORCH_BOX(&OnDevice<&attention_mass<cuda::run_attention_mass_cuda>>::run));
  m.impl("block_scores", TORCH_BOX(&OnDevice<&block_scores<cuda::run_block_scores_cuda>>::run));
  m.impl("block_sparse_attention",
         TORCH_BOX(&OnDevice<&block_sparse_attention<cuda::run_block_sparse_attention_cuda>>::run));
  m.impl("merge_states", TORCH_BOX(&OnDevice<&merge_states<cuda::run_merge_states_cuda>>::run));
  m.impl("select_blocks", TORCH_BOX(&OnDevice<&select_blocks<cuda::run_select_blocks_cuda>>::run));
}
