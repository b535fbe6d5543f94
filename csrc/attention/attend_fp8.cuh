// The two warpgroups that multiply, over an FP8 cache: scores, running softmax, output, all of them transposed.
//
// The tensor core reads fp16, which has codes exactly and takes one instruction a pair. Scales, powers of two, multiply them
// relative to others: of keys, to the largest of the key's four, which multiplies the scores; of values, to a unit for each
// 128 columns of the output, which follows the largest scale met so far as the softmax's base follows the largest score.
// Products are exact where scales are within 2^15 of the largest of the key, or 2^18 of the largest of the values so far;
// what is 2^-25 of that scale does not count.
#pragma once

#include <cfloat>

#include "../common/e4m3.cuh"
#include "decode_fp8.cuh"
#include "register_product.cuh"

namespace dsv3 {

template <class C>
class Fp8Consumer {
 public:
  __device__ __forceinline__ Fp8Consumer(const DecodeParams& params, Fp8Shared<C>& shared, uint32_t rank)
      : p(params), s(shared), rank_(rank) {
    warpgroup_ = static_cast<int>(uniform_warp() / kWarpgroupWarps);
    warp_ = static_cast<int>(uniform_warp() % kWarpgroupWarps);
    lane_ = static_cast<int>(threadIdx.x % kWarpSize);
    queries_ = uniform(matrix_descriptor(shared_address(s.queries)));
    probabilities_ = shared_address(s.probabilities);
    keys_ = shared_address(s.keys);
    full_ = shared_address(s.full);
    empty_ = shared_address(s.empty);
  }

  __device__ __forceinline__ void run() {
    Pieces pieces(p.schedule, p.seq_lens, blockIdx.x / C::kCluster);
    Piece piece;
    int number = 0;  // of the pieces that have keys
    while (pieces.next(piece)) {
      first_row_ = (piece.group * C::kCluster + static_cast<int>(rank_)) * kBlockRows;
      Output out = {};
      Sums sums = {};
      float factor = 1.f;
      if (piece.begin < piece.end) {
        load_queries(piece);
        attend(piece, out, sums);
        if (s.bad[number++ % kPieceFlags]) factor = NAN;
      }
      write(piece, factor, out, sums);
    }
  }

 private:
  static constexpr int kN = C::kRows, kEights = kN / 8, kBlocks = C::kColumns / 64;
  static constexpr int kAll = C::kWarpgroups * kWarpgroup, kWarps = C::kWarpgroups * kWarpgroupWarps;
  using Wgmma = RegisterWgmma<kN>;
  using Scores = float[kN / 2];
  using Output = float[kBlocks][kN / 2];
  using Sums = float[kN / 4];  // of a lane's rows, over its keys of this warpgroup's tiles
  // Probabilities are 2^kRaised at the base, so that small ones are normal numbers of fp16, and at most 2^kSlack larger.
  static constexpr float kRaised = 7.f, kLargest = 32768.f;
  static_assert(kRaised + kSlack == 15.f, "kLargest is 2^(kRaised + kSlack)");
  // A unit is 2^-3 of the largest scale when it is chosen, and 2^-7 of what is met later at most: 448 2^7 is an fp16.
  static constexpr float kUnit = 0x1p-3f, kMostUnits = 0x1p7f, kLeastUnit = 0x1p-126f;
  // Named barriers: 0 is __syncthreads. kReady: probabilities for the other warpgroup; kOwn: within one.
  enum : int { kReady = 1, kOwn = kReady + C::kWarpgroups, kEnd = kOwn + C::kWarpgroups };

