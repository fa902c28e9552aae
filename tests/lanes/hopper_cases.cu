// Words of device/hopper.cuh (sm_90a). What they do is written down a second time as plain loops,
// because the kernels under test and their emulation share one reading of layouts and descriptors.
#include "cases.h"
#include "cuda/sm90/tensor_map.h"
#include "device/hopper.cuh"
#include "device/mma.cuh"

namespace longctx::lanes {
namespace {

constexpr int kPanelColumns = 64;  // of 16-bit elements: 128 bytes
constexpr int kPanelRowBytes = 128;
constexpr int kThreads = 128;  // a warpgroup

// Where TMA's 128-byte swizzle puts an element of a panel that starts at a multiple of 1024.
LONGCTX_HD int panel_offset(int row, int column) {
  return row * kPanelRowBytes + ((column / 8) ^ (row % 8)) * 16 + column % 8 * 2;
}

// ---- TMA ----

// A tensor [2, 2, 12, 72] and two boxes of 16 rows x 64 columns of it, which both leave it.
constexpr int kBatch = 2, kHeads = 2, kRows = 12, kColumns = 72, kBoxRows = 16;
struct Box {
  int column, row, head, batch;
};
LONGCTX_HD Box box_at(int i) { return i == 0 ? Box{0, 8, 1, 1} : Box{64, -3, 0, 1}; }
constexpr int kBoxBytes = kBoxRows * kPanelRowBytes;
constexpr int kBoxWords = kBoxBytes / 4 / kThreads;  // of a thread
constexpr int kTensorWords = 14;                     // of a thread
static_assert(kTensorWords * kThreads * 2 >= kBatch * kHeads * kRows * kColumns);

LONGCTX_KERNEL(kThreads, 1)
load_box_kernel(LONGCTX_GRID_CONSTANT const device::TensorMap map, uint32_t* out) {
  char* const boxes = device::shared_memory();  // [2, kBoxBytes]
  uint64_t* const loaded = reinterpret_cast<uint64_t*>(boxes + 2 * kBoxBytes);
  uint64_t* const read = loaded + 1;
  const int thread = device::thread_index();
  if (thread == 0) {
    device::prefetch_map(&map);
    device::mbarrier_init(loaded, 1);
    device::mbarrier_init(read, kThreads);
    device::fence_mbarrier_init();
  }
  device::sync_threads();
  for (int i = 0; i < 2; ++i) {
    if (thread < device::kWarpSize && device::elect_one()) {
      const Box box = box_at(i);
      // the phase before the first has ended
      device::mbarrier_wait(read, (i & 1) ^ 1);
      device::mbarrier_arrive_expect(loaded, kBoxBytes);
      device::load_box(boxes + i * kBoxBytes, &map, loaded, box.column, box.row, box.head,
                       box.batch);
    }
    device::mbarrier_wait(loaded, i & 1);
    const uint32_t* words = reinterpret_cast<const uint32_t*>(boxes + i * kBoxBytes);
    for (int j = 0; j < kBoxWords; ++j) {
      out[thread * 2 * kBoxWords + i * kBoxWords + j] = words[thread * kBoxWords + j];
    }
    device::mbarrier_arrive(read);
  }
}

void run_load_box(const uint32_t* in, uint32_t* out) {
  TensorView view;
  view.data = const_cast<uint32_t*>(in);
  view.seq_stride = kColumns;
  view.head_stride = kRows * kColumns;
  view.batch_stride = kHeads * kRows * kColumns;
  const auto map =
      cuda::sm90::tensor_map(DType::kBFloat16, view, kBatch, kHeads, kRows, kColumns, kBoxRows);
  cuda::launch("lanes", &load_box_kernel, dim3(1), kThreads, 2 * kBoxBytes + 16, map, out);
}

void expected_boxes(const uint32_t* in, uint32_t* out) {
  const uint16_t* tensor = reinterpret_cast<const uint16_t*>(in);
  for (int i = 0; i < 2; ++i) {
    const Box box = box_at(i);
    uint16_t loaded[kBoxBytes / 2];
    for (int r = 0; r < kBoxRows; ++r) {
      for (int c = 0; c < kPanelColumns; ++c) {
        const int row = box.row + r, column = box.column + c;
        const bool inside = row >= 0 && row < kRows && column < kColumns;
        const int head = box.batch * kHeads + box.head;
        loaded[panel_offset(r, c) / 2] =
            inside ? tensor[(head * kRows + row) * kColumns + column] : uint16_t{0};
      }
    }
    for (int thread = 0; thread < kThreads; ++thread) {
      std::memcpy(out + thread * 2 * kBoxWords + i * kBoxWords, loaded + thread * 2 * kBoxWords,
                  kBoxWords * 4);
    }
  }
}

Case load_box_case() {
  return {"load_box",
          "mbarrier_init fence_mbarrier_init mbarrier_arrive mbarrier_arrive_expect "
          "mbarrier_try_wait mbarrier_wait load_box prefetch_map elect_one",
          kThreads,
          kTensorWords,
          2 * kBoxWords,
          0,
          0,
          [](Random& random, int, uint32_t* in) {
            for (int i = 0; i < kTensorWords; ++i) in[i] = random.bits();
          },
          &run_load_box,
          &expected_boxes};
}

// ---- WGMMA ----

// Element [row, column] of an operand: a small integer, so that sums are exact in any order.
LONGCTX_HD float element(uint32_t salt, int operand, int row, int column) {
  const uint32_t index = static_cast<uint32_t>((operand * 256 + row) * 256 + column);
  uint32_t hash = (index + salt) * 0x9e3779b9u;
  hash = (hash ^ hash >> 15) * 0x85ebca6bu;
  return static_cast<float>(static_cast<int>((hash ^ hash >> 13) % 9) - 4);
}

// A thread's share of acc [64, n], 8 words: each a weighted sum of every eighth element.
constexpr int kSums = 8;
template <int n>
LONGCTX_HD void sum_up(const float (&acc)[n], uint32_t* out) {
  for (int i = 0; i < kSums; ++i) out[i] = 0;
  for (int i = 0; i < n; ++i) {
    out[i % kSums] += static_cast<uint32_t>(static_cast<int>(acc[i])) * (2 * (i / kSums) + 1);
  }
}

constexpr int kDepth = 64;  // what a product sums over, four instructions

// acc [64, n] = a [64, 64] b^T, b [n, 64], both in shared memory; then twice that.
template <class T, int n>
struct SharedProduct {
  static float expected(uint32_t salt, int row, int column) {
    float sum = 0;
    for (int k = 0; k < kDepth; ++k) sum += element(salt, 0, row, k) * element(salt, 1, column, k);
    return 2 * sum;
  }
  static constexpr int kSharedBytes = (64 + n) * kPanelRowBytes;
  LONGCTX_DEVICE static void fill_shared(uint32_t salt, char* shared) {
    for (int i = device::thread_index(); i < (64 + n) * kDepth; i += kThreads) {
      const int row = i / kDepth, column = i % kDepth;
      const bool first = row < 64;
      T& to = *reinterpret_cast<T*>(shared + panel_offset(row, column));
      device::narrow(element(salt, first ? 0 : 1, first ? row : row - 64, column), to);
    }
  }
  LONGCTX_DEVICE static void multiply(uint32_t, char* shared, float (&acc)[n / 2]) {
    const uint64_t a =
        device::opaque(device::operand_descriptor(device::shared_address(shared), 0));
    const uint64_t b =
        device::operand_descriptor(device::shared_address(shared + 64 * kPanelRowBytes), 0);
    for (int time = 0; time < 2; ++time) {
#pragma unroll
      for (int step = 0; step < kDepth / 16; ++step) {
        device::wgmma<T>(acc, device::advance(a, step * 32), device::advance(b, step * 32),
                         time + step > 0);
      }
    }
  }
};

// acc [64, n] += a [64, 64] b, a in registers, b [64, n] in panels of 64 columns.
template <class T, int n>
struct RegisterProduct {
  static float expected(uint32_t salt, int row, int column) {
    float sum = 1;
    for (int k = 0; k < kDepth; ++k) sum += element(salt, 0, row, k) * element(salt, 1, k, column);
    return sum;
  }
  static constexpr int kPanelBytes = kDepth * kPanelRowBytes;
  static constexpr int kSharedBytes = n / kPanelColumns * kPanelBytes;
  LONGCTX_DEVICE static void fill_shared(uint32_t salt, char* shared) {
    for (int i = device::thread_index(); i < kDepth * n; i += kThreads) {
      const int row = i / n, column = i % n;
      char* const panel = shared + column / kPanelColumns * kPanelBytes;
      T& to = *reinterpret_cast<T*>(panel + panel_offset(row, column % kPanelColumns));
      device::narrow(element(salt, 1, row, column), to);
    }
  }
  LONGCTX_DEVICE static void multiply(uint32_t salt, char* shared, float (&acc)[n / 2]) {
    const int row = device::thread_index() / 32 * 16 + device::lane_index() / 4;
    const int column = device::lane_index() % 4 * 2;
    uint32_t a[kDepth / 16][4];
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = row + i % 2 * 8, c = 16 * step + column + i / 2 * 8;
        a[step][i] = device::pack_pair(T(), element(salt, 0, r, c), element(salt, 0, r, c + 1));
      }
    }
#pragma unroll
    for (float& x : acc) x = 1;
    device::pin(acc);
    device::wgmma_fence();
    const uint64_t b = device::operand_descriptor(device::shared_address(shared), kPanelBytes);
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
      device::wgmma<T>(acc, a[step], device::advance(b, step * 16 * kPanelRowBytes));
    }
  }
};

