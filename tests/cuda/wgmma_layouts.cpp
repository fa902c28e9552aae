// What csrc/device/hopper.cuh, and with it the emulator of tests/simt, says of operands and
// fragments of WGMMA, beside NVIDIA's own layouts in CuTe.
#include <gtest/gtest.h>

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "device/hopper.cuh"

namespace longctx {
namespace {

using namespace cute;
namespace gmma = cute::SM90::GMMA;
using Element = cute::bfloat16_t;

constexpr uint64_t kAddressBits = 0x3fff;

// Byte where the kernels keep element (row, column) of a tile of `rows` rows, in panels of 64
// columns.
int64_t panel_offset(int64_t rows, int64_t row, int64_t column) {
  const int64_t panel = column / 64 * rows * device::kPanelBytes;
  return simt::swizzled(panel + row * device::kPanelBytes + column % 64 * 2);
}

// The same by CuTe: with smem_ptr_flag the swizzle applies to the byte address.
template <class SharedLayout>
int64_t cute_offset(const SharedLayout& layout, int i, int j) {
  return layout.layout_a()(static_cast<int64_t>(layout.layout_b()(i, j)) * 2);
}

// Q and K: the sum runs along a row.
template <int kRows, int kColumns>
void check_rows() {
  const auto layout = tile_to_shape(gmma::Layout_K_SW128_Atom<Element>{},
                                    make_shape(Int<kRows>{}, Int<kColumns>{}));
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      ASSERT_EQ(cute_offset(layout, row, column), panel_offset(kRows, row, column));
    }
  }
  Element* const base = nullptr;
  const auto tile = make_tensor(make_smem_ptr(base), layout);
  const auto steps = local_tile(tile, make_shape(Int<kRows>{}, Int<16>{}), make_coord(0, _));
  for (int step = 0; step < kColumns / 16; ++step) {
    const uint64_t own = device::advance(device::operand_descriptor(0, kRows * device::kPanelBytes),
                                         step / 4 * kRows * device::kPanelBytes + step % 4 * 32);
    const int64_t start = &steps(0, 0, step) - &tile(0, 0);
    const uint64_t fields = gmma::make_gmma_desc<gmma::Major::K>(steps(_, _, 0)).desc_;
    // The leading offset is not used by this form.
    constexpr uint64_t kUsed = ~(uint64_t{0x3fff} << 16) & ~kAddressBits;
    EXPECT_EQ(own & kUsed, fields & kUsed);
    EXPECT_EQ(own & kAddressBits, static_cast<uint64_t>(start) * 2 / 16) << step;
  }
}

TEST(wgmma_layouts, rows) {
  check_rows<128, 64>();
  check_rows<128, 128>();
  check_rows<64, 256>();
}

// V: the sum runs along a column.
template <int kRows, int kColumns>
void check_columns() {
  const auto layout = tile_to_shape(gmma::Layout_MN_SW128_Atom<Element>{},
                                    make_shape(Int<kColumns>{}, Int<kRows>{}), Step<_2, _1>{});
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      ASSERT_EQ(cute_offset(layout, column, row), panel_offset(kRows, row, column));
    }
  }
  Element* const base = nullptr;
  const auto tile = make_tensor(make_smem_ptr(base), layout);
  const auto steps = local_tile(tile, make_shape(Int<kColumns>{}, Int<16>{}), make_coord(0, _));
  for (int step = 0; step < kRows / 16; ++step) {
    const uint64_t own = device::advance(device::operand_descriptor(0, kRows * device::kPanelBytes),
                                         step * 16 * device::kPanelBytes);
    const int64_t start = &steps(0, 0, step) - &tile(0, 0);
    const uint64_t fields = gmma::make_gmma_desc<gmma::Major::MN>(steps(_, _, 0)).desc_;
    // With one panel there is no next one to lead to.
    constexpr uint64_t kLeading = kColumns > 64 ? 0 : uint64_t{0x3fff} << 16;
    EXPECT_EQ(own & ~kAddressBits & ~kLeading, fields & ~kAddressBits & ~kLeading);
    EXPECT_EQ(own & kAddressBits, static_cast<uint64_t>(start) * 2 / 16) << step;
  }
}

TEST(wgmma_layouts, columns) {
  check_columns<128, 64>();
  check_columns<128, 128>();
  check_columns<64, 256>();
}

// acc[4 * j + i] of a thread, as the head of hopper.cuh has it.
template <int n>
void check_accumulators() {
  const gmma::CLayout_64xN<n> layout;
  for (int thread = 0; thread < device::kWarpgroupSize; ++thread) {
    const int g = thread % 32 / 4, c = thread % 4 * 2;
    for (int e = 0; e < n / 2; ++e) {
      const int row = 16 * (thread / 32) + g + (e % 4 >= 2 ? 8 : 0);
      const int column = 8 * (e / 4) + c + e % 2;
      ASSERT_EQ(static_cast<int>(layout(thread, e)), row + 64 * column);
    }
  }
}

TEST(wgmma_layouts, accumulators) {
  check_accumulators<64>();
  check_accumulators<128>();
  check_accumulators<256>();
}

TEST(wgmma_layouts, operand_in_registers) {
  const gmma::ALayout_64x16 layout;
  for (int thread = 0; thread < device::kWarpgroupSize; ++thread) {
    const int g = thread % 32 / 4, c = thread % 4 * 2;
    for (int i = 0; i < 8; ++i) {  // register i / 2, its lower half first
      const int row = 16 * (thread / 32) + g + i / 2 % 2 * 8;
      const int column = c + i % 2 + i / 4 * 8;
      ASSERT_EQ(static_cast<int>(layout(thread, i)), row + 64 * column);
    }
  }
}

}  // namespace
}  // namespace longctx
