// Hopper's asynchronous units on the CPU: barriers that count bytes, the tensor copy engine and
// warpgroup products. The SIMT branch of csrc/device/hopper.cuh is written in these words.
//
// What is checked beside the results: barriers are initialised, intact and not over-arrived; boxes
// and operands lie inside shared memory, aligned; a product follows a fence; nothing is under way
// when a block ends. Not modelled: a missing fence_async_proxy(), and warps of a warpgroup that
// run different products.
#pragma once
#include "simt.h"

namespace simt {

// A tensor [batch, heads, rows, columns] of 16-bit elements and its boxes of box_rows x 64.
struct TensorMap {
  const char* data = nullptr;
  int64_t lengths[4] = {};  // from the inner dim out
  int64_t strides[3] = {};  // bytes, of all but the inner dim
  int64_t box_rows = 0;
};

void mbarrier_init(uint64_t* mbarrier, int arrivals, Where where);
void mbarrier_arrive(uint64_t* mbarrier, int expected_bytes, Where where);
void mbarrier_wait(uint64_t* mbarrier, uint32_t parity, Where where);

void load_box(void* shared, const TensorMap* map, uint64_t* mbarrier, int column, int row, int head,
              int batch, Where where);

// A product of a warp's 16 rows, as every lane describes it. It is executed when it is issued or
// when it is waited for, by Mode::landing.
enum class Element : int32_t { kBFloat16, kFloat16 };
struct WarpProduct {
  float* acc;                // [columns / 2]: the lane's own
  const uint32_t* a_values;  // [4]: the lane's own; null: a lies in shared memory
  uint64_t a = 0;            // descriptor of 64 rows
  uint64_t b = 0;            // descriptor
  int32_t columns = 0;
  Element element = Element::kBFloat16;
  bool b_transposed = false;  // rows of b are what the sum runs over
  bool accumulate = true;
};
void wgmma_fence(Where where);
void wgmma_issue(const WarpProduct& product, Where where);
void wgmma_commit(Where where);
void wgmma_wait(int pending, Where where);

}  // namespace simt
