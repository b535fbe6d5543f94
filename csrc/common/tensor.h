// A non-owning tensor view, valid for the duration of one call, and the checks that every host function makes on it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "dlpack.h"

namespace dsv3 {

enum class Dtype { kFloat32, kBFloat16, kE4M3, kInt32, kInt64, kUInt8, kBool, kOther };

inline const char* dtype_name(Dtype dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float8_e4m3fn", "int32", "int64", "uint8", "bool", "other"};
  return kNames[static_cast<int>(dtype)];
}

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(const dlpack::Tensor& view) : view_(view) {}

  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(view_.data) + view_.byte_offset);
  }
  int dim() const { return view_.ndim; }
  int64_t size(int i) const { return view_.shape[i < 0 ? i + view_.ndim : i]; }
  int64_t stride(int i) const {
    if (i < 0) i += view_.ndim;
    if (view_.strides != nullptr) return view_.strides[i];
    int64_t stride = 1;
    for (int j = i + 1; j < view_.ndim; ++j) stride *= view_.shape[j];
    return stride;
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < view_.ndim; ++i) n *= view_.shape[i];
    return n;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int i = view_.ndim - 1; i >= 0; --i) {
      if (view_.shape[i] != 1 && stride(i) != expected) return numel() == 0;
      expected *= view_.shape[i];
    }
    return true;
  }
  bool is_cuda() const { return view_.device.type == dlpack::kCUDA; }
  int device() const { return view_.device.id; }
  Dtype dtype() const {
    const auto [code, bits, lanes] = view_.dtype;
    if (lanes != 1) return Dtype::kOther;
    switch (code) {
      case dlpack::kFloat:
        return bits == 32 ? Dtype::kFloat32 : Dtype::kOther;
      case dlpack::kBfloat:
        return bits == 16 ? Dtype::kBFloat16 : Dtype::kOther;
      case dlpack::kFloat8E4M3FN:
        return bits == 8 ? Dtype::kE4M3 : Dtype::kOther;
      case dlpack::kInt:
        return bits == 32 ? Dtype::kInt32 : bits == 64 ? Dtype::kInt64 : Dtype::kOther;
      case dlpack::kUInt:
        return bits == 8 ? Dtype::kUInt8 : Dtype::kOther;
      case dlpack::kBool:
        return bits == 8 ? Dtype::kBool : Dtype::kOther;
      default:
        return Dtype::kOther;
    }
  }
  bool aligned(int bytes) const { return reinterpret_cast<uintptr_t>(data<char>()) % bytes == 0; }

 private:
  dlpack::Tensor view_{};
};

inline std::string shape_string(const Tensor& t) {
  std::string text = "(";
  for (int i = 0; i < t.dim(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(t.size(i));
  }
  return text + ") " + dtype_name(t.dtype());
}

namespace detail {
inline std::string text(const Tensor& t) { return shape_string(t); }
inline std::string text(const char* s) { return s; }
inline std::string text(const std::string& s) { return s; }
inline std::string text(Dtype dtype) { return dtype_name(dtype); }
inline std::string text(bool value) { return value ? "true" : "false"; }
template <class T>
std::string text(const T& value) {
  return std::to_string(value);
}
template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::string message;
  ((message += text(args)), ...);
  throw std::invalid_argument(message);
}
}  // namespace detail

// A bad argument: ValueError in Python, with the values that were found.
#define DSV3_CHECK(condition, ...)                       \
  do {                                                   \
    if (!(condition)) ::dsv3::detail::fail(__VA_ARGS__); \
  } while (0)

// What every operand of a kernel must be: on the GPU, contiguous, of the dtype named, and 16-byte aligned, since all but
// integers are read in vectors.
inline void check_operand(const char* name, const Tensor& t, Dtype dtype) {
  DSV3_CHECK(t.is_cuda(), name, " must be on a CUDA device, got a CPU tensor of shape ", t);
  DSV3_CHECK(t.dtype() == dtype, name, " must be ", dtype, ", got ", t);
  DSV3_CHECK(t.is_contiguous(), name, " must be contiguous, got strides that are not, of shape ", t);
  const bool scalars = dtype == Dtype::kInt32 || dtype == Dtype::kInt64;
  DSV3_CHECK(scalars || t.aligned(16) || t.numel() == 0, name, " must be 16-byte aligned, of shape ", t);
}

template <class... Sizes>
void check_shape(const char* name, const Tensor& t, Sizes... sizes) {
  const int64_t expected[] = {static_cast<int64_t>(sizes)...};
  bool same = t.dim() == static_cast<int>(sizeof...(sizes));
  for (int i = 0; same && i < t.dim(); ++i) same = t.size(i) == expected[i];
  if (same) return;
  std::string wanted = "(";
  for (size_t i = 0; i < sizeof...(sizes); ++i) {
    if (i > 0) wanted += ", ";
    wanted += std::to_string(expected[i]);
  }
  detail::fail(name, " must have shape ", wanted, "), got ", t);
}

template <class... Sizes>
void check_operand(const char* name, const Tensor& t, Dtype dtype, Sizes... sizes) {
  check_operand(name, t, dtype);
  check_shape(name, t, sizes...);
}

template <class A, class B>
constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// Scales of rows of tiles: fp32 (rows, tiles) with the rows contiguous and a column stride that is a multiple of 16
// bytes, as TMA wants it. Returns the stride.
inline int64_t check_row_scales(const char* name, const Tensor& sf, int64_t rows, int64_t tiles) {
  const int64_t stride = ceil_div(rows, 4) * 4;
  DSV3_CHECK(sf.is_cuda(), name, " must be on a CUDA device, got a CPU tensor of shape ", sf);
  DSV3_CHECK(sf.dtype() == Dtype::kFloat32, name, " must be float32, got ", sf);
  check_shape(name, sf, rows, tiles);
  const bool strided = (rows <= 1 || sf.stride(0) == 1) && (tiles <= 1 || sf.stride(1) == stride);
  DSV3_CHECK(strided || sf.numel() == 0, name, " must have strides (1, ", stride, "), got (", sf.stride(0), ", ",
             sf.stride(1), ")");
  return stride;
}

}  // namespace dsv3
