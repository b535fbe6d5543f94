// dsv3._C: the native ops as Python functions. Tensors come in through DLPack's C exchange API, which also tells the
// current stream, so the module links neither libtorch nor a shared CUDA runtime and serves every torch >= 2.10. Ops that
// torch's dispatcher calls without Python are in torch_ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "comm/peers.h"
#include "common/device_error.h"
#include "common/dlpack.h"
#include "common/tensor.h"
#include "ops.h"
#include "torch_ops.h"

namespace py = pybind11;

namespace {

using dsv3::dlpack::ExchangeApi;

// The exchange table of a tensor type; the last one asked for is remembered, since a process uses one framework.
const ExchangeApi* exchange_api(PyTypeObject* type) {
  static PyTypeObject* last_type = nullptr;
  static const ExchangeApi* last_api = nullptr;
  if (type == last_type) return last_api;
  const py::object capsule = py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
  if (capsule.is_none()) return nullptr;
  void* const table = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (table == nullptr) throw py::error_already_set();
  last_type = type;
  last_api = static_cast<const ExchangeApi*>(table);
  return last_api;
}

// What the argument caster saw last, for the stream of the call. Calls hold the GIL from casting until they have that.
const ExchangeApi* current_api = nullptr;

cudaStream_t current_stream(const dsv3::Tensor& t) {
  DSV3_CHECK(t.is_cuda(), "native ops take CUDA tensors, got a CPU tensor of shape ", t);
  void* stream = nullptr;
  if (current_api->current_work_stream(dsv3::dlpack::kCUDA, t.device(), &stream) != 0) throw py::error_already_set();
  return static_cast<cudaStream_t>(stream);
}

const dsv3::Tensor& first_tensor(const dsv3::Tensor& t) { return t; }
const dsv3::Tensor& first_tensor(const std::vector<dsv3::Tensor>& list) {
  DSV3_CHECK(!list.empty(), "the first list of tensors is empty");
  return list.front();
}

// Defines a Python function for `void op(Tensor first, ..., cudaStream_t)`: the stream is the framework's current one.
template <class First, class... Args, size_t... kIndex>
void define(py::module_& m, const char* name, void (*op)(First, Args...), std::index_sequence<kIndex...>) {
  using All = std::tuple<First, Args...>;
  m.def(name, [op](std::tuple_element_t<kIndex, All>... args) {
    const cudaStream_t stream = current_stream(first_tensor(std::get<0>(std::tie(args...))));
    const py::gil_scoped_release release;  // a launch waits where the queue is full, and other threads are to go on
    const std::lock_guard lock(dsv3::torch_ops::launching());
    dsv3::raise_device_error();
    op(std::move(args)..., stream);
  });
}
template <class... Args>
void define(py::module_& m, const char* name, void (*op)(Args...)) {
  define(m, name, op, std::make_index_sequence<sizeof...(Args) - 1>{});
}

// A Python exception on its way from an op of dsv3_python through torch's dispatcher, whose C interface drops it: kept
// before, and raised once more where torch's own pybind11 turns C++ exceptions into Python's.
class KeptError : public py::builtin_exception {
 public:
  using builtin_exception::builtin_exception;
  static void keep(py::object error) {
    Py_XDECREF(kept_);
    kept_ = error.release().ptr();
  }
  static void throw_kept() {
    if (kept_ == nullptr) throw std::runtime_error("torch could not call an op of dsv3_python");
    throw KeptError("an op of dsv3_python raised an exception");
  }
  void set_error() const override {
    const py::object error = py::reinterpret_steal<py::object>(std::exchange(kept_, nullptr));
    if (!error) return PyErr_SetString(PyExc_RuntimeError, what());  // rethrown on another thread
    PyErr_SetObject(py::type::handle_of(error).ptr(), error.ptr());
  }

 private:
  static thread_local PyObject* kept_;
};
thread_local PyObject* KeptError::kept_ = nullptr;

void define_torch_ops(py::module_& m) {
  dsv3::torch_ops::throw_python_error = KeptError::throw_kept;
  m.def("register_torch_op", dsv3::torch_ops::register_op);
  m.def("use_device", dsv3::torch_ops::use_device);
  m.def("force_references", dsv3::torch_ops::force_references);
  m.def("keep_error", KeptError::keep);
}

void define_peers(py::module_& m) {
  using dsv3::Peers;
  py::class_<Peers>(m, "Peers")
      .def(py::init<int, int, int, int, int, int, int, double>())
      .def_property_readonly("handle", [](const Peers& peers) { return py::bytes(peers.handle()); })
      .def_property_readonly("bytes", &Peers::bytes)
      .def_property_readonly("lost", &Peers::lost)
      .def("give_up", &Peers::give_up)
      .def("take_long_wait", &Peers::take_long_wait)
      .def("connect", &Peers::connect)
      .def("disconnect", &Peers::disconnect)
      .def("release", &Peers::release);
}

}  // namespace

