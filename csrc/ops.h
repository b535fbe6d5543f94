// Every native op. A host function checks its arguments, configures, launches and checks the launch; it allocates
// nothing on the device, never synchronises and is safe to capture in a CUDA graph. Outputs come first, then inputs,
// scalars, the stream. T tokens, H hidden. "float" dtypes are bfloat16 or float32, the same for all tensors of the call
// unless said.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "comm/peers.h"
#include "common/tensor.h"

typedef struct CUstream_st* cudaStream_t;  // as the CUDA headers have it, so that the bindings need none of them

namespace dsv3 {

// norm/rmsnorm.cu. x, y, residual, residual_out, dy, dx, dresidual: float [T, H]; weight float [H]; rstd, dweight fp32;
// partial fp32 [blocks, H] is workspace (one row a multiprocessor is best).
void rmsnorm(Tensor y, std::optional<Tensor> residual_out, Tensor rstd, Tensor x, std::optional<Tensor> residual,
             Tensor weight, double eps, cudaStream_t stream);
// The output as per_token_cast makes it of y, which itself is written only where given.
void rmsnorm_cast(Tensor y_fp8, Tensor y_sf, std::optional<Tensor> y, std::optional<Tensor> residual_out, Tensor rstd,
                  Tensor x, std::optional<Tensor> residual, Tensor weight, double eps, bool pow2_scale,
                  double amax_floor, cudaStream_t stream);
void rmsnorm_backward(Tensor dx, Tensor dweight, Tensor partial, Tensor dy, std::optional<Tensor> dresidual, Tensor x,
                      Tensor weight, Tensor rstd, cudaStream_t stream);

// quant/per_token_cast.cu. x float [T, K], K a multiple of 16; x_fp8 e4m3 [T, K]; x_sf fp32 [T, ceil(K / 128)] with
// strides (1, T rounded up to 4).
void per_token_cast(Tensor x_fp8, Tensor x_sf, Tensor x, bool pow2_scale, double amax_floor, cudaStream_t stream);

// quant/per_block_cast.cu. w float [G, N, K], K (and N, for the transpose) a multiple of 16; w_fp8 e4m3 [G, N, K], w_sf
// fp32 [G, ceil(N / 128), ceil(K / 128)]; wt_fp8 e4m3 [G, K, N], wt_sf fp32 [G, ceil(K / 128), ceil(N / 128)].
void per_block_cast(Tensor w_fp8, Tensor w_sf, std::optional<Tensor> wt_fp8, std::optional<Tensor> wt_sf, Tensor w,
                    bool pow2_scale, cudaStream_t stream);

// quant/cast_transpose.cu. x float [T, K], or e4m3 with x_sf as of per_token_cast; offsets int32 [G + 1]; with
// Tp = 128 ceil((T + 127 G) / 128) (without offsets 128 ceil(T / 128)): xt_fp8 e4m3 [K, Tp], xt_sf fp32 [K, Tp / 128]
// with strides (1, K rounded up to 4).
void cast_transpose(Tensor xt_fp8, Tensor xt_sf, Tensor x, std::optional<Tensor> x_sf, std::optional<Tensor> offsets,
                    std::optional<Tensor> source, int64_t topk, bool pow2_scale, double amax_floor,
                    cudaStream_t stream);
// Its outputs and those of per_token_cast from one read of x float [T, K].
void per_token_cast_and_transpose(Tensor x_fp8, Tensor x_sf, Tensor xt_fp8, Tensor xt_sf, Tensor x,
                                  std::optional<Tensor> offsets, bool pow2_scale, double amax_floor,
                                  cudaStream_t stream);

// gemm/fp8_gemm.cu. a e4m3 [M, K], a_sf fp32 [M, ceil(K / 128)] with strides (1, M rounded up to 4); b e4m3 [N, K], b_sf
// fp32 [ceil(N / 128), ceil(K / 128)], or [N, ceil(K / 128)] strided like a_sf; out bf16 [M, N], or fp32, to which the
// product may be added. static_weights: no kernel that may still run writes b and b_sf. turns int32
// [fp8_gemm_turns(M, N)] is workspace, with which a product whose operands both have scales of rows may cut K into parts.
void fp8_gemm(Tensor out, std::optional<Tensor> turns, Tensor a, Tensor a_sf, Tensor b, Tensor b_sf, bool accumulate,
              bool batch_invariant, bool static_weights, cudaStream_t stream);
int64_t fp8_gemm_turns(int64_t m, int64_t n);

// gemm/grouped_fp8_gemm.cu. a e4m3 [R, K] sorted by group, offsets int32 [G + 1], out bf16 or fp32 [R, N]; or a
// [G, R, K], counts int32 [G], out [G, R, N]. b e4m3 [G, N, K], b_sf fp32 [G, ceil(N / 128), ceil(K / 128)]. a_sf as of
// fp8_gemm for the rows of all groups.
void grouped_fp8_gemm(Tensor out, Tensor a, Tensor a_sf, Tensor b, Tensor b_sf, Tensor offsets, bool batch_invariant,
                      cudaStream_t stream);
void masked_grouped_fp8_gemm(Tensor out, Tensor a, Tensor a_sf, Tensor b, Tensor b_sf, Tensor counts,
                             bool batch_invariant, cudaStream_t stream);

// gemm/grouped_fp8_wgrad.cu. a_t e4m3 [N, Tp], b_t e4m3 [K, Tp], scales fp32 [N or K, Tp / 128], all as cast_transpose
// makes them with the offsets int32 [G + 1]; out fp32 [G, N, K], added to.
void grouped_fp8_wgrad(Tensor out, Tensor a_t, Tensor a_sf, Tensor b_t, Tensor b_sf, Tensor offsets,
                       cudaStream_t stream);

// norm/rope.cu. x float [T, heads * head_dim], rotated in place; cos, sin fp32 [positions, rope_dim / 2]; positions
// int32 or int64 [T]. inverse rotates back (the gradient).
void rope_(Tensor x, Tensor cos, Tensor sin, Tensor positions, int64_t head_dim, bool inverse, cudaStream_t stream);

// attention/mla_append_kv.cu. kv_a bfloat16 [T, 576], rows a multiple of 8 elements apart; norm_weight float [512]; cos,
// sin fp32 [max_positions, 32]; positions, slot_mapping int64 [T]; cache bfloat16 [pages, page, 1, 576], or uint8
// [pages, page, 1, 656]: 512 e4m3, 4 fp32 scales, 64 bfloat16. q_a bfloat16 [T, R], R a multiple of 8 up to 2048, normalised in
// place; q_a_norm_weight [R] of norm_weight's dtype.
void mla_append_kv(Tensor cache, Tensor kv_a, Tensor norm_weight, Tensor cos, Tensor sin, Tensor positions,
                   Tensor slot_mapping, std::optional<Tensor> q_a, std::optional<Tensor> q_a_norm_weight, double eps,
                   cudaStream_t stream);

// attention/mla_schedule.cu. seq_lens int32 [B] -> schedule int32 (its parts: attention/schedule.cuh), for mla_decode of
// `steps` tokens a sequence and so many heads.
void mla_schedule(Tensor schedule, Tensor seq_lens, int64_t steps, int64_t heads, bool batch_invariant,
                  cudaStream_t stream);
// attention/mla_decode.cu. q bfloat16 [B, S, Hq, 576], cache as of mla_append_kv, block_table int32 [B, W], seq_lens
// int32 [B]; out bfloat16 [B, S, Hq, 512], lse fp32 [B, Hq, S]; partial fp32 [P, R, 512] and partial_lse
// [P, R] are workspace: R = 64 rows, 128 where S Hq > 64; P = 2 * multiprocessors * 64 / R, where the schedule is
// batch-invariant a number for every 1024 keys that fit the table.
void mla_decode(Tensor out, Tensor lse, Tensor partial, Tensor partial_lse, Tensor q, Tensor cache, Tensor block_table,
                Tensor seq_lens, Tensor schedule, double softmax_scale, bool causal, cudaStream_t stream);

// attention/mla_attention.cu. q bfloat16 [Tq, Hq, 192]; k_nope, v bfloat16 [Tk, Hq, 128], heads of a token beside each
// other at any distance that is a multiple of 16 bytes; k_rope bfloat16 [Tk, 64]; cu_seqlens_q, cu_seqlens_k int32
// [n + 1]; out bfloat16 [Tq, Hq, 128], lse fp32 [Hq, Tq], whose rows of no sequence are left alone.
void mla_attention(Tensor out, Tensor lse, Tensor q, Tensor k_nope, Tensor k_rope, Tensor v, Tensor cu_seqlens_q,
                   Tensor cu_seqlens_k, int64_t max_seqlen_k, bool causal, double softmax_scale, cudaStream_t stream);

// attention/mla_merge.cu. o, o1, o2 bfloat16 [T, H, 128]; lse, lse1, lse2 fp32 [H, T].
void mla_merge(Tensor o, Tensor lse, Tensor o1, Tensor lse1, Tensor o2, Tensor lse2, cudaStream_t stream);

// attention/mla_attention_backward.cu. q bfloat16 [Tq, Hq, 192], k_nope, v [Tk, Hq, 128] (strided), k_rope [Tk, 64]; out,
// dout [Tq, Hq, 128]; lse fp32 [Hq, Tq]; cu_seqlens int32 [n + 1]; dq as q, dkv bfloat16 [Tk, Hq, 256], dk_rope [Tk, 64].
// Workspace: stats fp32 [Hq, Tq / 64 + n, 128]; and, all zeros, dq_sums fp32 [ring, 12288] of more than max_seqlen_q / 64
// places, rope_sums fp32 [Tk / 128 + n, 8192], counters int32 [Tk / 128 + n + 10 ring + 1].
void mla_attention_backward(Tensor dq, Tensor dkv, Tensor dk_rope, Tensor stats, Tensor dq_sums, Tensor rope_sums,
                            Tensor counters, Tensor dout, Tensor q, Tensor k_nope, Tensor k_rope, Tensor v, Tensor out,
                            Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t max_seqlen_q, bool causal,
                            double softmax_scale, bool deterministic, cudaStream_t stream);

// moe/swiglu.cu. gate_up, dgate_up float [T, 2I]; out, dout float [T, I]; weights, dweights fp32 [T].
void swiglu(Tensor out, Tensor gate_up, std::optional<Tensor> weights, cudaStream_t stream);
void swiglu_backward(Tensor dgate_up, std::optional<Tensor> dweights, Tensor dout, Tensor gate_up,
                     std::optional<Tensor> weights, cudaStream_t stream);
// Their outputs as per_token_cast makes them: out_fp8 [T, I], dgate_up_fp8 [T, 2I] (I a multiple of 128 there); offsets
// int32 [G + 1], rows past the last are left alone.
void swiglu_cast(Tensor out_fp8, Tensor out_sf, Tensor gate_up, std::optional<Tensor> weights,
                 std::optional<Tensor> offsets, bool pow2_scale, double amax_floor, cudaStream_t stream);
void swiglu_cast_backward(Tensor dgate_up_fp8, Tensor dgate_up_sf, std::optional<Tensor> dweights, Tensor dout,
                          Tensor gate_up, std::optional<Tensor> weights, std::optional<Tensor> offsets, bool pow2_scale,
                          double amax_floor, cudaStream_t stream);

// moe/swiglu_both_casts.cu. The same backward, and as cast_transpose makes them also dgate_up_t, e4m3 [2I, Tp], and the
// forward output out_t, e4m3 [I, Tp], this one with a floor of 1e-4 and scales that are no powers of two. bfloat16, I a
// multiple of 128; dweights fp32 [I / 64, T], parts of 64 columns.
void swiglu_backward_both_casts(Tensor dgate_up_fp8, Tensor dgate_up_sf, Tensor dgate_up_t, Tensor dgate_up_t_sf,
                                Tensor out_t, Tensor out_t_sf, std::optional<Tensor> dweights, Tensor dout,
                                Tensor gate_up, std::optional<Tensor> weights, std::optional<Tensor> offsets,
                                bool pow2_scale, double amax_floor, cudaStream_t stream);

// moe/gate.cu. logits, dlogits fp32 [T, E]; bias fp32 [E]; index int64 [T, k]; weights, dweights fp32 [T, k]; counts
// int32 [E]. Settings: num_groups, topk_groups, route_scale, softmax, top2_sum, normalize.
using GateSettings = std::tuple<int64_t, int64_t, double, bool, bool, bool>;
void moe_gate(Tensor index, Tensor weights, Tensor counts, Tensor logits, std::optional<Tensor> bias,
              GateSettings settings, cudaStream_t stream);
void moe_gate_backward(Tensor dlogits, Tensor dweights, Tensor logits, Tensor index, double route_scale, bool softmax,
                       bool normalize, cudaStream_t stream);

// moe/gate_loads.cu. The same, and of n sequences, which begin at cu_seqlens int32 [n + 1], chosen int32 [n, E] and
// affinity, daffinity fp64 [n, E].
void moe_gate_loads(Tensor index, Tensor weights, Tensor counts, Tensor chosen, Tensor affinity, Tensor logits,
                    std::optional<Tensor> bias, Tensor cu_seqlens, GateSettings settings, cudaStream_t stream);
void moe_gate_loads_backward(Tensor dlogits, Tensor dweights, Tensor daffinity, Tensor logits, Tensor index,
                             Tensor cu_seqlens, double route_scale, bool softmax, bool normalize, cudaStream_t stream);

// moe/permute.cu. topk_idx, position int64 [T, k]; source int64 [T*k]; offsets int32 [E + 1]; block_counts int32
// [blocks, E] is workspace, blocks <= 64; x, out float [T, H]; rows, y float [T*k, H]; weights fp32 [T, k].
void moe_permutation(Tensor offsets, Tensor source, Tensor position, Tensor block_counts, Tensor topk_idx,
                     cudaStream_t stream);
void moe_permute(Tensor rows, Tensor x, Tensor position, cudaStream_t stream);
// data e4m3 [T, H], rows e4m3 [T*k, H]; their scales as of per_token_cast.
void moe_permute_cast(Tensor rows, Tensor rows_sf, Tensor data, Tensor sf, Tensor source, Tensor position,
                      cudaStream_t stream);
void moe_unpermute(Tensor out, Tensor y, Tensor position, std::optional<Tensor> weights, cudaStream_t stream);

// decode/. What a decoding step does with at most 64 tokens, in bf16 but for weights that say otherwise. static_weights: no
// kernel that may still run writes them.
// few_linear.cu. x [T, K]; weights [N_i, K], all bf16 with no scales, or all e4m3 with scales fp32 [N_i / 128, K / 128],
// rounded up; outs [T, N_i], all bf16 or all fp32. x [T, G, K], weight [G, N, K] with contiguous matrices, out [T, G, N].
void few_linear(std::vector<Tensor> outs, Tensor x, std::vector<Tensor> weights, std::vector<Tensor> scales,
                bool static_weights, cudaStream_t stream);
void few_heads(Tensor out, Tensor x, Tensor weight, bool static_weights, cudaStream_t stream);
// mla_absorb.cu. q [T, G, Dn + Dr], weight [G, Dn, Dc] with contiguous matrices, out [T, G, Dc + Dr]; cos, sin fp32
// [positions, Dr / 2]; positions int64 [T].
void mla_absorb(Tensor out, Tensor q, Tensor weight, Tensor cos, Tensor sin, Tensor positions, bool static_weights,
                cudaStream_t stream);
// few_attention.cu. q [B, S, G, 576] of at most 32 rows S G, cache [pages, 64, 1, 576], block_table int32 [B, W], seq_lens
// int32 [B]; out [B, S, G, 512]. Workspace: partial fp32 [B, few_attention_pieces(B, W), S G, 512], and partial_state, which
// has 2 in place of 512.
// static_cache: cache, block_table and seq_lens are not written by the kernel ahead.
int64_t few_attention_pieces(int64_t batch, int64_t width);
void few_attention(Tensor out, Tensor partial, Tensor partial_state, Tensor q, Tensor cache, Tensor block_table,
                   Tensor seq_lens, double softmax_scale, bool static_cache, cudaStream_t stream);
// few_gate.cu. x, residual, sum, u [T, H]; norm_weight [H]; gate [E, H]; bias fp32 [E]; index int64, weights fp32 [T, k].
// Settings: eps, num_groups, topk_groups, route_scale, softmax, top2_sum, normalize (as of moe_gate), static_weights.
using FewGateSettings = std::tuple<double, int64_t, int64_t, double, bool, bool, bool, bool>;
void few_gate(Tensor sum, Tensor u, Tensor index, Tensor weights, Tensor x, Tensor residual, Tensor norm_weight,
              Tensor gate, std::optional<Tensor> bias, FewGateSettings settings, cudaStream_t stream);
// few_experts.cu. x [T, H]; topk_idx int64 [T, k], topk_weights fp32 [T, k], gate_up [E, 2I, H], down [E, H, I], or none;
// shared_gate_up [2J, H], shared_down [H, J], or none; scales of weights that are e4m3, as of few_linear, [E, ...] where
// routed; y [T, k + 1, H], k where nothing is shared; act, T * (k I + J) elements, is workspace.
void few_experts(Tensor y, Tensor act, Tensor x, std::optional<Tensor> topk_idx, std::optional<Tensor> topk_weights,
                 std::optional<Tensor> gate_up, std::optional<Tensor> down, std::optional<Tensor> shared_gate_up,
                 std::optional<Tensor> shared_down, std::optional<Tensor> gate_up_sf, std::optional<Tensor> down_sf,
                 std::optional<Tensor> shared_gate_up_sf, std::optional<Tensor> shared_down_sf, bool static_weights,
                 cudaStream_t stream);
// combine_norm.cu. residual, out, h [T, H]; y [T, S, H]; weight [H].
void combine_norm(Tensor out, Tensor h, Tensor residual, Tensor y, Tensor weight, double eps, cudaStream_t stream);
// round.cu. lengths, active int64 [B]; positions, slots int64 [B * S]; seq_lens int32 [B]; block_table int32 [B, W]; logits
// [B, S, V]; tokens int64 [B, S], result int64 [B, S + 1].
void decode_positions(Tensor positions, Tensor slots, Tensor seq_lens, Tensor lengths, Tensor active,
                      Tensor block_table, int64_t first, int64_t steps, int64_t page, int64_t last_position,
                      cudaStream_t stream);
void greedy_round(Tensor result, Tensor tokens, Tensor lengths, Tensor logits, Tensor active, cudaStream_t stream);

// comm/exchange.cu. Between N ranks on C channels, here of one node; nvshmem/network.h has the same ops for several. topk_idx
// int64 [T, k] and own_offsets int32 [E + 1] of the own order by expert; heads int32 [N, 8], what every rank gave as `head`,
// whose first number is 2 where an expert does not exist; offsets int32 [G + 1], shift int32 [E], arrivals int32 [N, C] for
// comm_dispatch.
void comm_exchange(Tensor heads, Tensor offsets, Tensor shift, Tensor arrivals, Tensor topk_idx, Tensor own_offsets,
                   std::vector<int64_t> head, int64_t ranks_per_node, const Peers& peers, cudaStream_t stream);
// comm/dispatch.cu. x float [T, H], pairs int64 [T, k]: the pairs' places in the own order; rows like x [R, H], or with
// sf fp32 [R, ceil(H / 128)] e4m3, as per_token_cast makes them (sf_rows, contiguous, is workspace); weights fp32 [T, k] come
// as row_weights fp32 [R]. position int64 [N * max_tokens, k], filled with R by the caller: rows of every rank's tokens,
// ascending. total int32 [...]: its last number is how many rows there should be; where they are more than R, all become NaN.
// cast: values travel as e4m3. relay, for several nodes, int32 [nodes, max_tokens] zeroed by the caller: which ranks of this
// node need a token passed on.
void comm_dispatch(Tensor rows, std::optional<Tensor> sf, std::optional<Tensor> sf_rows,
                   std::optional<Tensor> row_weights, std::optional<Tensor> position, std::optional<Tensor> relay,
                   Tensor x, std::optional<Tensor> weights, Tensor topk_idx, Tensor pairs, Tensor shift,
                   Tensor arrivals, Tensor total, int64_t max_tokens, bool cast, double amax_floor, const Peers& peers,
                   cudaStream_t stream);
// comm/combine.cu. rows float [R, H] -> out [T, H], row_weights fp32 [R] -> weights fp32 [T, k]; position as
// comm_dispatch left it. fp32_sums: sums of a rank and of a node in fp32, else in out's dtype.
void comm_combine(Tensor out, std::optional<Tensor> weights, Tensor rows, std::optional<Tensor> row_weights,
                  Tensor topk_idx, Tensor position, std::optional<Tensor> relay, int64_t num_experts,
                  int64_t ranks_per_node, bool fp32_sums, const Peers& peers, cudaStream_t stream);

// comm/low_latency.cu, low_latency_sums.cu. The same in two halves each, for at most M tokens a rank (Peers' window_tokens).
// comm_send: x float [T, H], weights fp32 and topk_idx int64 [T, k]. comm_receive: rows like x [G, R, H], R >= N * M, or e4m3
// with sf fp32 [G, R, ceil(H / 128)] of strides (R, 1, any); row_weights fp32 [G, R]; counts int32 [G]; and for the way back
// arrived int32 [N], tokens int32 [N, M], entry_rows int32 [N, M, k].
void comm_send(Tensor x, Tensor weights, Tensor topk_idx, int64_t num_experts, bool cast, double amax_floor,
               const Peers& peers, cudaStream_t stream);
void comm_receive(Tensor rows, std::optional<Tensor> sf, Tensor row_weights, Tensor counts, Tensor arrived,
                  Tensor tokens, Tensor entry_rows, const Peers& peers, cudaStream_t stream);
// y float [G, R, H] -> out [T, H] of its dtype; fp32_sums as of comm_combine.
void comm_send_sums(Tensor y, Tensor arrived, Tensor tokens, Tensor entry_rows, bool fp32_sums, const Peers& peers,
                    cudaStream_t stream);
void comm_receive_sums(Tensor out, Tensor topk_idx, int64_t num_experts, int64_t ranks_per_node, bool fp32_sums,
                       const Peers& peers, cudaStream_t stream);

// loss/cross_entropy.cu. loss fp32 [T]; logits float [T, V], replaced by the gradient where asked; targets int64 [T],
// -100 is ignored.
void cross_entropy_(Tensor loss, Tensor logits, Tensor targets, bool write_gradient, cudaStream_t stream);

// optim/adamw.cu. Lists of tensors of the same numbers of elements: master, grad fp32; exp_avg, exp_avg_sq bf16; weight
// bf16 or an empty list. lr, grad_scale, step: one fp32 on the device; skip: one bool. weight_decay: one number a
// tensor.
void adamw(std::vector<Tensor> master, std::vector<Tensor> grad, std::vector<Tensor> exp_avg,
           std::vector<Tensor> exp_avg_sq, std::vector<Tensor> weight, Tensor lr, Tensor grad_scale, Tensor skip,
           Tensor step, std::vector<double> weight_decay, double beta1, double beta2, double eps, cudaStream_t stream);

}  // namespace dsv3
