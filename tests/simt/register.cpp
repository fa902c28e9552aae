// Registers the CUDA kernels, running on the CPU, under torch's CPU key: loaded after
// liblongctx.so, this library takes over from the CPU kernels.
#include "cuda/kernels.h"
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
#include "simt.h"

namespace longctx {
namespace {

template <class Choice, size_t num_choices>
Choice chosen(const char* argument, const Name& name,
              const std::pair<const char*, Choice> (&choices)[num_choices]) {
  std::string rule = "be one of";
  for (const auto& [text, choice] : choices) {
    if (name.text == text) return choice;
    rule += std::string(" ") + text;
  }
  Checker("simt").fail(argument, rule, name.text);
}

void configure(const Name& schedule, const Name& landing, int64_t seed) {
  using simt::Landing;
  using simt::Schedule;
  const bool hopper = simt::mode.hopper;
  simt::mode = {
      chosen<Schedule>("schedule", schedule,
                       {{"round_robin", Schedule::kRoundRobin},
                        {"warp_run_ahead", Schedule::kWarpRunAhead},
                        {"random", Schedule::kRandom}}),
      chosen<Landing>(
          "landing", landing,
          {{"early", Landing::kEarly}, {"late", Landing::kLate}, {"random", Landing::kRandom}}),
      static_cast<uint64_t>(seed), hopper};
}

void choose_device(const Name& device) {
  simt::mode.hopper = chosen<bool>("device", device, {{"sm_80", false}, {"sm_90", true}});
}

int64_t num_launches() { return simt::num_launches; }

}  // namespace
}  // namespace longctx

STABLE_TORCH_LIBRARY(longctx_simt, m) {
  m.def("configure(str schedule, str landing, int seed) -> ()");
  m.def("choose_device(str device) -> ()");
  m.def("num_launches() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(longctx_simt, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&longctx::configure));
  m.impl("choose_device", TORCH_BOX(&longctx::choose_device));
  m.impl("num_launches", TORCH_BOX(&longctx::num_launches));
}

STABLE_TORCH_LIBRARY_IMPL(longctx, CompositeExplicitAutograd, m) {
  m.impl("_force_cuda_path", TORCH_BOX(&longctx::force_cuda_path));
}

STABLE_TORCH_LIBRARY_IMPL(longctx, CPU, m) {
  using namespace longctx;
  using namespace longctx::cuda;
  m.impl("append_kv", TORCH_BOX(&append_kv<run_append_kv_cuda>));
  m.impl("attention", TORCH_BOX(&attention<run_attention_cuda>));
  m.impl("attention_mass", TORCH_BOX(&attention_mass<run_attention_mass_cuda>));
  m.impl("block_scores", TORCH_BOX(&block_scores<run_block_scores_cuda>));
  m.impl("block_sparse_attention",
         TORCH_BOX(&block_sparse_attention<run_block_sparse_attention_cuda>));
  m.impl("compact_kv", TORCH_BOX(&compact_kv<run_compact_kv_cuda>));
  m.impl("gather_attention", TORCH_BOX(&gather_attention<run_gather_attention_cuda>));
  m.impl("gather_kv", TORCH_BOX(&gather_kv<run_gather_kv_cuda>));
  m.impl("kmeans", TORCH_BOX(&kmeans<run_kmeans_cuda>));
  m.impl("linear_attention_decode",
         TORCH_BOX(&linear_attention_decode<run_linear_attention_decode_cuda>));
  m.impl("linear_attention", TORCH_BOX(&linear_attention<run_linear_attention_cuda>));
  m.impl("linear_attention_states", TORCH_BOX(&linear_attention_states<run_linear_attention_cuda>));
  m.impl("merge_states", TORCH_BOX(&merge_states<run_merge_states_cuda>));
  m.impl("page_scores", TORCH_BOX(&page_scores<run_page_scores_cuda>));
  m.impl("select_blocks", TORCH_BOX(&select_blocks<run_select_blocks_cuda>));
  m.impl("summarize_pages", TORCH_BOX(&summarize_pages<run_summarize_pages_cuda>));
  m.impl("threshold_select", TORCH_BOX(&threshold_select<run_threshold_select_cuda>));
  m.impl("token_scores", TORCH_BOX(&token_scores<run_token_scores_cuda>));
  m.impl("topk_select", TORCH_BOX(&topk_select<run_topk_select_cuda>));
  m.impl("truncate_kv", TORCH_BOX(&truncate_kv<run_compact_kv_cuda>));
  m.impl("update_pages", TORCH_BOX(&update_pages<run_summarize_pages_cuda>));
}
