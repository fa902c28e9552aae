#include "hopper.h"

#include <cuda_fp16.h>

#include <array>
#include <cstring>
#include <deque>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

namespace simt {
namespace {

constexpr int kPanelBytes = 128;
constexpr int kPanelColumns = 64;
constexpr int kWarpRows = 16;
constexpr int kDepth = 16;  // of a product
constexpr int kMaxColumns = 256;
constexpr uint64_t kIntact = 0x6d62617272696572u;

[[noreturn]] void fail(const char* name, Where where, const std::string& message) {
  throw std::runtime_error(std::string(name) + " at " + where.file + ":" +
                           std::to_string(where.line) + ": " + message);
}

struct MBarrier {
  int arrivals = 0;  // of a phase
  int left = 0;
  int64_t bytes = 0;  // expected and not landed; negative if they land first
  uint64_t phase = 0;
  // What arrives for one phase is ordered before what has waited for it, not for the next.
  uint64_t order[2] = {};
  void* order_of_phase() { return &order[phase % 2]; }
};

struct Product {
  std::array<WarpProduct, kWarpSize> lanes;
  Where where;
};
struct WarpProducts {
  bool fenced = false;
  std::deque<std::vector<Product>> batches;  // committed
  std::vector<Product> open;
};

// What a block has under way.
struct Hopper : BlockExtension {
  ~Hopper() override = default;
  std::string unfinished() const override {
    for (const auto& [warp, products] : warps) {
      if (!products.batches.empty() || !products.open.empty()) {
        return "warp " + std::to_string(warp) + " returned with products under way";
      }
    }
    return "";
  }
  MBarrier& find(const char* name, uint64_t* mbarrier, Where where) {
    const auto found = mbarriers.find(mbarrier);
    if (found == mbarriers.end()) fail(name, where, "not an initialised mbarrier");
    // ThreadSanitizer sees who initialises and who uses it.
    uint64_t word;
    std::memcpy(&word, mbarrier, sizeof(word));
    if (word != kIntact) fail(name, where, "the mbarrier was overwritten");
    return found->second;
  }

