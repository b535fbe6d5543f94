// Divides the keys of a batch among the workers of mla_decode: seq_lens int32 [B] -> schedule (schedule.cuh).
//
// A piece costs its tiles and kPieceTiles more (queries in, results out). Every worker gets the same budget, the smallest
// with which all keys find a place, and takes from where the one before stopped: whole sequences, if that takes no more
// than kSplitTiles longer than cutting them, since what is cut leaves 64 x 512 fp32 a block for another kernel to combine.
// One thread walks over the sequences, a few times with a growing budget: some microseconds a step of the model, whose
// layers share the result.
#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "../ops.h"
#include "schedule.cuh"

namespace dsv3 {
namespace {

constexpr int kThreads = 256;
constexpr int kPieceTiles = 2, kFewestTiles = 2, kSplitTiles = 6;

// How sequences become pieces: of at most piece_tiles tiles; `cuts`: smaller ones where a budget ends.
struct Division {
  int piece_tiles;
  bool cuts;
};
constexpr int kWhole = 1 << 30;

// Lays the pieces out with a budget a worker; false where keys are left over.
__device__ bool divide(const DecodeSchedule& s, const int* seq_lens, int groups, const Division& division, int budget) {
  int sequence = 0, tile = 0, piece = 0, partials = 0, splits = 0;
  int tiles = s.sequences > 0 ? ceil_div(num_keys(seq_lens, 0), kTileKeys) : 0;
  if (s.sequences > 0) s.first_partial()[0] = 0;
  for (int worker = 0; worker < s.workers; ++worker) {
    s.begin()[worker] = {sequence, tile, piece};
    int left = budget;
    while (sequence < s.sequences) {
      int take = min(tiles - tile, division.piece_tiles);
      if (take + kPieceTiles > left) {
        take = division.cuts ? (left - kPieceTiles) / 2 * 2 : 0;  // tiles go through in pairs
        if (take <= 0) break;
      }
      left -= take + kPieceTiles;
      tile += take;
      ++piece;
      if (tile < tiles) continue;
      if (piece > 1) {
        s.split()[splits++] = sequence;
        partials += piece;
      }
      ++sequence;
      s.first_partial()[sequence] = partials;
      tile = piece = 0;
      if (sequence < s.sequences) tiles = ceil_div(num_keys(seq_lens, sequence / groups), kTileKeys);
    }
  }
  s.begin()[s.workers] = {sequence, tile, piece};
  s.splits() = splits;
  s.piece_tiles() = division.piece_tiles;
  return sequence == s.sequences;
}

// The smallest budget from `from` to `to` with which it fits, or one above.
__device__ int fit(const DecodeSchedule& s, const int* seq_lens, int groups, const Division& division, int from,
                   int to) {
  int budget = from;
  while (budget <= to && !divide(s, seq_lens, groups, division, budget)) budget += max(1, budget / 64);
  return budget;
}

__global__ void __launch_bounds__(kThreads)
    mla_schedule_kernel(DecodeSchedule s, const int* seq_lens, int groups, bool invariant) {
  __shared__ float scratch[kThreads / kWarpSize];
  wait_for_inputs();
  release_dependents();
  // NOTE: as a float, which is exact below 2^24 tiles; above, the budget starts a little off and grows by a step more.
  for (int i = threadIdx.x; i < DecodeSchedule::size(s.workers, s.sequences); i += kThreads) s.data[i] = 0;
  float cost = 0.f;
  for (int i = threadIdx.x; i < s.sequences; i += kThreads) {
    const int tiles = ceil_div(num_keys(seq_lens, i / groups), kTileKeys);
    cost += static_cast<float>(tiles + kPieceTiles * (invariant ? max(1, ceil_div(tiles, kInvariantTiles)) : 1));
  }
  cost = block_reduce<Sum, kThreads>(cost, scratch);
  if (threadIdx.x != 0) return;
  const int even = static_cast<int>(ceilf(cost / s.workers));
  if (invariant) {
    fit(s, seq_lens, groups, {kInvariantTiles, false}, max(even, kInvariantTiles + kPieceTiles), kWhole);
    return;
  }
  const int cut = max(even + kPieceTiles, kFewestTiles + kPieceTiles);
  const int budget = fit(s, seq_lens, groups, {kWhole, true}, cut, kWhole), longest = budget + kSplitTiles;
  if (s.splits() == 0 || fit(s, seq_lens, groups, {kWhole, false}, even, longest) <= longest) return;
  divide(s, seq_lens, groups, {kWhole, true}, budget);
}

}  // namespace

void mla_schedule(Tensor schedule, Tensor seq_lens, int64_t steps, int64_t heads, bool batch_invariant,
                  cudaStream_t stream) {
  check_operand("seq_lens", seq_lens, Dtype::kInt32);
  DSV3_CHECK(seq_lens.dim() == 1, "seq_lens must be (B), got ", seq_lens);
  DSV3_CHECK(steps >= 1 && heads >= 1, "s_q and heads must be at least 1, got ", steps, " and ", heads);
  const DeviceGuard guard(seq_lens);
  const int cluster = cluster_blocks(steps * heads);
  const int64_t groups = ceil_div(steps * heads, kBlockRows * cluster), sequences = seq_lens.size(0) * groups;
  const int workers = sm_count() / cluster;
  DSV3_CHECK(sequences < 1 << 30, "too many sequences: ", sequences);
  check_operand("schedule", schedule, Dtype::kInt32, DecodeSchedule::size(workers, sequences));
  const DecodeSchedule s{schedule.data<int>(), workers, static_cast<int>(sequences)};
  launch("mla_schedule", mla_schedule_kernel, {dim3(1), dim3(kThreads)}, stream, s, seq_lens.data<int>(),
         static_cast<int>(groups), batch_invariant);
}

}  // namespace dsv3
