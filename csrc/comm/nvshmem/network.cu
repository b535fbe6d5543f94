// What dsv3._nvshmem does: network.h. One translation unit, since NVSHMEM's device code takes ten seconds to compile.
#include "network.cuh"

#include <cstdlib>
#include <cstring>

#include "../combine.cuh"
#include "../dispatch.cuh"
#include "../exchange.cuh"
#include "../low_latency.cuh"
#include "../low_latency_sums.cuh"

namespace dsv3 {
namespace {

struct Arena {
  char* base = nullptr;
  int64_t bytes = 0;
};
Arena arena;  // of the process

Far far_of(const Network& network) { return Far{network.network()}; }
FarWindows windows_of(const Network& network) { return FarWindows{network.network()}; }

}  // namespace

std::string nvshmem_id() {
  nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
  if (nvshmemx_get_uniqueid(&id) != 0) throw std::runtime_error("nvshmemx_get_uniqueid failed");
  return {reinterpret_cast<const char*>(&id), sizeof(id)};
}

void nvshmem_start(int device, int rank, int ranks, const std::string& id, int64_t bytes, bool alone) {
  nvshmemx_uniqueid_t unique = NVSHMEMX_UNIQUEID_INITIALIZER;
  DSV3_CHECK(id.size() == sizeof(unique), "an id must have ", sizeof(unique), " bytes, got ", id.size());
  if (nvshmemx_init_status() != NVSHMEM_STATUS_NOT_INITIALIZED) {
    throw std::runtime_error("NVSHMEM runs in this process already, and not for dsv3");
  }
  std::memcpy(&unique, id.data(), sizeof(unique));
  const Current guard(device);
  check_cuda(cudaFree(nullptr), "cudaFree");  // makes the context
  // What the user has set remains. Multicast over NVLink serves collectives, of which there are none here.
  setenv("NVSHMEM_DISABLE_NVLS", "1", 0);
  if (alone) setenv("NVSHMEM_REMOTE_TRANSPORT", "none", 0);
  nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
  nvshmemx_set_attr_uniqueid_args(rank, ranks, &unique, &attributes);
  if (nvshmemx_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes) != 0) {
    throw std::runtime_error("nvshmemx_init_attr failed");
  }
  if (nvshmem_my_pe() != rank || nvshmem_n_pes() != ranks) throw std::runtime_error("NVSHMEM counts other ranks");
  arena.base = static_cast<char*>(nvshmem_malloc(bytes));
  if (arena.base == nullptr) {
    throw std::runtime_error("nvshmem_malloc of " + std::to_string(bytes) + " bytes failed");
  }
  arena.bytes = bytes;
}

Network::Network(int device, int rank, int ranks, int node, int nodes, int channels, int slots, int window_tokens,
                 int window_pieces, double timeout_seconds, bool direct, int64_t offset, const std::vector<int>& pes)
    : Peers(device, rank, ranks, node, nodes, channels, slots, window_tokens, window_pieces, timeout_seconds) {
  try {
    open(direct, offset, pes);
  } catch (...) {
    release();
    throw;
  }
}

void Network::open(bool direct, int64_t offset, const std::vector<int>& pes) {
  const Rings& r = rings();
  const int self = own_rank(r);
  const int64_t bytes = symmetric_bytes(r.ranks, r.nodes, r.channels, r.slots, r.window_tokens, r.window_pieces);
  const Current guard(device());
  DSV3_CHECK(r.nodes > 1, "nodes must be several");
  DSV3_CHECK(arena.base != nullptr, "NVSHMEM has not been started");
  DSV3_CHECK(offset >= 0 && offset % alignof(SymmetricLocal) == 0 && offset + bytes <= arena.bytes, "a part of ", bytes,
             " bytes at ", offset, " does not fit the ", arena.bytes, " that there are");
  DSV3_CHECK(static_cast<int>(pes.size()) == group_size(r), "pes must be those of ", group_size(r), " ranks");
  network_.base = arena.base + offset;
  for (size_t i = 0; i < pes.size(); ++i) network_.pes[i] = static_cast<int16_t>(pes[i]);
  for (int rank = 0; rank < group_size(r); ++rank) {
    if (direct && rank != self) network_.mapped[rank] = static_cast<char*>(nvshmem_ptr(network_.base, pes[rank]));
  }
  network_.mapped[self] = network_.base;
  check_cuda(cudaMemset(network_.base, 0, bytes), "cudaMemset of the symmetric memory");
  check_cuda(cudaDeviceSynchronize(), "cudaMemset of the symmetric memory");  // before another rank can write
}

