// The part of torch's stable C ABI (torch >= 2.10) that dsv3 consumes: kernels for the dispatcher, and the tensors that
// they are given. The functions are looked up in the torch that the process has loaded, so that neither the build nor
// the module depends on one.
#pragma once

#include <dlfcn.h>

#include <cstdint>

namespace dsv3::torch_abi {

inline constexpr uint64_t kVersion = 2ull << 56 | 10ull << 48;  // what the functions are asked to behave like: 2.10

using TensorHandle = struct OpaqueTensor*;
using LibraryHandle = struct OpaqueLibrary*;

// One argument or result on the dispatcher's stack: a tensor's handle, or the bytes of a scalar, lowest first.
using Value = uint64_t;

// Owns the handles of its arguments, and leaves its results, also owned handles, where the arguments were. A C++
// exception that it throws goes through the dispatcher to Python.
using Kernel = void (*)(Value* stack, uint64_t num_arguments, uint64_t num_results);

// Every function returns 0 where it succeeded, but those of dtypes and device types, which return the value.
struct Api {
  int32_t (*data_ptr)(TensorHandle, void**);
  int32_t (*dim)(TensorHandle, int64_t*);
  int32_t (*sizes)(TensorHandle, int64_t**);
  int32_t (*strides)(TensorHandle, int64_t**);
  int32_t (*dtype)(TensorHandle, int32_t*);
  int32_t (*device_type)(TensorHandle, int32_t*);
  int32_t (*device_index)(TensorHandle, int32_t*);
  int32_t (*delete_tensor)(TensorHandle);
  int32_t (*empty_strided)(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                           int32_t device_type, int32_t device_index, TensorHandle*);
  int32_t (*alias)(TensorHandle, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset,
                   TensorHandle*);
  int32_t (*current_stream)(int32_t device_index, void**);
  int32_t (*call)(const char* op, const char* overload, Value* stack, uint64_t version);
  int32_t (*init_library)(const char* name, const char* dispatch_key, const char* file, uint32_t line, LibraryHandle*);
  int32_t (*register_kernel)(LibraryHandle, const char* op, Kernel, uint64_t version);
  int32_t (*cuda)();
  int32_t (*float32)();
  int32_t (*bfloat16)();
  int32_t (*e4m3)();
  int32_t (*int32)();
  int32_t (*int64)();
  int32_t (*uint8)();
  int32_t (*boolean)();
};

template <class Function>
bool find(Function& function, const char* name) {
  void* found = dlsym(RTLD_DEFAULT, name);
  for (const char* const file : {"libtorch_cpu.so", "libtorch_cuda.so"}) {  // Python loads them with local symbols
    if (found != nullptr) break;
    if (void* const library = dlopen(file, RTLD_LAZY | RTLD_NOLOAD)) found = dlsym(library, name);
  }
  function = reinterpret_cast<Function>(found);
  return found != nullptr;
}

// Whether the loaded torch has all of it; one without CUDA has not.
inline bool load(Api& api) {
  return find(api.data_ptr, "aoti_torch_get_data_ptr") && find(api.dim, "aoti_torch_get_dim") &&
         find(api.sizes, "aoti_torch_get_sizes") && find(api.strides, "aoti_torch_get_strides") &&
         find(api.dtype, "aoti_torch_get_dtype") && find(api.device_type, "aoti_torch_get_device_type") &&
         find(api.device_index, "aoti_torch_get_device_index") &&
         find(api.delete_tensor, "aoti_torch_delete_tensor_object") &&
         find(api.empty_strided, "aoti_torch_empty_strided") && find(api.alias, "aoti_torch__reinterpret_tensor") &&
         find(api.current_stream, "aoti_torch_get_current_cuda_stream") && find(api.call, "torch_call_dispatcher") &&
         find(api.init_library, "aoti_torch_library_init_impl") && find(api.register_kernel, "torch_library_impl") &&
         find(api.cuda, "aoti_torch_device_type_cuda") && find(api.float32, "aoti_torch_dtype_float32") &&
         find(api.bfloat16, "aoti_torch_dtype_bfloat16") && find(api.e4m3, "aoti_torch_dtype_float8_e4m3fn") &&
         find(api.int32, "aoti_torch_dtype_int32") && find(api.int64, "aoti_torch_dtype_int64") &&
         find(api.uint8, "aoti_torch_dtype_uint8") && find(api.boolean, "aoti_torch_dtype_bool");
}

}  // namespace dsv3::torch_abi