  // Of a fragment's rows a lane has two, 8 apart, and of every 8 columns two: keys or output columns, and rows.
  __device__ __forceinline__ int key_of(int r) const { return warp_ * 16 + lane_ / 4 + 8 * r; }
  __device__ __forceinline__ int row_of(int eight) const { return eight * 8 + lane_ % 4 * 2; }
  __device__ __forceinline__ float2 pair_at(const float (&values)[kN], int eight) const {
    return *reinterpret_cast<const float2*>(&values[row_of(eight)]);
  }
  __device__ __forceinline__ uint32_t tile_at(const RingState<C::kStages>& at) const {
    return keys_ + at.stage * kFp8TileBytes;
  }
  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x % kWarpgroup); }
  __device__ __forceinline__ void sync_own() const { named_sync(kOwn + warpgroup_, kWarpgroup); }

  // ---- queries ----
  // Each row times a power of two that brings its largest value to 2^14 or more, so that fp16 has it as exactly as bf16.
  __device__ __forceinline__ void load_queries(const Piece& piece) {
    constexpr int kAtOnce = kN / kWarps < 4 ? kN / kWarps : 4;
    const auto* const from = p.q + static_cast<int64_t>(piece.batch) * p.rows * kKeyColumns;
#pragma unroll 1
    for (int base = warpgroup_ * kWarpgroupWarps + warp_; base < kN; base += kAtOnce * kWarps) {
      uint4 values[kAtOnce][3];  // 8 columns of 256, 8 of the next 256, and 8 of those that are rotated
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = first_row_ + base + i * kWarps;
        const auto* const at = reinterpret_cast<const uint4*>(from + static_cast<int64_t>(row) * kKeyColumns);
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          const bool there = row < p.rows && k * kWarpSize + lane_ < kKeyColumns / 8;
          values[i][k] = there ? at[k * kWarpSize + lane_] : make_uint4(0, 0, 0, 0);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) store_query(base + i * kWarps, values[i]);
    }
    if (threadIdx.x < kScaleBlocks) s.unit[threadIdx.x] = kLeastUnit;
    fence_shared_writes();
    named_sync(kEnd, kAll);
  }
  __device__ __forceinline__ void store_query(int row, const uint4 (&values)[3]) {
    uint32_t largest = 0;  // of the absolute values, as bits
#pragma unroll
    for (const uint4& v : values) {
      for (const uint32_t w : {v.x, v.y, v.z, v.w}) largest = max(largest, max(w & 0x7fffu, w >> 16 & 0x7fffu));
    }
    const int exponent = static_cast<int>(__reduce_max_sync(0xffffffffu, largest) >> 7);
    // 253 at most: a power of two whose reciprocal is a normal number too. Of what is not finite nothing becomes finite.
    const int multiplier_bits = exponent == 255 ? 127 : min(127 + 14 + 127 - exponent, 253);
    const float multiplier = __int_as_float(multiplier_bits << 23);
    if (lane_ == 0) {
      s.factor[row] = p.scale_log2 * __int_as_float((254 - multiplier_bits) << 23);
      s.base[row] = -FLT_MAX;
    }
    const int swizzle = row % 8;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int chunk = k * kWarpSize + lane_;  // of 8 columns
      uint8_t* const to = s.queries[chunk / 8] + row * 128 + chunk % 2 * 8;
      const uint32_t w[4] = {scaled_half(values[k].x, multiplier), scaled_half(values[k].y, multiplier),
                             scaled_half(values[k].z, multiplier), scaled_half(values[k].w, multiplier)};
      const int place = chunk % 8 / 2 * 2;
      *reinterpret_cast<uint2*>(to + (place ^ swizzle) * 16) = make_uint2(w[0], w[2]);
      *reinterpret_cast<uint2*>(to + ((place + 1) ^ swizzle) * 16) = make_uint2(w[1], w[3]);
    }
    if (lane_ < 8) {
      const uint4& v = values[2];
      *reinterpret_cast<uint4*>(s.queries[kValueSubs] + row * 128 + (lane_ ^ swizzle) * 16) =
          make_uint4(scaled_bf16(v.x, multiplier), scaled_bf16(v.y, multiplier), scaled_bf16(v.z, multiplier),
                     scaled_bf16(v.w, multiplier));
    }
  }

  // ---- a piece ----
  __device__ __forceinline__ void attend(const Piece& piece, Output& out, Sums& sums) {
    const int count = piece.end - piece.begin;
    int slot = 0, owner = 0;  // of tile i
    if (warpgroup_ == 0) {
      Scores scores;
      make_scores(piece, piece.begin, ring_, scores);
      make_probabilities(piece, piece.begin, ring_, slot, scores, sums);
    }
    for (int i = 0; i < count; ++i) {
      const int next_slot = slot + 1 == C::kSlots ? 0 : slot + 1;
      const int next_owner = owner + 1 == C::kWarpgroups ? 0 : owner + 1;
      if (i + 1 < count && next_owner == warpgroup_) {
        RingState<C::kStages> next = ring_;
        next.advance();
        Scores scores;
        make_scores(piece, piece.begin + i + 1, next, scores);
        receive(slot, owner, out, sums);
        make_probabilities(piece, piece.begin + i + 1, next, next_slot, scores, sums);
      } else {
        receive(slot, owner, out, sums);
      }
      add_values(slot, out);
      ring_.advance();
      slot = next_slot;
      owner = next_owner;
    }
  }

  // ---- scores of a tile ----
  __device__ __forceinline__ void make_scores(const Piece& piece, int tile, const RingState<C::kStages>& at,
                                              Scores& scores) {
    wait_barrier(full_ + at.stage * 8, at.phase);
    const uint32_t codes = tile_at(at);
    clear_tail(piece, tile, at.stage);
    const uint32_t from = codes + (warp_ * 16 + lane_ % 16) * kFp8Row + lane_ / 16 * 16;
    // This lane's two keys' scales, relative to a power of two, and what that does to the rotated columns.
    const float4 scales[2] = {load_scales(codes, key_of(0)), load_scales(codes, key_of(1))};
    Fragment fragments[kFragments], rotated[2];
    uint32_t ahead[kAhead][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) load_matrices(rotated[i / 2].words[i % 2], from + kFp8Rotated + i * 32);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load_matrices(ahead[i], from + i * 32);
    float power[2], inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      power[r] = power_of_two(fmaxf(fmaxf(scales[r].x, scales[r].y), fmaxf(scales[r].z, scales[r].w)), 0x1p-60f);
      inverse[r] = reciprocal(power[r]);
    }
    const __half2 factors[kScaleBlocks] = {__floats2half2_rn(scales[0].x * inverse[0], scales[1].x * inverse[1]),
                                           __floats2half2_rn(scales[0].y * inverse[0], scales[1].y * inverse[1]),
                                           __floats2half2_rn(scales[0].z * inverse[0], scales[1].z * inverse[1]),
                                           __floats2half2_rn(scales[0].w * inverse[0], scales[1].w * inverse[1])};
    const __nv_bfloat162 shrink[2] = {__float2bfloat162_rn(inverse[0]), __float2bfloat162_rn(inverse[1])};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        auto& pair = reinterpret_cast<__nv_bfloat162&>(rotated[i].words[k / 4][k % 4]);
        pair = __hmul2(pair, shrink[k % 2]);
      }
      start_register_product<typename Wgmma::BFloat16>(rotated[i], query_at(2 * kValueSubs + i), scores, i > 0);
    }
