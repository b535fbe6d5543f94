// comm_exchange between the ranks of one node: exchange.cuh.
#include "exchange.cuh"

namespace dsv3 {

void comm_exchange(Tensor heads, Tensor offsets, Tensor shift, Tensor arrivals, Tensor topk_idx, Tensor own_offsets,
                   std::vector<int64_t> head, int64_t ranks_per_node, const Peers& peers, cudaStream_t stream) {
  exchanging::exchange({heads, offsets, shift, arrivals, topk_idx, own_offsets}, head, ranks_per_node, peers.rings(),
                       OneNode{}, stream);
}

}  // namespace dsv3
