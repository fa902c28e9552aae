// Argument checks with one message format:
//   longctx::<op>: `<argument>` must <rule>; got <what was passed>
// std::invalid_argument reaches Python as a ValueError with exactly this text. Everything is
// checked before the first allocation, so a bad call writes nothing.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "longctx/params.h"

namespace longctx {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kAnySize = -1;

inline std::string to_text(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << "]";
  return text.str();
}

inline std::string to_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return std::string(torch::headeronly::toString(type));
  }
}

// What was passed, in words: made from these only where a check fails, since a stream costs more
// than all that is checked.
struct Strides {
  const Tensor& tensor;
};
struct Beside {
  int64_t first, second;
};
template <class Got>
const Got& to_text(const Got& got) {
  return got;
}
inline std::string to_text(Strides strides) {
  return "strides " + to_text(strides.tensor.strides());
}
inline std::string to_text(Beside sizes) {
  return std::to_string(sizes.first) + " beside " + std::to_string(sizes.second);
}

inline std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another device";
}

// What is checked about the arguments of one op.
class Checker {
 public:
  explicit Checker(const char* op) : op_(op) {}

  template <class Got>
  [[noreturn]] void fail(const char* argument, const std::string& rule, const Got& got) const {
    std::ostringstream text;
    text << "longctx::" << op_ << ": `" << argument << "` must " << rule << "; got "
         << to_text(got);
    throw std::invalid_argument(text.str());
  }

  template <class Got>
  void require(bool ok, const char* argument, const char* rule, const Got& got) const {
    if (!ok) fail(argument, rule, got);
  }

  // `names` is the shape in words; expected sizes are kAnySize where any size will do.
  void shape(const char* argument, const Tensor& tensor, const char* names,
             std::initializer_list<int64_t> expected) const {
    bool ok = tensor.dim() == static_cast<int64_t>(expected.size());
    int64_t dim = 0;
    for (const int64_t size : expected) {
      ok = ok && (size == kAnySize || tensor.size(dim) == size);
      ++dim;
    }
    if (ok) return;
    std::ostringstream wanted;
    wanted << "have shape " << names << " = [";
    dim = 0;
    for (const int64_t size : expected) {
      wanted << (dim++ ? ", " : "");
      size == kAnySize ? wanted << "*" : wanted << size;
    }
    fail(argument, wanted.str() + "]", tensor.sizes());
  }

  void dtype(const char* argument, const Tensor& tensor, ScalarType expected) const {
    if (tensor.scalar_type() != expected) {
      fail(argument, "have dtype " + to_text(expected), tensor.scalar_type());
    }
  }

  DType floating(const char* argument, const Tensor& tensor) const {
    switch (tensor.scalar_type()) {
      case ScalarType::Float:
        return DType::kFloat32;
      case ScalarType::Double:
        return DType::kFloat64;
      case ScalarType::BFloat16:
        return DType::kBFloat16;
      case ScalarType::Half:
        return DType::kFloat16;
      default:
        fail(argument, "have dtype float32, float64, bfloat16 or float16", tensor.scalar_type());
    }
  }

  void same_device(const char* argument, const Tensor& tensor, const Tensor& first) const {
    if (!(tensor.device() == first.device())) {
      fail(argument, "be on the device of the first argument, " + device_text(first),
           device_text(tensor));
    }
  }

  void contiguous_last_dim(const char* argument, const Tensor& tensor) const {
    const int64_t last = tensor.dim() - 1;
    if (tensor.size(last) > 1 && tensor.stride(last) != 1) {
      fail(argument, "be contiguous in its last dim", Strides{tensor});
    }
  }

  void contiguous(const char* argument, const Tensor& tensor) const {
    if (!tensor.is_contiguous()) {
      fail(argument, "be contiguous", Strides{tensor});
    }
  }

  void finite(const char* argument, double value) const {
    require(std::isfinite(value), argument, "be finite", value);
  }

  const char* op() const { return op_; }

 private:
  const char* op_;
};

// Uninitialised, contiguous, on the device of `like`: straight from the allocator, where
// torch::stable::new_empty looks an op up by name.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                         ScalarType dtype) {
  std::array<int64_t, 16> strides;
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= std::max<int64_t>(sizes[dim], 1);
  }
  const auto device = like.device();
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), static_cast<int32_t>(dtype),
      static_cast<int32_t>(device.type()), device.index(), &result));
  return Tensor(result);
}

inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return new_tensor(like, sizes, like.scalar_type());
}

// A short string argument. The stable ABI's own conversion to std::string leaks the string; this
// one frees the handle it was given.
struct Name {
  std::string text;
};

}  // namespace longctx

HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)

template <>
struct ToImpl<longctx::Name> {
  static longctx::Name call(StableIValue value, [[maybe_unused]] uint64_t version,
                            [[maybe_unused]] bool is_internal) {
    const auto handle = to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    longctx::Name name{std::string(data, length)};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return name;
  }
};

HIDDEN_NAMESPACE_END(torch, stable, detail)
