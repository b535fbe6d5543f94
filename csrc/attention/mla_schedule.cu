// Divides the keys of a batch among the workers of mla_decode: seq_lens int32 [B] -> schedule (schedule.cuh).
//
// A piece costs its tiles and kPieceTiles more (queries in, results out), and a sequence what its pieces cost. Sequences lie
// one after the other on a line of costs, and worker w begins where w equal shares of it end: in the middle of a sequence
// (at an even tile, since tiles go through in pairs), or, where the order of sums must not depend on the batch, at the next
// piece of kInvariantTiles. So every thread can work out the workers that begin in its sequences by itself.
// What is cut leaves 64 x 512 fp32 a block for another kernel to combine. Whole sequences are taken instead, the longest first
// and each by the worker that has least, if the longest share is then no more than kSplitTiles longer.
#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "../ops.h"
#include "schedule.cuh"

namespace dsv3 {
namespace {

constexpr int kThreads = 256;
constexpr int kPieceTiles = 2, kFewestTiles = 2, kSplitTiles = 6;
constexpr int kWhole = 1 << 30;
constexpr int kKept = 8192;        // lengths of a batch that are kept in shared memory, in tiles
constexpr int kMostWhole = 1024;   // sequences that may be taken whole: sorting takes the square of it
constexpr int kMostWorkers = 160;  // of whole sequences

struct ScheduleShared {
  int tiles[kKept];
  int sorted[kMostWhole], taken_by[kMostWhole];  // sequences, the longest first; their workers
  int64_t sums[kThreads / kWarpSize];
  int longest;  // tiles of a sequence
  bool whole;
};

// The sum of x over the threads before this one, and over all.
struct Scan {
  int64_t before, total;
  __device__ Scan(int64_t x, int64_t* scratch) : before(x), total(0) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int64_t lower = __shfl_up_sync(0xffffffffu, before, distance);
      if (lane >= distance) before += lower;
    }
    __syncthreads();  // what was in scratch has been read
    if (lane == kWarpSize - 1) scratch[warp] = before;
    __syncthreads();
    before -= x;
    for (int i = 0; i < kThreads / kWarpSize; ++i) {
      if (i < warp) before += scratch[i];
      total += scratch[i];
    }
  }
};

// The line of costs as one thread sees it: sequences `first` to `last`, the first of which begins at `start`.
struct Line {
  const DecodeSchedule& s;
  const int* seq_lens;
  const int* kept;
  bool invariant;
  int first, last;
  int64_t start = 0, share = 1;  // share: what lies on the line between the begins of two workers

  __device__ __forceinline__ int tiles(int i) const {  // of sequence i of the batch
    return i < kKept ? kept[i] : ceil_div(num_keys(seq_lens, i), kTileKeys);
  }
  __device__ __forceinline__ int fixed_pieces(int tiles) const {
    return invariant ? max(1, ceil_div(tiles, kInvariantTiles)) : 1;
  }
  __device__ __forceinline__ int cost(int tiles) const { return tiles + kPieceTiles * fixed_pieces(tiles); }

  // Calls begins(worker, begin) for every worker that begins in these sequences, and ends(sequence, pieces) for each.
  template <class Begins, class Ends>
  __device__ __forceinline__ void walk(Begins&& begins, Ends&& ends) const {
    int64_t at = start;
    int worker = static_cast<int>(min(ceil_div(at, share), static_cast<int64_t>(s.workers)));
    for (int sequence = first; sequence < last; ++sequence) {
      const int n = tiles(sequence % s.batch);
      int pieces = fixed_pieces(n);
      for (; worker < s.workers && worker * share < at + cost(n); ++worker) {
        const auto offset = static_cast<int>(worker * share - at);
        if (invariant) {
          const int piece = ceil_div(offset, kInvariantTiles + kPieceTiles);
          begins(worker, piece < pieces ? Begin{sequence, piece * kInvariantTiles, piece} : Begin{sequence + 1, 0, 0});
        } else {
          const int tile = (offset - kPieceTiles) / 2 * 2;
          begins(worker, tile > 0 ? Begin{sequence, tile, pieces++} : Begin{sequence, 0, 0});
        }
      }
      ends(sequence, pieces);
      at += cost(n);
    }
  }
};

// Puts the sequences in the order of their lengths, the longest first.
__device__ void sort_sequences(const Line& line, ScheduleShared& shared) {
  const int sequences = line.s.sequences();
  for (int i = static_cast<int>(threadIdx.x); i < sequences; i += kThreads) {
    const int mine = line.tiles(i % line.s.batch);
    int place = 0;
    for (int j = 0; j < sequences; ++j) {
      const int other = line.tiles(j % line.s.batch);
      place += other > mine || (other == mine && j < i);
    }
    shared.sorted[place] = i;
  }
}

