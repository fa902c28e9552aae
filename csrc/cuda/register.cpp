// Registers the CUDA backend: op name -> csrc/ops/<op>.h with this backend's launcher.
#include <torch/csrc/stable/accelerator.h>

#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/attention_path.h"
#include "cuda/instances.h"
#include "cuda/kernels.h"
#include "cuda/runtime.h"
#include "cuda/supported.h"
#include "ops/append_kv.h"
#include "ops/attention.h"
#include "ops/attention_mass.h"
#include "ops/block_scores.h"
#include "ops/block_sparse_attention.h"
#include "ops/compact_kv.h"
#include "ops/force_cuda_path.h"
#include "ops/gather_attention.h"
#include "ops/gather_kv.h"
#include "ops/kmeans.h"
#include "ops/linear_attention.h"
#include "ops/linear_attention_decode.h"
#include "ops/linear_attention_states.h"
#include "ops/merge_states.h"
#include "ops/page_scores.h"
#include "ops/select_blocks.h"
#include "ops/summarize_pages.h"
#include "ops/threshold_select.h"
#include "ops/token_scores.h"
#include "ops/topk_select.h"
#include "ops/truncate_kv.h"

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
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
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

const Tensor* first_of(const Tensor& tensor) { return &tensor; }
const Tensor* first_of(const std::vector<Tensor>& tensors) {
  return tensors.empty() ? nullptr : &tensors.front();
}

// Makes the device of the first tensor current while the op runs. None, or one on the CPU beside
// others on CUDA, is for the op's own checks.
template <auto op>
struct OnDevice;
template <class Result, class First, class... Rest, Result (*op)(First, Rest...)>
struct OnDevice<op> {
  static Result run(First first, Rest... rest) {
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    const Tensor* tensor = first_of(first);
    if (tensor != nullptr && tensor->is_cuda()) guard.emplace(tensor->get_device_index());
    return op(first, rest...);
  }
};

// Instead of a launcher: keeps the path that the call would take.
thread_local cuda::AttentionChoice chosen;
void choose(const AttentionParams& params) {
  cuda::require_supported("attention", params.dtype, params.head_dim, params.seqs);
  chosen = cuda::choose_attention_path(params, nullptr, cuda::device_limits());
}

// "sm90: Hopper": the kernel of causal attention over these inputs, and why that one.
std::string attention_path(const Tensor& q, const Tensor& k, const Tensor& v) {
  attention<&choose>(q, k, v, true, std::nullopt, -1, -1, 0, 0.0, std::nullopt, std::nullopt,
                     std::nullopt, std::nullopt, std::nullopt, std::nullopt);
  return std::string(cuda::path_name(chosen.path)) + ": " + chosen.reason;
}

// JSON: how this library was compiled, and what its instances ask of shared memory, by
// kernel/family/dtype/head_dim.
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
  m.impl("append_kv", TORCH_BOX(&OnDevice<&append_kv<cuda::run_append_kv_cuda>>::run));
  m.impl("attention", TORCH_BOX(&OnDevice<&attention<cuda::run_attention_cuda>>::run));
  m.impl("_cuda_attention_path", TORCH_BOX(&OnDevice<&attention_path>::run));
  m.impl("attention_mass",
         TORCH_BOX(&OnDevice<&attention_mass<cuda::run_attention_mass_cuda>>::run));
  m.impl("block_scores", TORCH_BOX(&OnDevice<&block_scores<cuda::run_block_scores_cuda>>::run));
  m.impl("block_sparse_attention",
         TORCH_BOX(&OnDevice<&block_sparse_attention<cuda::run_block_sparse_attention_cuda>>::run));
  m.impl("compact_kv", TORCH_BOX(&OnDevice<&compact_kv<cuda::run_compact_kv_cuda>>::run));
  m.impl("gather_attention",
         TORCH_BOX(&OnDevice<&gather_attention<cuda::run_gather_attention_cuda>>::run));
  m.impl("gather_kv", TORCH_BOX(&OnDevice<&gather_kv<cuda::run_gather_kv_cuda>>::run));
  m.impl("kmeans", TORCH_BOX(&OnDevice<&kmeans<cuda::run_kmeans_cuda>>::run));
  m.impl(
      "linear_attention_decode",
      TORCH_BOX(&OnDevice<&linear_attention_decode<cuda::run_linear_attention_decode_cuda>>::run));
  m.impl("linear_attention",
         TORCH_BOX(&OnDevice<&linear_attention<cuda::run_linear_attention_cuda>>::run));
  m.impl("linear_attention_states",
         TORCH_BOX(&OnDevice<&linear_attention_states<cuda::run_linear_attention_cuda>>::run));
  m.impl("merge_states", TORCH_BOX(&OnDevice<&merge_states<cuda::run_merge_states_cuda>>::run));
  m.impl("page_scores", TORCH_BOX(&OnDevice<&page_scores<cuda::run_page_scores_cuda>>::run));
  m.impl("select_blocks", TORCH_BOX(&OnDevice<&select_blocks<cuda::run_select_blocks_cuda>>::run));
  m.impl("summarize_pages",
         TORCH_BOX(&OnDevice<&summarize_pages<cuda::run_summarize_pages_cuda>>::run));
  m.impl("threshold_select",
         TORCH_BOX(&OnDevice<&threshold_select<cuda::run_threshold_select_cuda>>::run));
  m.impl("token_scores", TORCH_BOX(&OnDevice<&token_scores<cuda::run_token_scores_cuda>>::run));
  m.impl("topk_select", TORCH_BOX(&OnDevice<&topk_select<cuda::run_topk_select_cuda>>::run));
  m.impl("truncate_kv", TORCH_BOX(&OnDevice<&truncate_kv<cuda::run_compact_kv_cuda>>::run));
  m.impl("update_pages", TORCH_BOX(&OnDevice<&update_pages<cuda::run_summarize_pages_cuda>>::run));
}