#pragma unroll
    for (int i = 0; i < 2 * kValueSubs; ++i) {  // 32 columns
      Fragment& a = fragments[i % kFragments];
      if (i >= kFragments) finish_register_product<kFragments - 1>(a);
      const __half2 factor = factors[i * 32 / kScaleColumns];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t low, high;
        to_half(ahead[i % kAhead][k], low, high);
        const __half2 both = k % 2 == 0 ? __low2half2(factor) : __high2half2(factor);
        a.words[k / 2][k % 2] = scaled(low, both);
        a.words[k / 2][k % 2 + 2] = scaled(high, both);
      }
      if (i + kAhead < 2 * kValueSubs) load_matrices(ahead[i % kAhead], from + (i + kAhead) * 32);
      start_register_product<typename Wgmma::Half>(a, query_at(i), scores, true);
    }
    cute::warpgroup_wait<0>();
    detail::fence_registers(scores);
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) scores[i] *= power[i / 2 % 2];
  }
  __device__ __forceinline__ uint32_t query_at(int i) const {  // columns 32 i and on
    return uniform(queries_) + i / 2 * (kN * 128 / 16) + i % 2 * 4;
  }
  // What is behind the end of a sequence may hold anything; zeros have no weight and do no harm.
  __device__ __forceinline__ void clear_tail(const Piece& piece, int tile, int stage) const {
    const int valid = piece.length - tile * kTileKeys;
    if (valid >= kTileKeys) return;
    for (int i = valid * kFp8Row + thread() * 16; i < kFp8TileBytes; i += kWarpgroup * 16) {
      *reinterpret_cast<uint4*>(s.keys[stage] + i) = uint4{};
    }
    fence_shared_writes();  // TMA writes here next
    sync_own();
  }

  // ---- softmax ----
  __device__ __forceinline__ void make_probabilities(const Piece& piece, int tile, const RingState<C::kStages>& at,
                                                     int slot, Scores& scores, Sums& sums) {
    mask(piece, tile, scores);
    const float4 scales[2] = {load_scales(tile_at(at), key_of(0)), load_scales(tile_at(at), key_of(1))};
    uint32_t pairs[kEights][2];
    Sums total;
    const bool beyond = exceed_unit(scales[0]) | exceed_unit(scales[1]);
    const bool changed = any_of_warpgroup(kOwn + warpgroup_, soften(scores, pairs, total) | beyond);
    if (changed) {
      raise(slot, scores, scales, sums);
      soften(scores, pairs, total);
    }
    if (thread() == 0) s.changed[slot] = changed;
    const int t = lane_ % 4;  // of four: it has a column of scales
    const float inverse_unit = reciprocal(s.unit[t]);
    const int chunk = (warp_ * 2 + lane_ / 8 % 2) ^ lane_ % 8;
    const uint32_t to = probabilities_ + slot * (kN * 128) + (lane_ / 16 * 8 + lane_ % 8) * 128 + chunk * 16;
#pragma unroll
    for (int j = 0; j < kEights; j += 2) {
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to + j * (8 * 128)),
                   "r"(pairs[j][0]), "r"(pairs[j][1]), "r"(pairs[j + 1][0]), "r"(pairs[j + 1][1])
                   : "memory");
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float low = t % 2 ? scales[r].y : scales[r].x, high = t % 2 ? scales[r].w : scales[r].z;
      s.scales[slot][t][key_of(r)] = __float2half_rn((t < 2 ? low : high) * inverse_unit);
    }
    fence_shared_writes();
    named_arrive(kReady + warpgroup_, kAll);
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) sums[i] += total[i];
  }
  // exp2(score - base), and whether one exceeds kLargest.
  __device__ __forceinline__ bool soften(const Scores& scores, uint32_t (&pairs)[kEights][2], Sums& total) const {
    __half2 highest = __float2half2_rn(0.f);
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      const float2 factor = pair_at(s.factor, j), base = pair_at(s.base, j);
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[i] = fast_exp2(fmaf(scores[4 * j + i], i % 2 ? factor.y : factor.x, -(i % 2 ? base.y : base.x)));
      }
      total[2 * j] = v[0] + v[2];
      total[2 * j + 1] = v[1] + v[3];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        pairs[j][r] = pack_half(v[2 * r], v[2 * r + 1]);
        highest = __hmax2(highest, reinterpret_cast<const __half2&>(pairs[j][r]));
      }
    }
    return exceeds(__hmax(__low2half(highest), __high2half(highest)));
  }
  static __device__ __forceinline__ bool exceeds(__half x) { return __half2float(x) > kLargest; }
  __device__ __forceinline__ bool exceed_unit(const float4& scales) const {
    const float4 unit = *reinterpret_cast<const float4*>(s.unit);
    return (scales.x > unit.x * kMostUnits) | (scales.y > unit.y * kMostUnits) | (scales.z > unit.z * kMostUnits) |
           (scales.w > unit.w * kMostUnits);
  }
  __device__ __forceinline__ void mask(const Piece& piece, int tile, Scores& scores) const {
    const int first = tile * kTileKeys;
    if (first + kTileKeys <= piece.length - (p.causal ? p.steps - 1 : 0)) return;
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int step = (first_row_ + row_of(j) + e) / p.heads;
        const int visible = p.causal ? min(piece.length - p.steps + step + 1, piece.length) : piece.length;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (first + key_of(r) >= visible) scores[4 * j + 2 * r + e] = -INFINITY;
        }
      }
    }
  }
  // A row's base and a unit change where this tile exceeds them: a matter of that row, or of those columns, alone.
  __device__ __forceinline__ void raise(int slot, const Scores& scores, const float4 (&scales)[2], Sums& sums) {
    const int wide_warp = warpgroup_ * kWarpgroupWarps + warp_;
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      float2 highest =
          make_float2(fmaxf(scores[4 * j], scores[4 * j + 2]), fmaxf(scores[4 * j + 1], scores[4 * j + 3]));
#pragma unroll
      for (int offset = 4; offset < kWarpSize; offset *= 2) {
        highest.x = fmaxf(highest.x, __shfl_xor_sync(0xffffffffu, highest.x, offset));
        highest.y = fmaxf(highest.y, __shfl_xor_sync(0xffffffffu, highest.y, offset));
      }
      if (lane_ < 4) *reinterpret_cast<float2*>(&s.of_warp[wide_warp][row_of(j)]) = highest;
    }
    const float4 largest = make_float4(warp_max(scales[0].x, scales[1].x), warp_max(scales[0].y, scales[1].y),
                                       warp_max(scales[0].z, scales[1].z), warp_max(scales[0].w, scales[1].w));
    if (lane_ == 0) *reinterpret_cast<float4*>(s.scale_of_warp[wide_warp]) = largest;
    sync_own();
    const int first = warpgroup_ * kWarpgroupWarps;
    if (const int row = thread(); row < kN) {
      float highest = -INFINITY;
      for (int i = 0; i < kWarpgroupWarps; ++i) highest = fmaxf(highest, s.of_warp[first + i][row]);
      const float before = s.base[row], factor = s.factor[row];
      const bool raised = exceeds(__float2half_rn(fast_exp2(fmaf(highest, factor, -before))));
      const float base = raised ? highest * factor - kRaised : before;
      s.base[row] = base;
      s.row_correction[slot][row] = fast_exp2(before - base);
    }
    if (const int block = thread() - (kWarpgroup - kScaleBlocks); block >= 0) {
      float most = 0.f;
      for (int i = 0; i < kWarpgroupWarps; ++i) most = fmaxf(most, s.scale_of_warp[first + i][block]);
      const float before = s.unit[block];
      const float unit = most > before * kMostUnits ? power_of_two(most * kUnit, kLeastUnit) : before;
      s.unit[block] = unit;
      s.unit_correction[slot][block] = before * reciprocal(unit);
    }
    sync_own();
    correct_sums(slot, sums);
  }
  __device__ __forceinline__ void correct_sums(int slot, Sums& sums) const {
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      const float2 rows = pair_at(s.row_correction[slot], j);
      sums[2 * j] *= rows.x;
      sums[2 * j + 1] *= rows.y;
    }
  }

  // ---- output ----
  // Until the probabilities of a tile are there; what was summed before is corrected by them.
  __device__ __forceinline__ void receive(int slot, int owner, Output& out, Sums& sums) {
    if (owner == warpgroup_) {
      sync_own();
    } else {
      named_sync(kReady + owner, kAll);
    }
    if (s.changed[slot] == 0) return;
    if (owner != warpgroup_) correct_sums(slot, sums);
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      const float2 rows = pair_at(s.row_correction[slot], j);
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        const float unit = s.unit_correction[slot][unit_of(m)];
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][4 * j + i] *= (i % 2 ? rows.y : rows.x) * unit;
      }
    }
  }
  // Of 64 of this warpgroup's columns.
  __device__ __forceinline__ int unit_of(int m) const { return (warpgroup_ * C::kColumns + m * 64) / kScaleColumns; }

  __device__ __forceinline__ void add_values(int slot, Output& out) {
    constexpr int kInBlock = 2 * kScaleColumns / 64;  // fragments whose columns share scales
    const uint32_t given = uniform(matrix_descriptor(probabilities_ + slot * (kN * 128)));
    const uint32_t from = tile_at(ring_) + lane_ * kFp8Row + warpgroup_ * C::kColumns + warp_ * 16;
    Fragment fragments[kFragments];
    __half2 scales[8];
    uint32_t ahead[kAhead][4];
    const auto load = [&](int i) { load_transposed(ahead[i % kAhead], from + i % 2 * (32 * kFp8Row) + i / 2 * 64); };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(i);
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {  // 64 columns of 32 keys
      if (i % kInBlock == 0) {
        const auto& of_keys = s.scales[slot][unit_of(i / 2)];
#pragma unroll
        for (int j = 0; j < 8; ++j) scales[j] = *reinterpret_cast<const __half2*>(&of_keys[8 * j + lane_ % 4 * 2]);
      }
      Fragment& a = fragments[i % kFragments];
      if (i >= kFragments) finish_register_product<kFragments - 1>(a);
      // A word has keys 2t and 2t + 1 of eight (lane t of four), and columns 2g and 2g + 1 of 16 (g = lane / 4): these
      // become rows g and g + 8 of the product.
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t first, second;
        to_half(__byte_perm(ahead[i % kAhead][j], 0, 0x3120), first, second);
        a.words[j / 2][j % 2 * 2] = scaled(first, scales[i % 2 * 4 + j]);
        a.words[j / 2][j % 2 * 2 + 1] = scaled(second, scales[i % 2 * 4 + j]);
      }
      if (i + kAhead < 2 * kBlocks) load(i + kAhead);
      if (i + 1 == 2 * kBlocks) release();
      start_register_product<typename Wgmma::Half>(a, given + i % 2 * 4, out[i / 2], true);
    }
    cute::warpgroup_wait<0>();
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) detail::fence_registers(out[m]);
  }
  // By a whole warp, which has read what it needs of the tile: in every block of the cluster.
  __device__ __forceinline__ void release() const {
    const uint32_t empty = empty_ + ring_.stage * 8;
    if (lane_ == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty) : "memory");
    if (C::kCluster == 2 && lane_ == 1) {
      // NOTE: without .release.cluster, as in RingBarriers::release.
      asm volatile(
          "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; mbarrier.arrive.shared::cluster.b64 _, "
          "[remote]; }" ::"r"(empty),
          "r"(rank_ ^ 1)
          : "memory");
    }
  }

  // Divides by the sums of both warpgroups and writes the rows that exist.
  __device__ __forceinline__ void write(const Piece& piece, float factor, const Output& out, const Sums& sums) {
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      float2 both = make_float2(sums[2 * j], sums[2 * j + 1]);
#pragma unroll
      for (int offset = 4; offset < kWarpSize; offset *= 2) {
        both.x += __shfl_xor_sync(0xffffffffu, both.x, offset);
        both.y += __shfl_xor_sync(0xffffffffu, both.y, offset);
      }
      if (lane_ < 4) *reinterpret_cast<float2*>(&s.of_warp[warpgroup_ * kWarpgroupWarps + warp_][row_of(j)]) = both;
    }
    named_sync(kEnd, kAll);
    const int64_t partial_row = static_cast<int64_t>(piece.partial) * (C::kCluster * kBlockRows) + rank_ * kBlockRows;
    const bool lost = piece.partial >= p.partials;  // keys behind the table: reported, and NaN in the end
    if (const int local = static_cast<int>(threadIdx.x), row = first_row_ + local; local < kN) {
      float sum = 0.f;
      for (int i = 0; i < kWarps; ++i) sum += s.of_warp[i][local];
      s.inverse[local] = (sum == 0.f ? 0.f : 1.f / sum) * factor;
      const float lse = (sum == 0.f ? -INFINITY : s.base[local] + log2f(sum)) * factor;
      if (row < p.rows && !lost) {
        if (piece.partial >= 0) {
          p.partial_lse[partial_row + local] = lse;
        } else {
          const int step = row / p.heads, head = row % p.heads;
          p.lse[(static_cast<int64_t>(piece.batch) * p.heads + head) * p.steps + step] = lse * kLn2;
        }
      }
    }
    float units[kBlocks];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) units[m] = piece.begin < piece.end ? s.unit[unit_of(m)] : 1.f;
    named_sync(kEnd, kAll);
    if (lost) return;
    const int column = warpgroup_ * C::kColumns + warp_ * 16 + lane_ / 4 * 2;
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      const float2 inverse = pair_at(s.inverse, j);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int local = row_of(j) + e, row = first_row_ + local;
        if (row >= p.rows) continue;
        auto* const to = p.out + (static_cast<int64_t>(piece.batch) * p.rows + row) * kLatent + column;
        auto* const to_partial = p.partial + (partial_row + local) * kLatent + column;
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          const float scale = (e ? inverse.y : inverse.x) * units[m];
          const float first = out[m][4 * j + e] * scale, second = out[m][4 * j + 2 + e] * scale;
          if (piece.partial >= 0) {
            *reinterpret_cast<float2*>(to_partial + m * 64) = make_float2(first, second);
          } else {
            *reinterpret_cast<uint32_t*>(to + m * 64) = pack_bf16(first, second);
          }
        }
      }
    }
  }

  const DecodeParams& p;
  Fp8Shared<C>& s;
  const uint32_t rank_;
  int warpgroup_, warp_, lane_, first_row_ = 0;
  uint32_t queries_, probabilities_, keys_, full_, empty_;
  RingState<C::kStages> ring_;
};

}  // namespace dsv3