// By a warp: gives each sequence of shared.sorted whole to the worker that has least so far (the rule of longest processing time
// first); whether none gets more than `most`. Lane l keeps the loads of workers l, l + 32 and so on.
__device__ bool pack_whole(const Line& line, uint32_t most, ScheduleShared& shared) {
  const int lane = static_cast<int>(threadIdx.x), sequences = line.s.sequences();
  uint32_t loads[kMostWorkers / kWarpSize] = {};
  for (int first = 0; first < sequences; first += kWarpSize) {
    const int k = first + lane;
    const uint32_t cost = k < sequences ? line.cost(line.tiles(shared.sorted[k] % line.s.batch)) : 0;
    int taken_by = 0;
    for (int i = 0; i < min(kWarpSize, sequences - first); ++i) {
      uint32_t least = ~0u;  // load and worker
#pragma unroll
      for (int w = 0; w < kMostWorkers / kWarpSize; ++w) {
        const int worker = w * kWarpSize + lane;
        if (worker < line.s.workers) least = min(least, loads[w] * kMostWorkers + worker);
      }
      least = __reduce_min_sync(0xffffffffu, least);
      const int worker = static_cast<int>(least % kMostWorkers);
      const uint32_t more = __shfl_sync(0xffffffffu, cost, i);
      if (least / kMostWorkers + more > most) return false;
#pragma unroll
      for (int w = 0; w < kMostWorkers / kWarpSize; ++w) {
        if (w * kWarpSize + lane == worker) loads[w] += more;
      }
      if (lane == i) taken_by = worker;
    }
    if (k < sequences) shared.taken_by[k] = taken_by;
  }
  return true;
}

// By all threads: the order in which workers take whole sequences.
__device__ void write_whole(const Line& line, const ScheduleShared& shared) {
  const int sequences = line.s.sequences(), thread = static_cast<int>(threadIdx.x);
  for (int k = thread; k < sequences; k += kThreads) {
    const int worker = shared.taken_by[k];
    int before = 0, own = 0;  // sequences of workers before this one, and of this one before k
    for (int j = 0; j < sequences; ++j) {
      before += shared.taken_by[j] < worker;
      own += shared.taken_by[j] == worker && j < k;
    }
    line.s.order()[before + own] = shared.sorted[k];
    if (own == 0) line.s.begin()[worker].piece = shared.sorted[k];
  }
  for (int worker = thread; worker <= line.s.workers; worker += kThreads) {
    int before = 0;
    for (int j = 0; j < sequences; ++j) before += shared.taken_by[j] < worker;
    line.s.begin()[worker].sequence = before;
  }
}

// By all threads: every worker's begin, and where each sequence's partial results lie.
__device__ void write_cut(const Line& line, int64_t partials, int64_t splits) {
  line.walk([&](int worker, Begin begin) { line.s.begin()[worker] = begin; },
            [&](int sequence, int pieces) {
              if (pieces > 1) {
                line.s.split()[splits++] = sequence;
                partials += pieces;
              }
              line.s.first_partial()[sequence + 1] = static_cast<int>(partials);
            });
}

__global__ void __launch_bounds__(kThreads) mla_schedule_kernel(DecodeSchedule s, const int* seq_lens, bool invariant) {
  __shared__ ScheduleShared shared;
  wait_for_inputs();
  release_dependents();
  for (int i = threadIdx.x; i < DecodeSchedule::size(s.workers, s.sequences()); i += kThreads) s.data[i] = 0;
  for (int i = threadIdx.x; i < min(s.batch, kKept); i += kThreads) {
    shared.tiles[i] = ceil_div(num_keys(seq_lens, i), kTileKeys);
  }
  if (threadIdx.x == 0) shared.longest = 0;
  __syncthreads();
  const int each = ceil_div(s.sequences(), kThreads), thread = static_cast<int>(threadIdx.x);
  Line line{
      s, seq_lens, shared.tiles, invariant, min(thread * each, s.sequences()), min((thread + 1) * each, s.sequences())};
  int64_t cost = 0;
  int longest = 0;
  for (int i = line.first; i < line.last; ++i) {
    const int tiles = line.tiles(i % s.batch);
    cost += line.cost(tiles);
    longest = max(longest, tiles);
  }
  atomicMax(&shared.longest, longest);
  const Scan costs(cost, shared.sums);
  line.start = costs.before;
  line.share = max(ceil_div(costs.total, static_cast<int64_t>(s.workers)),
                   static_cast<int64_t>(invariant ? 1 : kFewestTiles + kPieceTiles));
  int64_t partials = 0, splits = 0;
  line.walk([](int, Begin) {},
            [&](int, int pieces) {
              partials += pieces > 1 ? pieces : 0;
              splits += pieces > 1;
            });
  const Scan before(partials << 32 | splits, shared.sums);
  const auto all_splits = static_cast<int>(before.total & 0xffffffff);
  const int64_t most = line.share + kPieceTiles + kSplitTiles;
  if (all_splits > 0 && !invariant && shared.longest + kPieceTiles <= most && s.sequences() <= kMostWhole &&
      s.workers <= kMostWorkers && most < ~0u / kMostWorkers) {
    sort_sequences(line, shared);
    __syncthreads();
    if (threadIdx.x < kWarpSize) shared.whole = pack_whole(line, static_cast<uint32_t>(most), shared);
    __syncthreads();
    if (shared.whole) {
      write_whole(line, shared);
      if (threadIdx.x > 0) return;
      s.ordered() = 1;
      s.piece_tiles() = kWhole;
      return;
    }
  }
  write_cut(line, before.before >> 32, before.before & 0xffffffff);
  const auto used = static_cast<int>(min(ceil_div(costs.total, line.share), static_cast<int64_t>(s.workers)));
  for (int worker = used + thread; worker <= s.workers; worker += kThreads) s.begin()[worker] = {s.sequences(), 0, 0};
  if (threadIdx.x == 0) {
    s.splits() = all_splits;
    s.piece_tiles() = invariant ? kInvariantTiles : kWhole;
  }
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
  const DecodeSchedule s{schedule.data<int>(), workers, static_cast<int>(seq_lens.size(0)), static_cast<int>(groups)};
  launch("mla_schedule", mla_schedule_kernel, {dim3(1), dim3(kThreads)}, stream, s, seq_lens.data<int>(),
         batch_invariant);
}

}  // namespace dsv3
