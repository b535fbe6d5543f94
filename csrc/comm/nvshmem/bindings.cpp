// dsv3._nvshmem: see network.h.
#include "../../bind.h"
#include "network.h"

PYBIND11_MODULE(_nvshmem, m) {
  using dsv3::Network;
  m.def("nvshmem_id", [] { return py::bytes(dsv3::nvshmem_id()); });
  m.def("nvshmem_start", dsv3::nvshmem_start, py::call_guard<py::gil_scoped_release>());
  dsv3::bind::peers<Network>(m, "Network")
      .def(py::init<int, int, int, int, int, int, int, int, int, double, bool, int64_t, const std::vector<int>&>())
      .def_static("symmetric_bytes", &Network::symmetric_bytes);
  dsv3::bind::define(m, "comm_exchange", dsv3::comm_exchange);
  dsv3::bind::define(m, "comm_dispatch", dsv3::comm_dispatch);
  dsv3::bind::define(m, "comm_combine", dsv3::comm_combine);
  dsv3::bind::define(m, "comm_send", dsv3::comm_send);
  dsv3::bind::define(m, "comm_receive", dsv3::comm_receive);
  dsv3::bind::define(m, "comm_send_sums", dsv3::comm_send_sums);
  dsv3::bind::define(m, "comm_receive_sums", dsv3::comm_receive_sums);
}
