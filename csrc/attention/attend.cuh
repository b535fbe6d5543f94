// The two warpgroups of mla_decode_kernel that multiply: scores, running softmax, output.
#pragma once

#include "decode.cuh"
#include "mma.cuh"

namespace dsv3 {

struct Softened {
  uint32_t probabilities[16];  // the A operand of the next product
  float max[2], sum[2];
};

// exp2(scores * scale - maximum), and the maximum: the one so far unless a score exceeds it by more than kSlack, so that
// the output is seldom rescaled; probabilities up to 2^kSlack lose nothing in floating point.
__device__ __forceinline__ void soften(float (&scores)[32], float scale, const float (&max_before)[2], Softened& to) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float highest = -INFINITY;
#pragma unroll
    for (int j = 0; j < 8; ++j) highest = fmaxf(highest, fmaxf(scores[4 * j + 2 * r], scores[4 * j + 2 * r + 1]));
    highest = quad_max(highest) * scale;
    to.max[r] = highest > max_before[r] + kSlack ? highest : max_before[r];
    const float base = finite(to.max[r]);
    to.sum[r] = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float& a = scores[4 * j + 2 * r];
      float& b = scores[4 * j + 2 * r + 1];
      a = fast_exp2(fmaf(a, scale, -base));
      b = fast_exp2(fmaf(b, scale, -base));
      to.sum[r] += a + b;
      to.probabilities[j / 2 * 4 + j % 2 * 2 + r] = pack_bf16(a, b);
    }
  }
}

// The output (and the sum) as if their maximum had been `max` all along.
__device__ __forceinline__ void rescale(float (&out)[128], RowState& state, const float (&max)[2]) {
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    factor[r] = fast_exp2(state.max[r] - finite(max[r]));
    state.sum[r] *= factor[r];
    state.max[r] = max[r];
  }
  if (!__any_sync(0xffffffffu, factor[0] != 1.f || factor[1] != 1.f)) return;
#pragma unroll
  for (int i = 0; i < 128; ++i) out[i] *= factor[i / 2 % 2];
}

template <class C, int kHalf>
struct Consumer {
  const DecodeParams& p;
  DecodeShared& s;
  uint32_t rank, queries, keys, full, empty, phases = 0, queries_phase = 0;
  int warp, lane, thread;

  __device__ __forceinline__ Consumer(const DecodeParams& params, DecodeShared& shared, uint32_t rank_)
      : p(params), s(shared), rank(rank_) {
    warp = uniform_warp() % kWarpgroupWarps;
    lane = threadIdx.x % kWarpSize;
    thread = threadIdx.x % kWarpgroup;
    queries = uniform(matrix_descriptor(shared_address(s.queries)));
    keys = shared_address(s.keys);
    full = shared_address(s.full);
    empty = shared_address(s.empty);
  }
  __device__ __forceinline__ int local_row(int r) const { return warp * 16 + lane / 4 + 8 * r; }
  __device__ __forceinline__ uint32_t phase(int buffer) const { return phases >> buffer & 1; }
  // The address of a tile's rotated columns, and then of its probabilities.
  __device__ __forceinline__ uint32_t rotated(int buffer) const {
    return keys + (buffer * kSubs + kSubs - 1) * kSubBytes;
  }

