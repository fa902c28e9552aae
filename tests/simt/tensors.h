// Tensors of the kernel tests: heap blocks exactly as long as their last element, so that
// AddressSanitizer sees the first byte behind them, with NaN wherever no element is.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "longctx/params.h"
#include "modes.h"

namespace longctx::simt_tests {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

inline int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// The largest relative error of rounding to this type.
inline double unit(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 0x1p-53;
    case DType::kFloat32:
      return 0x1p-24;
    case DType::kBFloat16:
      return 0x1p-8;
    case DType::kFloat16:
      return 0x1p-11;
  }
  return kNaN;
}

inline void store(DType dtype, void* target, double value) {
  const auto put = [&](auto x) { std::memcpy(target, &x, sizeof(x)); };
  switch (dtype) {
    case DType::kFloat64:
      return put(value);
    case DType::kFloat32:
      return put(static_cast<float>(value));
    case DType::kBFloat16:
      return put(__nv_bfloat16_raw(__double2bfloat16(value)).x);
    case DType::kFloat16:
      return put(__half_raw(__double2half(value)).x);
  }
}

inline double load(DType dtype, const void* source) {
  const auto get = [&](auto x) {
    std::memcpy(&x, source, sizeof(x));
    return x;
  };
  switch (dtype) {
    case DType::kFloat64:
      return get(double());
    case DType::kFloat32:
      return get(float());
    case DType::kBFloat16:
      return __bfloat162float(get(__nv_bfloat16()));
    case DType::kFloat16:
      return __half2float(get(__half()));
  }
  return kNaN;
}

enum class Layout {
  kHeadsFirst,  // [batch, heads, seqlen, dim]
  kRowsFirst,   // [batch, seqlen, heads, dim]
  kOdd,         // heads first, rows one element apart, and no row on a 16-byte boundary for long
};

// [batch, heads, seqlen, dim], elements read and written as double.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, int64_t batch, int64_t heads, int64_t seqlen, int64_t dim,
         Layout layout = Layout::kHeadsFirst)
      : dtype_(dtype), sizes_{batch, heads, seqlen, dim} {
    const int64_t row = dim + (layout == Layout::kOdd ? 1 : 0);
    seq_stride_ = layout == Layout::kRowsFirst ? heads * row : row;
    head_stride_ = layout == Layout::kRowsFirst ? row : seqlen * row;
    batch_stride_ = heads * seqlen * row;
    first_ = layout == Layout::kOdd ? 1 : 0;
    const bool empty = batch * heads * seqlen * dim == 0;
    const int64_t elements = empty ? 0 : offset(batch - 1, heads - 1, seqlen - 1, dim - 1) + 1;
    bytes_.assign(static_cast<size_t>(elements * element_bytes(dtype)), static_cast<char>(0xff));
  }

  double get(int64_t b, int64_t h, int64_t row, int64_t d) const {
    return load(dtype_, bytes_.data() + offset(b, h, row, d) * element_bytes(dtype_));
  }
  void set(int64_t b, int64_t h, int64_t row, int64_t d, double value) {
    store(dtype_, bytes_.data() + offset(b, h, row, d) * element_bytes(dtype_), value);
  }
  template <class Visit>
  void for_each(const Visit& visit) const {
    for (int64_t b = 0; b < sizes_[0]; ++b) {
      for (int64_t h = 0; h < sizes_[1]; ++h) {
        for (int64_t row = 0; row < sizes_[2]; ++row) {
          for (int64_t d = 0; d < sizes_[3]; ++d) visit(b, h, row, d);
        }
      }
    }
  }
  void fill_normal(std::mt19937& rng) {
    std::normal_distribution<double> normal;
    for_each([&](int64_t b, int64_t h, int64_t row, int64_t d) { set(b, h, row, d, normal(rng)); });
  }
  // Bytes between the elements must stay as they were.
  void expect_gaps_untouched() const {
    Tensor copy = *this;
    copy.for_each([&](int64_t b, int64_t h, int64_t row, int64_t d) {
      std::memset(copy.bytes_.data() + copy.offset(b, h, row, d) * element_bytes(dtype_), 0xff,
                  static_cast<size_t>(element_bytes(dtype_)));
    });
    for (const char byte : copy.bytes_) {
      ASSERT_EQ(byte, static_cast<char>(0xff)) << "written between the rows";
    }
  }

  bool same_bytes(const Tensor& other) const { return bytes_ == other.bytes_; }
  int64_t size(int dim) const { return sizes_[dim]; }
  TensorView view() {
    char* first = bytes_.empty() ? nullptr : bytes_.data() + first_ * element_bytes(dtype_);
    return {first, batch_stride_, head_stride_, seq_stride_};
  }
  void* data() { return bytes_.data(); }

 private:
  int64_t offset(int64_t b, int64_t h, int64_t row, int64_t d) const {
    return first_ + b * batch_stride_ + h * head_stride_ + row * seq_stride_ + d;
  }
  DType dtype_ = DType::kFloat32;
  int64_t sizes_[4] = {};
  int64_t batch_stride_ = 0, head_stride_ = 0, seq_stride_ = 0, first_ = 0;
  std::vector<char> bytes_;
};

template <class T>
const T* data_or_null(const std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

// NaN must meet NaN, and infinity the same infinity.
inline void expect_close(double got, double expected, double tolerance, const std::string& what) {
  const bool ok = std::isnan(expected)   ? std::isnan(got)
                  : std::isinf(expected) ? got == expected
                                         : std::fabs(got - expected) <= tolerance;
  if (!ok) ADD_FAILURE() << what << ": " << got << " instead of " << expected;
}

// ThreadSanitizer sees an order that is missing whether or not it mattered this time, and is slow:
// a test runs in one mode under it, the next test in the next one.
template <class Body>
void in_every_mode(const Body& body) {
  static size_t turn = 0;
  std::vector<simt::NamedMode> modes = simt::modes();
  if (simt::tsan::active()) modes = {modes[turn++ % modes.size()]};
  for (const simt::NamedMode& mode : modes) {
    SCOPED_TRACE(mode.name);
    simt::mode = mode.mode;
    body();
    if (testing::Test::HasFailure()) return;
  }
}

}  // namespace longctx::simt_tests
