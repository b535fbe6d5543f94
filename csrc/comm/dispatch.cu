// comm_dispatch between the ranks of one node: dispatch.cuh.
#include "dispatch.cuh"

namespace dsv3 {

void comm_dispatch(Tensor rows, std::optional<Tensor> sf, std::optional<Tensor> sf_rows,
                   std::optional<Tensor> row_weights, std::optional<Tensor> position, std::optional<Tensor> relay,
                   Tensor x, std::optional<Tensor> weights, Tensor topk_idx, Tensor pairs, Tensor shift,
                   Tensor arrivals, Tensor total, int64_t max_tokens, bool cast, double amax_floor, const Peers& peers,
                   cudaStream_t stream) {
  dispatching::dispatch(
      {rows, sf, sf_rows, row_weights, position, relay, x, weights, topk_idx, pairs, shift, arrivals, total},
      max_tokens, cast, amax_floor, peers.rings(), OneNode{}, stream);
}

}  // namespace dsv3
