// The two warpgroups of mla_attention_kernel that multiply: 64 queries each, the same keys.
#pragma once

#include "prefill.cuh"

namespace dsv3 {

// Named barriers, one a warpgroup each: whose turn it is to issue products, and its own threads.
enum : int { kTurn = 1, kAlone = 3 };

class Attender {
 public:
  __device__ __forceinline__ Attender(const AttentionParams& params, AttentionShared& shared, int warpgroup)
      : p(params), s(shared), warpgroup_(warpgroup) {
    lane_ = threadIdx.x % kWarpSize;
    row_ = warpgroup * kRows + static_cast<int>(uniform_warp()) % kWarpgroupWarps * 16 + lane_ / 4;
    queries_ = uniform(matrix_descriptor(shared_address(s.queries[warpgroup])));
    keys_ = shared_address(s.keys);
    values_ = shared_address(s.values);
    keys_full_ = shared_address(s.keys_full);
    values_full_ = shared_address(s.values_full);
  }

  __device__ __forceinline__ void run() {
    const uint32_t full = shared_address(&s.queries_full[warpgroup_]);
    if (warpgroup_ == 1) named_arrive(kTurn, kConsumers * kWarpgroup);
    for (uint32_t phase = 0;; phase ^= 1) {
      wait_barrier(full, phase);
      const QueryTile tile = s.tile[warpgroup_];
      if (tile.rows == 0) break;
      float out[64] = {};
      RowState state;
      if (tile.tiles > 0) {
        attend(tile, out, state);
      } else {
        __syncwarp();
        release(shared_address(&s.queries_empty[warpgroup_]));
      }
      write(tile, out, state);
    }
  }

 private:
  // From the last keys to the first, so that what has to be masked comes before the loop that does not. A step issues the
  // scores of a tile and the products of the tile before with its values, and softens the scores under the latter.
  // NOTE: what ends these products is at the beginning of the next step; the compiler softens behind a wait that
  // follows in the same block.
  __device__ __forceinline__ void attend(const QueryTile& tile, float (&out)[64], RowState& state) {
    float scores[64], factor[2];
    uint32_t probabilities[32];
    int i = tile.tiles - 1;
    bool pending = false;
    wait_keys();
    start_scores(scores);
    finish_scores<0>(scores, i == 0);
    mask(scores, tile, i);
    soften(scores, state, factor);
    clear_behind(tile, i);
    const auto step = [&](bool masked) {
      finish_values(out, pending);
      pack(scores, probabilities);
      rescale(factor, out);
      wait_keys();
      take_turn();
      start_scores(scores);
      start_values(probabilities, out);
      pass_turn();
      finish_scores<1>(scores, i == 0);
      if (masked) mask(scores, tile, i);
      soften(scores, state, factor);
      pending = true;
    };
    for (--i; i >= tile.whole; --i) step(true);
    for (; i >= 0; --i) step(false);
    finish_values(out, pending);
    pack(scores, probabilities);
    rescale(factor, out);
    start_values(probabilities, out);
    finish_values(out, true);
  }

  __device__ __forceinline__ void take_turn() const { named_sync(kTurn + warpgroup_, kConsumers * kWarpgroup); }
  __device__ __forceinline__ void pass_turn() const { named_arrive(kTurn + (warpgroup_ ^ 1), kConsumers * kWarpgroup); }
  // By a whole warp.
  __device__ __forceinline__ void release(uint32_t empty) const {
    if (lane_ == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty) : "memory");
  }

