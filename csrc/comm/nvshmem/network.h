// dsv3._nvshmem: dispatch and combine between ranks of several nodes, also in low-latency mode. Within a node they use its rings
// (../peers.h), between nodes NVSHMEM. The module is apart from dsv3._C so that nothing else needs NVSHMEM's library.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../../common/tensor.h"
#include "../peers.h"

typedef struct CUstream_st* cudaStream_t;

namespace dsv3 {

// What starts NVSHMEM: made by one rank, given to all.
std::string nvshmem_id();
// Starts it for this process, with one piece of `bytes` symmetric memory, from which all buffers take theirs; all ranks together.
// alone: they are on one machine, so no network adapter is looked for. Throws std::runtime_error, also where it runs already.
void nvshmem_start(int device, int rank, int ranks, const std::string& id, int64_t bytes, bool alone);

// What leads to other nodes, for kernels: see network.cuh.
struct NetworkMemory {
  char* base;               // this rank's part of the symmetric memory; the others' have the same layout
  char* mapped[kMaxGroup];  // a rank's part, where it can be written to, or null; the own one can
  int16_t pes[kMaxGroup];   // the group's ranks as NVSHMEM numbers them
};

// A rank's memory on its node, and its part of the symmetric memory.
class Network : public Peers {
 public:
  // offset: of the part in the symmetric memory, the same on all ranks. direct: memory that is mapped here (of the own node; of
  // others where the "nodes" are on one machine, or NVLink joins them) is written to without NVSHMEM.
  Network(int device, int rank, int ranks, int node, int nodes, int channels, int slots, int window_tokens,
          int window_pieces, double timeout_seconds, bool direct, int64_t offset, const std::vector<int>& pes);
  // Of a part.
  static int64_t symmetric_bytes(int ranks, int nodes, int channels, int slots, int window_tokens, int window_pieces);
  // Waits until all that kernels of this process have sent has arrived, unless a rank is lost; then as Peers'.
  void disconnect() override;

  const NetworkMemory& network() const { return network_; }

 private:
  void open(bool direct, int64_t offset, const std::vector<int>& pes);

  NetworkMemory network_{};
};

// As of ../../ops.h, which has the shapes.
void comm_exchange(Tensor heads, Tensor offsets, Tensor shift, Tensor arrivals, Tensor topk_idx, Tensor own_offsets,
                   std::vector<int64_t> head, int64_t ranks_per_node, const Network& network, cudaStream_t stream);
void comm_dispatch(Tensor rows, std::optional<Tensor> sf, std::optional<Tensor> sf_rows,
                   std::optional<Tensor> row_weights, std::optional<Tensor> position, std::optional<Tensor> relay,
                   Tensor x, std::optional<Tensor> weights, Tensor topk_idx, Tensor pairs, Tensor shift,
                   Tensor arrivals, Tensor total, int64_t max_tokens, bool cast, double amax_floor,
                   const Network& network, cudaStream_t stream);
void comm_combine(Tensor out, std::optional<Tensor> weights, Tensor rows, std::optional<Tensor> row_weights,
                  Tensor topk_idx, Tensor position, std::optional<Tensor> relay, int64_t num_experts,
                  int64_t ranks_per_node, bool fp32_sums, const Network& network, cudaStream_t stream);
void comm_send(Tensor x, Tensor weights, Tensor topk_idx, int64_t num_experts, bool cast, double amax_floor,
               const Network& network, cudaStream_t stream);
void comm_receive(Tensor rows, std::optional<Tensor> sf, Tensor row_weights, Tensor counts, Tensor arrived,
                  Tensor tokens, Tensor entry_rows, const Network& network, cudaStream_t stream);
void comm_send_sums(Tensor y, Tensor arrived, Tensor tokens, Tensor entry_rows, bool fp32_sums, const Network& network,
                    cudaStream_t stream);
void comm_receive_sums(Tensor out, Tensor topk_idx, int64_t num_experts, int64_t ranks_per_node, bool fp32_sums,
                       const Network& network, cudaStream_t stream);

}  // namespace dsv3