  static constexpr int kIssueSlots = 256;
  std::map<const void*, MBarrier> mbarriers;
  std::map<int, WarpProducts> warps;
  tsan::Context copy_engine{seen_by_tsan() ? "tensor copy engine" : nullptr};
  uint64_t issue_order[kIssueSlots] = {};
  int64_t issued = 0;
};

// Of the emulator's own memory ThreadSanitizer sees nothing.
struct Unseen {
  Unseen() { tsan::ignore_begin(); }
  ~Unseen() { tsan::ignore_end(); }
};

Hopper& hopper() {
  const Unseen unseen;
  return extension<Hopper>();
}

void end_phase_if_complete(uint64_t* key, MBarrier& mbarrier) {
  if (mbarrier.left > 0 || mbarrier.bytes != 0) return;
  ++mbarrier.phase;
  mbarrier.left = mbarrier.arrivals;
  wake(key);
}

// The copy of one box: shared memory's 16-byte units are permuted within 1024 bytes.
void copy_box(char* shared, const TensorMap& map, const std::array<int64_t, 4>& first) {
  for (int64_t r = 0; r < map.box_rows; ++r) {
    const int64_t row = first[1] + r;
    bool inside = row >= 0 && row < map.lengths[1];
    for (int dim = 2; dim < 4; ++dim) inside &= first[dim] >= 0 && first[dim] < map.lengths[dim];
    const char* source = map.data + first[0] * 2 + row * map.strides[0] +
                         first[2] * map.strides[1] + first[3] * map.strides[2];
    const int64_t bytes = inside ? (map.lengths[0] - first[0]) * 2 : 0;
    for (int64_t unit = 0; unit < kPanelBytes; unit += 16) {
      char* const to = shared_at(swizzled(shared_offset(shared) + r * kPanelBytes + unit));
      const int64_t left = bytes - unit < 0 ? 0 : bytes - unit < 16 ? bytes - unit : 16;
      if (left > 0) std::memcpy(to, source + unit, static_cast<size_t>(left));
      if (left < 16) std::memset(to + left, 0, static_cast<size_t>(16 - left));
    }
  }
}

// The fields of a descriptor, in bytes.
struct Operand {
  explicit Operand(uint64_t descriptor)
      : start(static_cast<int64_t>(descriptor & 0x3fff) << 4),
        leading(static_cast<int64_t>(descriptor >> 16 & 0x3fff) << 4),
        stride(static_cast<int64_t>(descriptor >> 32 & 0x3fff) << 4),
        base_offset(descriptor >> 49 & 7),
        swizzle(descriptor >> 62) {}
  int64_t start, leading, stride;
  uint64_t base_offset, swizzle;
};

float widen(Element element, uint16_t bits) {
  if (element == Element::kFloat16) {
    __half_raw raw;
    raw.x = bits;
    return __half2float(__half(raw));
  }
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// Eight neighbouring elements.
void read_unit(Element element, int64_t offset, float* values, Where where) {
  uint16_t bits[8];
  const char* from = shared_at(swizzled(offset));
  check_shared("wgmma", from, 16, where);
  std::memcpy(bits, from, sizeof(bits));
  for (int i = 0; i < 8; ++i) values[i] = widen(element, bits[i]);
}

// Rows of kDepth elements: ((8, m), (8, 2)) : ((128 bytes, stride), (1 element, 16 bytes)).
void read_rows(const Operand& operand, Element element, int first_row, int num_rows,
               float (*rows)[kDepth], Where where) {
  for (int r = 0; r < num_rows; ++r) {
    const int row = first_row + r;
    const int64_t offset = operand.start + row / 8 * operand.stride + row % 8 * kPanelBytes;
    for (int unit = 0; unit < 2; ++unit) {
      read_unit(element, offset + unit * 16, rows[r] + unit * 8, where);
    }
  }
}

// The same where neighbouring elements belong to different rows:
// ((64, m), (8, 2)) : ((1 element, leading), (128 bytes, stride)).
void read_columns(const Operand& operand, Element element, int num_rows, float (*rows)[kDepth],
                  Where where) {
  for (int k = 0; k < kDepth; ++k) {
    for (int row = 0; row < num_rows; row += 8) {
      float values[8];
      read_unit(element,
                operand.start + row / kPanelColumns * operand.leading + row % kPanelColumns * 2 +
                    k / 8 * operand.stride + k % 8 * kPanelBytes,
                values, where);
      for (int i = 0; i < 8; ++i) rows[row + i][k] = values[i];
    }
  }
}

void execute(const Product& product, int warp) {
  const WarpProduct& first = product.lanes[0];
  const Operand b_operand(first.b);
  if (b_operand.swizzle != 1 || b_operand.base_offset != 0) {
    fail("wgmma", product.where, "only the 128-byte swizzle is known here");
  }
  static float a[kWarpRows][kDepth];
  static float b[kMaxColumns][kDepth];
  if (first.a_values == nullptr) {
    read_rows(Operand(first.a), first.element, warp % 4 * kWarpRows, kWarpRows, a, product.where);
  } else {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const uint32_t pair = product.lanes[lane].a_values[i];
        float* to = &a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8];
        to[0] = widen(first.element, static_cast<uint16_t>(pair));
        to[1] = widen(first.element, static_cast<uint16_t>(pair >> 16));
      }
    }
  }
  if (first.b_transposed) {
    read_columns(b_operand, first.element, first.columns, b, product.where);
  } else {
    read_rows(b_operand, first.element, 0, first.columns, b, product.where);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    float* acc = product.lanes[lane].acc;
    for (int e = 0; e < first.columns / 2; ++e) {
      const float* x = a[lane / 4 + e % 4 / 2 * 8];
      const float* y = b[e / 4 * 8 + lane % 4 * 2 + e % 2];
      float sum = first.accumulate ? acc[e] : 0.0f;
      for (int k = 0; k < kDepth; ++k) sum += x[k] * y[k];
      acc[e] = sum;
    }
  }
}

// By the last lane of a warp, in the collective. ThreadSanitizer sees what products read.
void execute_all(const std::vector<Product>& products) {
  tsan::ignore_end();
  for (const Product& product : products) execute(product, running.index / kWarpSize);
  tsan::ignore_begin();
}
void execute_batches(WarpProducts& products, size_t keep) {
  for (; products.batches.size() > keep; products.batches.pop_front()) {
    execute_all(products.batches.front());
  }
}

