// comm_send_sums and comm_receive_sums between the ranks of one node: low_latency_sums.cuh.
#include "low_latency_sums.cuh"

#include "../ops.h"

namespace dsv3 {

void comm_send_sums(Tensor y, Tensor arrived, Tensor tokens, Tensor entry_rows, bool fp32_sums, const Peers& peers,
                    cudaStream_t stream) {
  windows::send_sums(y, arrived, tokens, entry_rows, fp32_sums, peers.rings(), windows::NearWindows{}, stream);
}

void comm_receive_sums(Tensor out, Tensor topk_idx, int64_t num_experts, int64_t ranks_per_node, bool fp32_sums,
                       const Peers& peers, cudaStream_t stream) {
  windows::receive_sums(out, topk_idx, num_experts, ranks_per_node, fp32_sums, peers.rings(), windows::NearWindows{},
                        stream);
}

}  // namespace dsv3