  // Issues the scores of this warpgroup's buffer: the columns of a half, as soon as they are there.
  template <int kWhich>
  __device__ __forceinline__ void start_scores(float (&scores)[32]) {
    // NOTE: made anew a tile: kept from one to the next, every sub-block's addresses would fill registers.
    const uint32_t tile = uniform(matrix_descriptor(keys + kHalf * kSubs * kSubBytes)), left = uniform(queries);
    constexpr bool kFirst = kWhich == 0;
    wait_barrier(full + (kHalf * 2 + kWhich) * 8, phase(kHalf));
    detail::fence_registers(scores);
    cute::warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int sub = kWhich * 4 + i;
      add_scores(left + sub * (kSubBytes / 16), tile + sub * (kSubBytes / 16), scores, kFirst && i == 0);
    }
    if constexpr (kWhich != kHalf) {
      add_scores(left + (kSubs - 1) * (kSubBytes / 16), uniform(matrix_descriptor(rotated(kHalf))), scores, false);
    }
    cute::warpgroup_commit_batch();
  }
  // Issues this half of the output's columns, of this warpgroup's buffer or of the other's. What is in a buffer has been
  // seen by the warpgroup that made its scores, and since then there was a barrier.
  __device__ __forceinline__ void start_own_values(Softened& soft, float (&out)[128], RowState& state) {
    rescale(out, state, soft.max);
    state.sum[0] += soft.sum[0];
    state.sum[1] += soft.sum[1];
    const uint32_t tile = uniform(columns_descriptor(keys + (kHalf * kSubs + kHalf * 4) * kSubBytes));
    detail::fence_registers(soft.probabilities);
    detail::fence_registers(out);
    cute::warpgroup_arrive();
    add_values(soft.probabilities, tile, out);
    cute::warpgroup_commit_batch();
  }
  __device__ __forceinline__ void start_other_values(float (&out)[128], RowState& state) {
    constexpr int kOther = 1 - kHalf;
    named_sync(kReady + kOther, 2 * kWarpgroup);
    const float max[2] = {s.row_max[local_row(0)], s.row_max[local_row(1)]};
    rescale(out, state, max);
    const uint32_t tile = uniform(columns_descriptor(keys + (kOther * kSubs + kHalf * 4) * kSubBytes));
    const uint32_t given = uniform(matrix_descriptor(rotated(kOther)));
    detail::fence_registers(out);
    cute::warpgroup_arrive();
    add_values(given, tile, out);
    cute::warpgroup_commit_batch();
  }
  __device__ __forceinline__ void finish_scores(float (&scores)[32]) {
    cute::warpgroup_wait<0>();
    detail::fence_registers(scores);
  }
  __device__ __forceinline__ void finish_values(int buffer, float (&out)[128]) {
    cute::warpgroup_wait<0>();
    detail::fence_registers(out);
    release_half<C>(empty, buffer * 2 + kHalf, rank);
    phases ^= 1u << buffer;
  }

  // What is behind a sequence's end, or a causal row's, has no weight; what is behind the end may also hold anything.
  __device__ __forceinline__ void mask(float (&scores)[32], const Piece& piece, int tile, const int (&visible)[2]) {
    const int first = tile * kTileKeys;
    if (first + kTileKeys <= piece.length - (p.causal ? p.steps - 1 : 0)) return;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if (first + i / 4 * 8 + lane % 4 * 2 + i % 2 >= visible[i / 2 % 2]) scores[i] = -INFINITY;
    }
    if (first + kTileKeys <= piece.length) return;
    const int valid = (piece.length - first) * 128;
    for (int sub = 0; sub < kValueSubs; ++sub) {
      for (int i = valid + thread * 16; i < kSubBytes; i += kWarpgroup * 16) {
        *reinterpret_cast<uint4*>(s.keys[kHalf][sub] + i) = uint4{};
      }
    }
    fence_shared_writes();
    named_sync(kTail + kHalf, kWarpgroup);
  }

  // Probabilities, in the place of the rotated columns, and maximum to the other warpgroup.
  __device__ __forceinline__ void give(const Softened& soft) {
    named_sync(kTail + kHalf, kWarpgroup);  // until every warp's scores are there, their product may read the place
    const int row = warp * 16 + lane % 16, chunk = lane / 16;
    const uint32_t to = rotated(kHalf) + row * 128;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t* const v = &soft.probabilities[4 * k];
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                       to + ((2 * k + chunk) ^ (row % 8)) * 16),
                   "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                   : "memory");
    }
    if (lane % 4 < 2) s.row_max[local_row(lane % 4)] = lane % 4 == 0 ? soft.max[0] : soft.max[1];
    fence_shared_writes();
    named_arrive(kReady + kHalf, 2 * kWarpgroup);
  }

  // The tile of this warpgroup, whose scores are there: its probabilities.
  __device__ __forceinline__ void make_probabilities(const Piece& piece, int tile, const int (&visible)[2],
                                                     float (&scores)[32], const RowState& state, Softened& soft) {
    mask(scores, piece, tile, visible);
    if (tile + 2 >= piece.end) release_queries();
    soften(scores, p.scale_log2, state.max, soft);
    detail::fence_registers(soft.probabilities);  // here, not behind the next wait
    give(soft);
  }

  __device__ __forceinline__ void attend_even(const Piece& piece, const int (&visible)[2], float (&out)[128],
                                              RowState& state) {
    float scores[32];
    start_scores<0>(scores);
    start_scores<1>(scores);
    finish_scores(scores);
    for (int tile = piece.begin; tile < piece.end; tile += 2) {
      const bool both = tile + 1 < piece.end, more = tile + 2 < piece.end;
      Softened soft;
      make_probabilities(piece, tile, visible, scores, state, soft);
      start_own_values(soft, out, state);
      finish_values(0, out);
      if (!both) break;
      start_other_values(out, state);
      finish_values(1, out);
      if (more) {
        start_scores<0>(scores);
        start_scores<1>(scores);
        finish_scores(scores);
      }
    }
  }

  __device__ __forceinline__ void attend_odd(const Piece& piece, const int (&visible)[2], float (&out)[128],
                                             RowState& state) {
    if (piece.begin + 1 >= piece.end) release_queries();
    for (int tile = piece.begin; tile < piece.end; tile += 2) {
      const bool both = tile + 1 < piece.end;
      float scores[32];
      if (both) {
        start_scores<0>(scores);
        start_scores<1>(scores);
        finish_scores(scores);
      }
      start_other_values(out, state);
      if (!both) {
        finish_values(0, out);
        break;
      }
      Softened soft;
      make_probabilities(piece, tile + 1, visible, scores, state, soft);
      finish_values(0, out);
      start_own_values(soft, out, state);
      finish_values(1, out);
    }
  }

  __device__ __forceinline__ void release_queries() {
    if (lane == 0) cutlass::arch::ClusterBarrier::arrive(&s.queries_empty);
  }

  // Divides by the sum of both warpgroups and writes the rows that exist.
  __device__ __forceinline__ void write(const Piece& piece, int parity, float factor, float (&out)[128],
                                        const RowState& state) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(state.sum[r]);
      if (lane % 4 == 0) s.row_sum[parity][kHalf][local_row(r)] = sum;
    }
    named_sync_apart(kEnd, 2 * kWarpgroup);
    const int64_t cluster_row = static_cast<int64_t>(piece.partial) * (C::kCluster * kBlockRows) + rank * kBlockRows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int local = local_row(r), row = (piece.group * C::kCluster + static_cast<int>(rank)) * kBlockRows + local;
      const float sum = s.row_sum[parity][0][local] + s.row_sum[parity][1][local];
      const float inverse = (sum == 0.f ? 0.f : 1.f / sum) * factor;