template <class Work>
void by_warp(const char* name, const Work& work, Where where) {
  warp_op(name, char(), [&](char*) { work(hopper().warps[running.index / kWarpSize]); }, where);
}

}  // namespace

void mbarrier_init(uint64_t* mbarrier, int arrivals, Where where) {
  check_shared("mbarrier_init", mbarrier, 8, where);
  if (arrivals <= 0) fail("mbarrier_init", where, std::to_string(arrivals) + " arrivals");
  std::memcpy(mbarrier, &kIntact, sizeof(kIntact));
  const Unseen unseen;
  MBarrier& state = hopper().mbarriers[mbarrier];
  state.arrivals = state.left = arrivals;
}

void mbarrier_arrive(uint64_t* mbarrier, int expected_bytes, Where where) {
  MBarrier& state = hopper().find("mbarrier_arrive", mbarrier, where);
  if (state.left == 0) fail("mbarrier_arrive", where, "more arrivals than the phase has");
  preempt();
  tsan::release(state.order_of_phase());
  state.bytes += expected_bytes;
  --state.left;
  end_phase_if_complete(mbarrier, state);
}

void mbarrier_wait(uint64_t* mbarrier, uint32_t parity, Where where) {
  MBarrier& state = hopper().find("mbarrier_wait", mbarrier, where);
  preempt();
  while (state.phase % 2 == parity) wait_for_wake("mbarrier_wait", mbarrier, where);
  tsan::acquire(&state.order[parity]);
}

void load_box(void* shared, const TensorMap* map, uint64_t* mbarrier, int column, int row, int head,
              int batch, Where where) {
  MBarrier& state = hopper().find("load_box", mbarrier, where);
  char* const to = static_cast<char*>(shared);
  const int64_t bytes = map->box_rows * kPanelBytes;
  if (map->box_rows <= 0 || map->box_rows > 256 || shared_offset(to) % 1024 != 0) {
    fail("load_box", where, "boxes have at most 256 rows and start at multiples of 1024 bytes");
  }
  check_shared("load_box", to, 16, where);
  check_shared("load_box", to + bytes - 16, 16, where);
  Hopper& all = hopper();
  void* const order = &all.issue_order[all.issued++ % Hopper::kIssueSlots];
  tsan::release(order);
  const Unseen unseen;
  in_background([&all, &state, order, to, map = *map, mbarrier, bytes,
                 first = std::array<int64_t, 4>{column, row, head, batch}] {
    {
      const tsan::Visit visit(all.copy_engine.thread());
      tsan::acquire(order);
      copy_box(to, map, first);
      tsan::release(state.order_of_phase());
    }
    state.bytes -= bytes;
    end_phase_if_complete(mbarrier, state);
  });
}

void wgmma_fence(Where where) {
  by_warp("wgmma_fence", [](WarpProducts& warp) { warp.fenced = true; }, where);
}

void wgmma_issue(const WarpProduct& product, Where where) {
  const auto queue = [&](WarpProduct* lanes) {
    WarpProducts& warp = hopper().warps[running.index / kWarpSize];
    if (!warp.fenced) fail("wgmma", where, "no wgmma_fence since the last wait");
    Product whole{{}, where};
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (lanes[lane].a != lanes[0].a || lanes[lane].b != lanes[0].b) {
        fail("wgmma", where, "lanes with different descriptors");
      }
      whole.lanes[lane] = lanes[lane];
    }
    warp.open.push_back(whole);
    if (!lands_at_issue()) return;
    execute_batches(warp, 0);
    execute_all(warp.open);
    warp.open.clear();
  };
  warp_op("wgmma", product, queue, where);
}

void wgmma_commit(Where where) {
  const auto commit = [](WarpProducts& warp) {
    warp.batches.push_back(std::move(warp.open));
    warp.open.clear();
  };
  by_warp("wgmma_commit", commit, where);
}

void wgmma_wait(int pending, Where where) {
  const auto wait = [pending](WarpProducts& warp) {
    execute_batches(warp, static_cast<size_t>(pending));
    if (pending == 0) warp.fenced = false;
  };
  by_warp("wgmma_wait", wait, where);
}

}  // namespace simt