template <class Product, int n>
LONGCTX_KERNEL(kThreads, 1)
product_kernel(const uint32_t* in, uint32_t* out) {
  char* const shared = device::shared_memory();
  Product::fill_shared(in[0], shared);
  device::fence_async_proxy();
  device::sync_threads();
  float acc[n / 2];
  device::wgmma_fence();
  Product::multiply(in[0], shared, acc);
  device::wgmma_commit();
  device::wgmma_wait<0>();
  device::pin(acc);
  sum_up(acc, out + device::thread_index() * kSums);
}

template <class Product, int n>
void run_product(const uint32_t* in, uint32_t* out) {
  cuda::launch("lanes", &product_kernel<Product, n>, dim3(1), kThreads, Product::kSharedBytes, in,
               out);
}

template <class Product, int n>
void expected_product(const uint32_t* in, uint32_t* out) {
  for (int thread = 0; thread < kThreads; ++thread) {
    float acc[n / 2];
    for (int e = 0; e < n / 2; ++e) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + e % 4 / 2 * 8;
      acc[e] = Product::expected(in[0], row, e / 4 * 8 + thread % 4 * 2 + e % 2);
    }
    sum_up(acc, out + thread * kSums);
  }
}

template <class Product, int n>
Case product_case(const char* name, const char* words) {
  return {name,
          words,
          kThreads,
          1,
          kSums,
          0,
          0,
          [](Random& random, int, uint32_t* in) { in[0] = random.bits(); },
          &run_product<Product, n>,
          &expected_product<Product, n>};
}

}  // namespace

std::vector<Case> hopper_cases() {
  const char* words =
      "wgmma wgmma_fence wgmma_commit wgmma_wait fence_async_proxy pin opaque operand_descriptor "
      "advance";
  return {
      load_box_case(),
      product_case<SharedProduct<__nv_bfloat16, 64>, 64>("wgmma_shared_bfloat16_64", words),
      product_case<SharedProduct<__half, 128>, 128>("wgmma_shared_float16_128", words),
      product_case<RegisterProduct<__half, 64>, 64>("wgmma_registers_float16_64", words),
      product_case<RegisterProduct<__nv_bfloat16, 128>, 128>("wgmma_registers_bfloat16_128", words),
      product_case<RegisterProduct<__nv_bfloat16, 256>, 256>("wgmma_registers_bfloat16_256",
                                                             words)};
}

}  // namespace longctx::lanes