namespace pybind11::detail {
template <>
struct type_caster<dsv3::Tensor> {
  PYBIND11_TYPE_CASTER(dsv3::Tensor, const_name("Tensor"));
  bool load(handle source, bool) {
    const ExchangeApi* const api = exchange_api(Py_TYPE(source.ptr()));
    if (api == nullptr || api->tensor_from_py_object == nullptr) return false;
    dsv3::dlpack::Tensor view;
    if (api->tensor_from_py_object(source.ptr(), &view) != 0) throw error_already_set();
    current_api = api;
    value = dsv3::Tensor(view);
    return true;
  }
};
}  // namespace pybind11::detail

PYBIND11_MODULE(_C, m) {
  define_torch_ops(m);
  define(m, "rmsnorm", dsv3::rmsnorm);
  define(m, "rmsnorm_cast", dsv3::rmsnorm_cast);
  define(m, "rmsnorm_backward", dsv3::rmsnorm_backward);
  define(m, "per_token_cast", dsv3::per_token_cast);
  define(m, "per_block_cast", dsv3::per_block_cast);
  define(m, "cast_transpose", dsv3::cast_transpose);
  define(m, "per_token_cast_and_transpose", dsv3::per_token_cast_and_transpose);
  define(m, "fp8_gemm", dsv3::fp8_gemm);
  m.def("fp8_gemm_turns", dsv3::fp8_gemm_turns);
  define(m, "grouped_fp8_gemm", dsv3::grouped_fp8_gemm);
  define(m, "masked_grouped_fp8_gemm", dsv3::masked_grouped_fp8_gemm);
  define(m, "grouped_fp8_wgrad", dsv3::grouped_fp8_wgrad);
  define(m, "rope_", dsv3::rope_);
  define(m, "mla_append_kv", dsv3::mla_append_kv);
  define(m, "mla_schedule", dsv3::mla_schedule);
  define(m, "mla_decode", dsv3::mla_decode);
  define(m, "mla_attention", dsv3::mla_attention);
  define(m, "mla_merge", dsv3::mla_merge);
  define(m, "mla_attention_backward", dsv3::mla_attention_backward);
  define(m, "moe_gate", dsv3::moe_gate);
  define(m, "moe_gate_backward", dsv3::moe_gate_backward);
  define(m, "moe_permutation", dsv3::moe_permutation);
  define(m, "moe_permute", dsv3::moe_permute);
  define(m, "moe_unpermute", dsv3::moe_unpermute);
  define(m, "swiglu", dsv3::swiglu);
  define(m, "swiglu_backward", dsv3::swiglu_backward);
  define(m, "swiglu_cast", dsv3::swiglu_cast);
  define(m, "swiglu_cast_backward", dsv3::swiglu_cast_backward);
  define(m, "few_linear", dsv3::few_linear);
  define(m, "few_heads", dsv3::few_heads);
  define(m, "mla_absorb", dsv3::mla_absorb);
  define(m, "few_attention", dsv3::few_attention);
  define(m, "few_gate", dsv3::few_gate);
  define(m, "few_experts", dsv3::few_experts);
  define(m, "combine_norm", dsv3::combine_norm);
  define(m, "decode_positions", dsv3::decode_positions);
  define(m, "greedy_round", dsv3::greedy_round);
  define_peers(m);
  define(m, "comm_exchange", dsv3::comm_exchange);
  define(m, "comm_dispatch", dsv3::comm_dispatch);
  define(m, "comm_combine", dsv3::comm_combine);
  define(m, "comm_send", dsv3::comm_send);
  define(m, "comm_receive", dsv3::comm_receive);
  define(m, "comm_send_sums", dsv3::comm_send_sums);
  define(m, "comm_receive_sums", dsv3::comm_receive_sums);
  define(m, "cross_entropy_", dsv3::cross_entropy_);
  define(m, "adamw", dsv3::adamw);
}
