// Registers the CPU backend: op name -> csrc/ops/<op>.h with this backend's launcher.
#include <sstream>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/strip_engine.h"
#include "ops/append_kv.h"
#include "ops/attention.h"
#include "ops/attention_mass.h"
#include "ops/block_scores.h"
#include "ops/block_sparse_attention.h"
#include "ops/compact_kv.h"
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

namespace longctx {
namespace {

constexpr const char* kIsaNames[] = {"generic", "avx2", "avx512", "amx"};

cpu::Isa isa_named(const Checker& check, const std::string& name) {
  for (int level = 0; level <= static_cast<int>(cpu::detected_isa()); ++level) {
    if (name == kIsaNames[level]) return static_cast<cpu::Isa>(level);
  }
  check.fail("isa", "be an instruction set that this machine has, of generic, avx2, avx512, amx",
             name);
}

void force_isa(const Name& isa) { cpu::force_isa(isa_named(Checker("_force_isa"), isa.text)); }

// JSON, because the stable ABI has no dict.
std::string build_info() {
  std::ostringstream json;
  const auto isa = cpu::active_isa();
  json << "{\"detected_isa\": \"" << kIsaNames[static_cast<int>(cpu::detected_isa())]
       << "\", \"isa\": \"" << kIsaNames[static_cast<int>(isa)] << "\", \"engines\": {";
  const std::pair<const char*, DType> dtypes[] = {{"float32", DType::kFloat32},
                                                  {"float64", DType::kFloat64},
                                                  {"bfloat16", DType::kBFloat16},
                                                  {"float16", DType::kFloat16}};
  const char* separator = "";
  for (const auto& [name, dtype] : dtypes) {
    json << separator << "\"" << name << "\": \"" << cpu::choose_engine(dtype, isa).name << "\"";
    separator = ", ";
  }
  json << "}, \"compiler\": \"" << __VERSION__ << "\"}";
  return json.str();
}

// Kernels share torch's own threads, so torch.set_num_threads applies to them.
const cpu::ThreadPool kTorchThreads = {
    [] { return static_cast<int64_t>(torch::stable::get_num_threads()); },
    [](int64_t n, cpu::RangeBody body, void* context) {
      torch::stable::parallel_for(0, n, 1,
                                  [&](int64_t begin, int64_t end) { body(begin, end, context); });
    }};

}  // namespace
}  // namespace longctx

STABLE_TORCH_LIBRARY_IMPL(longctx, CompositeExplicitAutograd, m) {
  longctx::cpu::set_thread_pool(longctx::kTorchThreads);
  m.impl("_force_isa", TORCH_BOX(&longctx::force_isa));
  m.impl("build_info", TORCH_BOX(&longctx::build_info));
}

STABLE_TORCH_LIBRARY_IMPL(longctx, CPU, m) {
  using namespace longctx;
  using namespace longctx::cpu;
  m.impl("append_kv", TORCH_BOX(&append_kv<run_append_kv_cpu>));
  m.impl("attention", TORCH_BOX(&attention<run_attention_cpu>));
  m.impl("attention_mass", TORCH_BOX(&attention_mass<run_attention_mass_cpu>));
  m.impl("block_scores", TORCH_BOX(&block_scores<run_block_scores_cpu>));
  m.impl("block_sparse_attention",
         TORCH_BOX(&block_sparse_attention<run_block_sparse_attention_cpu>));
  m.impl("compact_kv", TORCH_BOX(&compact_kv<run_compact_kv_cpu>));
  m.impl("gather_attention", TORCH_BOX(&gather_attention<run_gather_attention_cpu>));
  m.impl("gather_kv", TORCH_BOX(&gather_kv<run_gather_kv_cpu>));
  m.impl("kmeans", TORCH_BOX(&kmeans<run_kmeans_cpu>));
  m.impl("linear_attention", TORCH_BOX(&linear_attention<run_linear_attention_cpu>));
  m.impl("linear_attention_decode",
         TORCH_BOX(&linear_attention_decode<run_linear_attention_decode_cpu>));
  m.impl("linear_attention_states", TORCH_BOX(&linear_attention_states<run_linear_attention_cpu>));
  m.impl("merge_states", TORCH_BOX(&merge_states<run_merge_states_cpu>));
  m.impl("page_scores", TORCH_BOX(&page_scores<run_page_scores_cpu>));
  m.impl("select_blocks", TORCH_BOX(&select_blocks<run_select_blocks_cpu>));
  m.impl("summarize_pages", TORCH_BOX(&summarize_pages<run_summarize_pages_cpu>));
  m.impl("threshold_select", TORCH_BOX(&threshold_select<run_threshold_select_cpu>));
  m.impl("token_scores", TORCH_BOX(&token_scores<run_token_scores_cpu>));
  m.impl("topk_select", TORCH_BOX(&topk_select<run_topk_select_cpu>));
  m.impl("truncate_kv", TORCH_BOX(&truncate_kv<run_compact_kv_cpu>));
  m.impl("update_pages", TORCH_BOX(&update_pages<run_summarize_pages_cpu>));
}