int64_t Network::symmetric_bytes(int ranks, int nodes, int channels, int slots, int window_tokens, int window_pieces) {
  Rings r{};
  r.ranks = ranks;
  r.nodes = nodes;
  r.channels = channels;
  r.slots = slots;
  r.window_tokens = window_tokens;
  r.window_pieces = window_pieces;
  return far_windows_begin(r) + 2 * window_bytes(r);  // and as much to put from
}

void Network::disconnect() {
  if (network_.base != nullptr && lost() < 0) {
    const Current guard(device());
    cudaStream_t stream = nullptr;
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    nvshmemx_quiet_on_stream(stream);  // on the device, where all was sent
    const cudaError_t status = cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
    check_cuda(status, "waiting for what was sent over NVSHMEM");
  }
  Peers::disconnect();
}

void comm_exchange(Tensor heads, Tensor offsets, Tensor shift, Tensor arrivals, Tensor topk_idx, Tensor own_offsets,
                   std::vector<int64_t> head, int64_t ranks_per_node, const Network& network, cudaStream_t stream) {
  exchanging::exchange({heads, offsets, shift, arrivals, topk_idx, own_offsets}, head, ranks_per_node, network.rings(),
                       far_of(network), stream);
}

void comm_dispatch(Tensor rows, std::optional<Tensor> sf, std::optional<Tensor> sf_rows,
                   std::optional<Tensor> row_weights, std::optional<Tensor> position, std::optional<Tensor> relay,
                   Tensor x, std::optional<Tensor> weights, Tensor topk_idx, Tensor pairs, Tensor shift,
                   Tensor arrivals, Tensor total, int64_t max_tokens, bool cast, double amax_floor,
                   const Network& network, cudaStream_t stream) {
  dispatching::dispatch(
      {rows, sf, sf_rows, row_weights, position, relay, x, weights, topk_idx, pairs, shift, arrivals, total},
      max_tokens, cast, amax_floor, network.rings(), far_of(network), stream);
}

void comm_combine(Tensor out, std::optional<Tensor> weights, Tensor rows, std::optional<Tensor> row_weights,
                  Tensor topk_idx, Tensor position, std::optional<Tensor> relay, int64_t num_experts,
                  int64_t ranks_per_node, bool fp32_sums, const Network& network, cudaStream_t stream) {
  combining::combine({out, weights, rows, row_weights, topk_idx, position, relay}, num_experts, ranks_per_node,
                     fp32_sums, network.rings(), far_of(network), stream);
}

void comm_send(Tensor x, Tensor weights, Tensor topk_idx, int64_t num_experts, bool cast, double amax_floor,
               const Network& network, cudaStream_t stream) {
  windows::send(x, weights, topk_idx, num_experts, cast, amax_floor, network.rings(), windows_of(network), stream);
}

void comm_receive(Tensor rows, std::optional<Tensor> sf, Tensor row_weights, Tensor counts, Tensor arrived,
                  Tensor tokens, Tensor entry_rows, const Network& network, cudaStream_t stream) {
  windows::receive({rows, sf, row_weights, counts, arrived, tokens, entry_rows}, network.rings(), windows_of(network),
                   stream);
}

void comm_send_sums(Tensor y, Tensor arrived, Tensor tokens, Tensor entry_rows, bool fp32_sums, const Network& network,
                    cudaStream_t stream) {
  windows::send_sums(y, arrived, tokens, entry_rows, fp32_sums, network.rings(), windows_of(network), stream);
}

void comm_receive_sums(Tensor out, Tensor topk_idx, int64_t num_experts, int64_t ranks_per_node, bool fp32_sums,
                       const Network& network, cudaStream_t stream) {
  windows::receive_sums(out, topk_idx, num_experts, ranks_per_node, fp32_sums, network.rings(), windows_of(network),
                        stream);
}

}  // namespace dsv3
