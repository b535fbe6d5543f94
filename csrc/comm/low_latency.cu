// comm_send and comm_receive between the ranks of one node: low_latency.cuh.
#include "low_latency.cuh"

#include "../ops.h"

namespace dsv3 {

void comm_send(Tensor x, Tensor weights, Tensor topk_idx, int64_t num_experts, bool cast, double amax_floor,
               const Peers& peers, cudaStream_t stream) {
  windows::send(x, weights, topk_idx, num_experts, cast, amax_floor, peers.rings(), windows::NearWindows{}, stream);
}

void comm_receive(Tensor rows, std::optional<Tensor> sf, Tensor row_weights, Tensor counts, Tensor arrived,
                  Tensor tokens, Tensor entry_rows, const Peers& peers, cudaStream_t stream) {
  windows::receive({rows, sf, row_weights, counts, arrived, tokens, entry_rows}, peers.rings(), windows::NearWindows{},
                   stream);
}

}  // namespace dsv3
