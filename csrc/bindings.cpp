// dsv3._C: the native ops as Python functions (bind.h). Ops that torch's dispatcher calls without Python are in
// torch_ops.cpp.
#include <string>
#include <utility>

#include "bind.h"
#include "comm/peers.h"
#include "ops.h"
#include "torch_ops.h"

namespace {

using dsv3::bind::define;

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
  dsv3::bind::peers<dsv3::Peers>(m, "Peers").def(py::init<int, int, int, int, int, int, int, int, int, double>());
}

}  // namespace

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
  define(m, "moe_gate_loads", dsv3::moe_gate_loads);
  define(m, "moe_gate_loads_backward", dsv3::moe_gate_loads_backward);
  define(m, "moe_permutation", dsv3::moe_permutation);
  define(m, "moe_permute", dsv3::moe_permute);
  define(m, "moe_permute_cast", dsv3::moe_permute_cast);
  define(m, "moe_unpermute", dsv3::moe_unpermute);
  define(m, "swiglu", dsv3::swiglu);
  define(m, "swiglu_backward", dsv3::swiglu_backward);
  define(m, "swiglu_cast", dsv3::swiglu_cast);
  define(m, "swiglu_cast_backward", dsv3::swiglu_cast_backward);
  define(m, "swiglu_backward_both_casts", dsv3::swiglu_backward_both_casts);
  define(m, "few_linear", dsv3::few_linear);
  define(m, "few_heads", dsv3::few_heads);
  define(m, "mla_absorb", dsv3::mla_absorb);
  define(m, "few_attention", dsv3::few_attention);
  m.def("few_attention_pieces", dsv3::few_attention_pieces);
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
