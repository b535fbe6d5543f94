// comm_combine between the ranks of one node: combine.cuh.
#include "combine.cuh"

namespace dsv3 {

void comm_combine(Tensor out, std::optional<Tensor> weights, Tensor rows, std::optional<Tensor> row_weights,
                  Tensor topk_idx, Tensor position, std::optional<Tensor> relay, int64_t num_experts,
                  int64_t ranks_per_node, bool fp32_sums, const Peers& peers, cudaStream_t stream) {
  combining::combine({out, weights, rows, row_weights, topk_idx, position, relay}, num_experts, ranks_per_node,
                     fp32_sums, peers.rings(), OneNode{}, stream);
}

}  // namespace dsv3
