// Native ops as Python functions. Tensors come in through DLPack's C exchange API, which also tells the current stream, so a module
// links neither libtorch nor a shared CUDA runtime and serves every torch >= 2.10.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "common/device_error.h"
#include "common/dlpack.h"
#include "common/tensor.h"
#include "launching.h"

typedef struct CUstream_st* cudaStream_t;

namespace py = pybind11;

namespace dsv3::bind {

// The exchange table of a tensor type; the last one asked for is remembered, since a process uses one framework.
inline const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  static PyTypeObject* last_type = nullptr;
  static const dlpack::ExchangeApi* last_api = nullptr;
  if (type == last_type) return last_api;
  const py::object capsule = py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
  if (capsule.is_none()) return nullptr;
  void* const table = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (table == nullptr) throw py::error_already_set();
  last_type = type;
  last_api = static_cast<const dlpack::ExchangeApi*>(table);
  return last_api;
}

// What the argument caster saw last, for the stream of the call. Calls hold the GIL from casting until they have that.
inline const dlpack::ExchangeApi* current_api = nullptr;

inline cudaStream_t current_stream(const Tensor& t) {
  DSV3_CHECK(t.is_cuda(), "native ops take CUDA tensors, got a CPU tensor of shape ", t);
  void* stream = nullptr;
  if (current_api->current_work_stream(dlpack::kCUDA, t.device(), &stream) != 0) throw py::error_already_set();
  return static_cast<cudaStream_t>(stream);
}

inline const Tensor& first_tensor(const Tensor& t) { return t; }
inline const Tensor& first_tensor(const std::vector<Tensor>& list) {
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
    const std::lock_guard lock(launching());
    raise_device_error();
    op(std::move(args)..., stream);
  });
}
template <class... Args>
void define(py::module_& m, const char* name, void (*op)(Args...)) {
  define(m, name, op, std::make_index_sequence<sizeof...(Args) - 1>{});
}

// The class of what ranks of a node share (comm/peers.h), without its constructor.
template <class Class>
py::class_<Class> peers(py::module_& m, const char* name) {
  return py::class_<Class>(m, name, py::module_local())
      .def_property_readonly("handle", [](const Class& peers) { return py::bytes(peers.handle()); })
      .def_property_readonly("bytes", [](const Class& peers) { return peers.bytes(); })
      .def_property_readonly("lost", [](const Class& peers) { return peers.lost(); })
      .def("give_up", [](Class& peers, int rank) { peers.give_up(rank); })
      .def("take_long_wait", [](Class& peers) { return peers.take_long_wait(); })
      .def("connect", [](Class& peers, const std::vector<std::string>& handles) { peers.connect(handles); })
      .def("disconnect", [](Class& peers) { peers.disconnect(); })
      .def("release", [](Class& peers) { peers.release(); });
}

}  // namespace dsv3::bind

namespace pybind11::detail {
template <>
struct type_caster<dsv3::Tensor> {
  PYBIND11_TYPE_CASTER(dsv3::Tensor, const_name("Tensor"));
  bool load(handle source, bool) {
    const dsv3::dlpack::ExchangeApi* const api = dsv3::bind::exchange_api(Py_TYPE(source.ptr()));
    if (api == nullptr || api->tensor_from_py_object == nullptr) return false;
    dsv3::dlpack::Tensor view;
    if (api->tensor_from_py_object(source.ptr(), &view) != 0) throw error_already_set();
    dsv3::bind::current_api = api;
    value = dsv3::Tensor(view);
    return true;
  }
};
}  // namespace pybind11::detail
