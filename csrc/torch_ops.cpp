// A kernel of an op takes the arguments of its schema in their order, allocates its result and calls the native op. An op
// that is not here runs from Python.
#include "torch_ops.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <initializer_list>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "common/device_error.h"
#include "common/tensor.h"
#include "launching.h"
#include "ops.h"
#include "torch_abi.h"

namespace dsv3::torch_ops {

void (*throw_python_error)() = nullptr;

namespace {

using torch_abi::TensorHandle;
using torch_abi::Value;

constexpr int kMaxDevices = 64;
constexpr int kMaxDtypes = 64;
constexpr int kMaxDims = 8;
constexpr int64_t kTile = 128;

// A dtype as torch numbers it.
enum class ScalarType : int32_t {};

torch_abi::Api torch;
int32_t cuda_type = 0;
ScalarType e4m3 = {}, float32 = {}, int32 = {};
std::array<dlpack::DataType, kMaxDtypes> dtypes = {};  // of torch's numbers; one that no op takes has 0 bits
std::array<std::atomic<bool>, kMaxDevices> usable = {};
std::atomic<bool> references_forced = false;

bool load_torch() {
  if (!torch_abi::load(torch)) return false;
  cuda_type = torch.cuda();
  e4m3 = ScalarType{torch.e4m3()};
  float32 = ScalarType{torch.float32()};
  int32 = ScalarType{torch.int32()};
  const auto name = [](int32_t torch_dtype, dlpack::TypeCode code, uint8_t bits) {
    dtypes.at(torch_dtype) = {code, bits, 1};
  };
  name(torch.float32(), dlpack::kFloat, 32);
  name(torch.bfloat16(), dlpack::kBfloat, 16);
  name(torch.e4m3(), dlpack::kFloat8E4M3FN, 8);
  name(torch.int32(), dlpack::kInt, 32);
  name(torch.int64(), dlpack::kInt, 64);
  name(torch.uint8(), dlpack::kUInt, 8);
  name(torch.boolean(), dlpack::kBool, 8);
  return true;
}

void check(int32_t status, const char* what) {
  if (status != 0) throw std::runtime_error(std::string("torch: ") + what + " failed");
}

// A view of a tensor that lives as long as its handle.
Tensor view(TensorHandle handle) {
  dlpack::Tensor t = {};
  int64_t dim = 0;
  int32_t dtype = 0, type = 0;
  int32_t failed = torch.data_ptr(handle, &t.data) | torch.dim(handle, &dim) | torch.sizes(handle, &t.shape);
  failed |= torch.strides(handle, &t.strides) | torch.dtype(handle, &dtype);
  failed |= torch.device_type(handle, &type) | torch.device_index(handle, &t.device.id);
  check(failed, "reading a tensor");
  t.ndim = static_cast<int32_t>(dim);
  t.device.type = type == cuda_type ? dlpack::kCUDA : dlpack::kCPU;
  if (dtype >= 0 && dtype < kMaxDtypes) t.dtype = dtypes[dtype];
  return Tensor(t);
}

// A result that is ours until the dispatcher has it.
class NewTensor {
 public:
  explicit NewTensor(TensorHandle handle) : handle_(handle) {}
  NewTensor(NewTensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  ~NewTensor() {
    if (handle_ != nullptr) torch.delete_tensor(handle_);
  }
  operator Tensor() const { return view(handle_); }
  NewTensor alias(const int64_t* sizes, const int64_t* strides, int dim) const {
    TensorHandle made = nullptr;
    check(torch.alias(handle_, dim, sizes, strides, 0, &made), "a view");
    return NewTensor(made);
  }
  Value release() { return reinterpret_cast<Value>(std::exchange(handle_, nullptr)); }

 private:
  TensorHandle handle_;
};

NewTensor strided(const Tensor& like, const int64_t* sizes, const int64_t* strides, int dim, ScalarType dtype) {
  TensorHandle made = nullptr;
  const auto number = static_cast<int32_t>(dtype);
  if (torch.empty_strided(dim, sizes, strides, number, cuda_type, like.device(), &made) != 0) throw std::bad_alloc();
  return NewTensor(made);
}

// Row-major, on the device of another tensor.
NewTensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[kMaxDims], stride = 1;
  const int dim = static_cast<int>(sizes.size());
  for (int i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes.begin()[i], 1);
  }
  return strided(like, sizes.begin(), strides, dim, dtype);
}

// Scales of rows of tiles, as empty_row_scales of reference/quant.py makes them: the last column too has memory for
// whole 16 bytes.
NewTensor empty_row_scales(const Tensor& like, int64_t rows, int64_t tiles) {
  const int64_t padded = ceil_div(rows, 4) * 4, strides[] = {1, padded};
  const int64_t sizes[] = {padded, tiles}, part[] = {rows, tiles};
  NewTensor whole = strided(like, sizes, strides, 2, float32);
  return padded == rows ? std::move(whole) : whole.alias(part, strides, 2);
}

// Calls a native op on torch's current stream.
template <class... Params, class... Args>
void launch(void (*op)(Params...), const Tensor& first, Args&&... args) {
  void* stream = nullptr;
  check(torch.current_stream(first.device(), &stream), "the current stream");
  const std::lock_guard lock(launching());
  raise_device_error();
  op(first, std::forward<Args>(args)..., static_cast<cudaStream_t>(stream));
}

template <class T>
T argument(Value value) {
  if constexpr (std::is_same_v<T, Tensor>) {
    return view(reinterpret_cast<TensorHandle>(value));
  } else if constexpr (std::is_same_v<T, double>) {
    return std::bit_cast<double>(value);
  } else {
    static_assert(std::is_same_v<T, bool> || std::is_same_v<T, ScalarType>, "an argument of no kernel so far");
    return static_cast<T>(value & (std::is_same_v<T, bool> ? 0xff : 0xffffffff));
  }
}

// The name of an op as a template argument.
template <size_t kSize>
struct Name {
  char text[kSize];
  consteval Name(const char (&name)[kSize]) { std::copy_n(name, kSize, text); }
};

template <class... Args, size_t... kIndex>
void free_tensors(const Value* stack, std::index_sequence<kIndex...>) {
  const auto free_tensor = [](Value value) { torch.delete_tensor(reinterpret_cast<TensorHandle>(value)); };
  ((std::is_same_v<Args, Tensor> ? free_tensor(stack[kIndex]) : void()), ...);
}

void give(NewTensor& result, Value* stack) { stack[0] = result.release(); }
template <size_t kSize>
void give(std::array<NewTensor, kSize>& results, Value* stack) {
  for (size_t i = 0; i < kSize; ++i) stack[i] = results[i].release();
}

// Calls the op on the arguments on the stack and puts its results, if it has any, in their place. False, with the stack
// as it was, where references run or the op refused the arguments, which it does before it launches anything.
template <class Result, class... Args, size_t... kIndex>
bool run(Result (*op)(Args...), Value* stack, std::index_sequence<kIndex...> all) {
  const int device = argument<Tensor>(stack[0]).device();
  if (references_forced || device < 0 || device >= kMaxDevices || !usable[device]) return false;
  try {
    if constexpr (std::is_void_v<Result>) {
      op(argument<Args>(stack[kIndex])...);
      free_tensors<Args...>(stack, all);
    } else {
      Result result = op(argument<Args>(stack[kIndex])...);
      free_tensors<Args...>(stack, all);
      give(result, stack);
    }
    return true;
  } catch (const std::invalid_argument&) {  // a shape that the kernel does not take, or a mistake: Python says which
  } catch (const std::bad_alloc&) {         // Python tries again and raises torch's own error
  } catch (...) {
    free_tensors<Args...>(stack, all);
    throw;
  }
  return false;
}
template <class Result, class... Args>
bool run(Result (*op)(Args...), Value* stack) {
  return run(op, stack, std::index_sequence_for<Args...>{});
}

template <Name kName, auto kOp>
void boxed(Value* stack, uint64_t, uint64_t) {
  if (run(kOp, stack)) return;
  const std::string name = std::string("dsv3_python::") + kName.text;
  if (torch.call(name.c_str(), "", stack, torch_abi::kVersion) != 0) throw_python_error();
}

struct Op {
  std::string_view name;
  torch_abi::Kernel kernel;
};

template <Name kName, auto kOp>
constexpr Op op() {
  return {kName.text, boxed<kName, kOp>};
}

// ---- quant ----
std::array<NewTensor, 2> per_token_cast(Tensor x, bool pow2_scale, double amax_floor) {
  DSV3_CHECK(x.dim() == 2, "x must be (T, K), got ", x);
  NewTensor out = empty(x, {x.size(0), x.size(1)}, e4m3);
  NewTensor sf = empty_row_scales(x, x.size(0), ceil_div(x.size(1), kTile));
  launch(dsv3::per_token_cast, out, sf, x, pow2_scale, amax_floor);
  return {std::move(out), std::move(sf)};
}

// ---- gemm ----
// NOTE: the rules of ops/gemm.py are asked only about what is refused here or by the native op.
void check_dense(const Tensor& a, const Tensor& b) {
  DSV3_CHECK(a.dim() == 2 && b.dim() == 2, "a and b must be matrices, got ", a, " and ", b);
}
void check_groups(const Tensor& a, int dim, const Tensor& b) {
  DSV3_CHECK(a.dim() == dim && b.dim() == 3 && b.size(0) > 0, "b must be (G, N, K) with G at least 1, got ", b);
}

// Workspace, where both operands have scales of rows.
std::optional<NewTensor> empty_turns(const Tensor& a, const Tensor& b, const Tensor& b_sf) {
  if (b_sf.dim() != 2 || b_sf.size(0) != b.size(0)) return std::nullopt;
  return empty(a, {dsv3::fp8_gemm_turns(a.size(0), b.size(0))}, int32);
}
std::optional<Tensor> as_optional(const std::optional<NewTensor>& made) {
  return made ? std::optional<Tensor>(*made) : std::nullopt;
}

NewTensor fp8_gemm(Tensor a, Tensor a_sf, Tensor b, Tensor b_sf, ScalarType out_dtype, bool batch_invariant,
                   bool static_weights) {
  check_dense(a, b);
  NewTensor out = empty(a, {a.size(0), b.size(0)}, out_dtype);
  const auto turns = empty_turns(a, b, b_sf);
  launch(dsv3::fp8_gemm, out, as_optional(turns), a, a_sf, b, b_sf, false, batch_invariant, static_weights);
  return out;
}

void fp8_gemm_out(Tensor a, Tensor a_sf, Tensor b, Tensor b_sf, Tensor out, bool accumulate, bool batch_invariant,
                  bool static_weights) {
  check_dense(a, b);
  const auto turns = empty_turns(a, b, b_sf);
  launch(dsv3::fp8_gemm, out, as_optional(turns), a, a_sf, b, b_sf, accumulate, batch_invariant, static_weights);
}

NewTensor grouped_fp8_gemm(Tensor a, Tensor a_sf, Tensor b, Tensor b_sf, Tensor offsets, ScalarType out_dtype,
                           bool batch_invariant) {
  check_groups(a, 2, b);
  NewTensor out = empty(a, {a.size(0), b.size(1)}, out_dtype);
  launch(dsv3::grouped_fp8_gemm, out, a, a_sf, b, b_sf, offsets, batch_invariant);
  return out;
}

void grouped_fp8_gemm_out(Tensor a, Tensor a_sf, Tensor b, Tensor b_sf, Tensor offsets, Tensor out,
                          bool batch_invariant) {
  check_groups(a, 2, b);
  launch(dsv3::grouped_fp8_gemm, out, a, a_sf, b, b_sf, offsets, batch_invariant);
}

NewTensor masked_grouped_fp8_gemm(Tensor a, Tensor a_sf, Tensor b, Tensor b_sf, Tensor counts, ScalarType out_dtype,
                                  bool batch_invariant) {
  check_groups(a, 3, b);
  NewTensor out = empty(a, {a.size(0), a.size(1), b.size(1)}, out_dtype);
  launch(dsv3::masked_grouped_fp8_gemm, out, a, a_sf, b, b_sf, counts, batch_invariant);
  return out;
}

void masked_grouped_fp8_gemm_out(Tensor a, Tensor a_sf, Tensor b, Tensor b_sf, Tensor counts, Tensor out,
                                 bool batch_invariant) {
  check_groups(a, 3, b);
  launch(dsv3::masked_grouped_fp8_gemm, out, a, a_sf, b, b_sf, counts, batch_invariant);
}

void grouped_fp8_wgrad(Tensor a_t, Tensor a_sf, Tensor b_t, Tensor b_sf, Tensor offsets, Tensor out) {
  check_dense(a_t, b_t);
  DSV3_CHECK(a_t.size(0) % 16 == 0 && b_t.size(0) % 16 == 0, "N and K must be multiples of 16, got ", a_t, " and ",
             b_t);
  DSV3_CHECK(out.dim() == 3 && out.size(0) > 0, "out must be (G, N, K) with G at least 1, got ", out);
  launch(dsv3::grouped_fp8_wgrad, out, a_t, a_sf, b_t, b_sf, offsets);
}

constexpr Op kOps[] = {
    op<"per_token_cast", per_token_cast>(),
    op<"fp8_gemm", fp8_gemm>(),
    op<"fp8_gemm_out", fp8_gemm_out>(),
    op<"grouped_fp8_gemm", grouped_fp8_gemm>(),
    op<"grouped_fp8_gemm_out", grouped_fp8_gemm_out>(),
    op<"masked_grouped_fp8_gemm", masked_grouped_fp8_gemm>(),
    op<"masked_grouped_fp8_gemm_out", masked_grouped_fp8_gemm_out>(),
    op<"grouped_fp8_wgrad", grouped_fp8_wgrad>(),
};

}  // namespace

bool register_op(const char* name, const char* dispatch_key) {
  static const bool loaded = load_torch();
  const Op* const found = std::find_if(std::begin(kOps), std::end(kOps), [&](const Op& op) { return op.name == name; });
  if (!loaded || found == std::end(kOps)) return false;
  // Never deleted: what it registers stays as long as the process.
  torch_abi::LibraryHandle library = nullptr;
  check(torch.init_library("dsv3", dispatch_key, "csrc/torch_ops.cpp", __LINE__, &library), "making a library");
  check(torch.register_kernel(library, name, found->kernel, torch_abi::kVersion), "registering a kernel");
  return true;
}

void use_device(int index) {
  if (index >= 0 && index < kMaxDevices) usable[index] = true;
}

void force_references(bool forced) { references_forced = forced; }

}  // namespace dsv3::torch_ops