#pragma unroll
      for (int i = r * 2; i < 128; i += 4) {
        out[i] *= inverse;
        out[i + 1] *= inverse;
      }
      const float lse = (sum == 0.f ? -INFINITY : state.max[r] + log2f(sum)) * factor;
      const bool writes = row < p.rows;
      if (piece.partial >= p.partials) continue;  // keys behind the table: reported, and NaN in the end
      if (piece.partial >= 0) {
        if (writes && kHalf == 0 && lane % 4 == 0) p.partial_lse[cluster_row + local] = lse;
        write_partial(p.partial + (cluster_row + local) * kLatent + kHalf * kHalfColumns, out, r, writes);
      } else {
        if (writes && kHalf == 0 && lane % 4 == 0) {
          const int step = row / p.heads, head = row % p.heads;
          p.lse[(static_cast<int64_t>(piece.batch) * p.heads + head) * p.steps + step] = lse * kLn2;
        }
        write_row(p.out + (static_cast<int64_t>(piece.batch) * p.rows + row) * kLatent + kHalf * kHalfColumns, out, r,
                  writes);
      }
    }
  }
  // Neighbouring lanes exchange a pair of columns, so that each has four in a row.
  __device__ __forceinline__ void write_partial(float* to, const float (&out)[128], int r, bool writes) {
    const int q = lane % 4;
    const bool odd = q % 2;
#pragma unroll
    for (int j = 0; j < 32; j += 2) {
      const float* const a = &out[4 * j + 2 * r];
      const float* const b = a + 4;
      const float x = __shfl_xor_sync(0xffffffffu, odd ? a[0] : b[0], 1);
      const float y = __shfl_xor_sync(0xffffffffu, odd ? a[1] : b[1], 1);
      const float4 four = odd ? make_float4(x, y, b[0], b[1]) : make_float4(a[0], a[1], x, y);
      if (writes) *reinterpret_cast<float4*>(to + (j + q % 2) * 8 + q / 2 * 4) = four;
    }
  }

  __device__ __forceinline__ void run() {
    Pieces pieces(p.schedule, p.seq_lens, blockIdx.x / C::kCluster);
    Piece piece;
    int loaded = 1;  // parity of the pieces that have keys
    for (int parity = 0; pieces.next(piece); parity ^= 1) {
      float out[128] = {};
      RowState state;
      if (piece.begin < piece.end) {
        int visible[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = (piece.group * C::kCluster + static_cast<int>(rank)) * kBlockRows + local_row(r);
          visible[r] = p.causal ? min(piece.length - p.steps + row / p.heads + 1, piece.length) : piece.length;
        }
        wait_barrier(shared_address(&s.queries_full), queries_phase);
        queries_phase ^= 1;
        if constexpr (kHalf == 0) {
          attend_even(piece, visible, out, state);
        } else {
          attend_odd(piece, visible, out, state);
        }
      }
      loaded ^= piece.begin < piece.end;
      const float factor = piece.begin < piece.end && s.bad[loaded] ? NAN : 1.f;
      write(piece, parity, factor, out, state);
    }
  }
};

}  // namespace dsv3