  __device__ __forceinline__ void wait_keys() const { wait_barrier(keys_full_ + keys_at_.stage * 8, keys_at_.phase); }
  __device__ __forceinline__ void wait_values() const {
    wait_barrier(values_full_ + values_at_.stage * 8, values_at_.phase);
  }
  __device__ __forceinline__ void start_scores(float (&scores)[64]) {
    const uint32_t tile = uniform(matrix_descriptor(keys_ + keys_at_.stage * sizeof(s.keys[0])));
    detail::fence_registers(scores);
    cute::warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < kKeySubs; ++i) {
      add_scores(queries_ + i * (kSubBytes / 16), tile + i * (kTallSub / 16), scores, i == 0);
    }
    cute::warpgroup_commit_batch();
  }
  // kPending: products issued after it that may go on. The queries are released with their last scores.
  template <int kPending>
  __device__ __forceinline__ void finish_scores(float (&scores)[64], bool last) {
    cute::warpgroup_wait<kPending>();
    detail::fence_registers(scores);
    release(shared_address(&s.keys_empty[keys_at_.stage]));
    keys_at_.advance();
    if (last) release(shared_address(&s.queries_empty[warpgroup_]));
  }
  __device__ __forceinline__ void start_values(uint32_t (&probabilities)[32], float (&out)[64]) {
    wait_values();
    const uint32_t tile = uniform(columns_descriptor<kTallSub>(values_ + values_at_.stage * sizeof(s.values[0])));
    detail::fence_registers(probabilities);
    detail::fence_registers(out);
    cute::warpgroup_arrive();
    add_values(probabilities, tile, out);
    cute::warpgroup_commit_batch();
  }
  __device__ __forceinline__ void finish_values(float (&out)[64], bool pending) {
    cute::warpgroup_wait<0>();
    detail::fence_registers(out);
    if (!pending) return;
    release(shared_address(&s.values_empty[values_at_.stage]));
    values_at_.advance();
  }

  __device__ __forceinline__ void mask(float (&scores)[64], const QueryTile& tile, int i) const {
    const int first = i * kKeys + lane_ % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int visible = tile.visible(row_ + 8 * r) - first;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        if (8 * j >= visible) scores[4 * j + 2 * r] = -INFINITY;
        if (8 * j + 1 >= visible) scores[4 * j + 2 * r + 1] = -INFINITY;
      }
    }
  }
  // Values behind a sequence's end may hold anything, and NaN times a probability of 0 is NaN. Both warpgroups write the
  // same zeros, each before its own product.
  __device__ __forceinline__ void clear_behind(const QueryTile& tile, int i) {
    const int valid = tile.keys - i * kKeys;
    if (valid >= kKeys) return;
    wait_values();
    for (int sub = 0; sub < kValueColumnSubs; ++sub) {
      for (int at = valid * 128 + threadIdx.x % kWarpgroup * 16; at < kTallSub; at += kWarpgroup * 16) {
        *reinterpret_cast<uint4*>(s.values[values_at_.stage][sub] + at) = uint4{};
      }
    }
    fence_shared_writes();
    named_sync(kAlone + warpgroup_, kWarpgroup);
  }

  // Makes exp2(scores * scale - maximum) of the scores; factor: what earlier sums and products have to be multiplied by.
  __device__ __forceinline__ void soften(float (&scores)[64], RowState& state, float (&factor)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = scores[2 * r];
#pragma unroll
      for (int j = 0; j < 16; ++j) highest = fmaxf(highest, fmaxf(scores[4 * j + 2 * r], scores[4 * j + 2 * r + 1]));
      highest = quad_max(highest) * p.scale_log2;
      const float before = state.max[r];
      state.max[r] = highest > before + kSlack ? highest : before;
      const float base = finite(state.max[r]);
      factor[r] = fast_exp2(before - base);
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        float& a = scores[4 * j + 2 * r];
        float& b = scores[4 * j + 2 * r + 1];
        a = fast_exp2(fmaf(a, p.scale_log2, -base));
        b = fast_exp2(fmaf(b, p.scale_log2, -base));
        sum += a + b;
      }
      state.sum[r] = state.sum[r] * factor[r] + sum;
    }
  }
  __device__ __forceinline__ static void rescale(const float (&factor)[2], float (&out)[64]) {
    if (!__any_sync(0xffffffffu, factor[0] != 1.f || factor[1] != 1.f)) return;
#pragma unroll
    for (int i = 0; i < 64; ++i) out[i] *= factor[i / 2 % 2];
  }
  __device__ __forceinline__ static void pack(const float (&scores)[64], uint32_t (&probabilities)[32]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) probabilities[i] = pack_bf16(scores[2 * i], scores[2 * i + 1]);
    detail::fence_registers(probabilities);  // here, not behind the next wait
  }

  __device__ __forceinline__ void write(const QueryTile& tile, float (&out)[64], const RowState& state) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(state.sum[r]), inverse = sum == 0.f ? 0.f : 1.f / sum;
#pragma unroll
      for (int i = r * 2; i < 64; i += 4) {
        out[i] *= inverse;
        out[i + 1] *= inverse;
      }
      const bool writes = row_ + 8 * r < tile.rows;
      const int64_t row = tile.row + row_ + 8 * r;
      if (writes && lane_ % 4 == 0) {
        p.lse[tile.head * p.query_rows + row] = sum == 0.f ? -INFINITY : (state.max[r] + log2f(sum)) * kLn2;
      }
      write_row(p.out + (row * p.heads + tile.head) * kValue, out, r, writes);
    }
  }

  const AttentionParams& p;
  AttentionShared& s;
  int warpgroup_, lane_, row_;
  uint32_t queries_, keys_, values_, keys_full_, values_full_;
  RingState<kStages> keys_at_, values_at_;
};

}  // namespace dsv3
