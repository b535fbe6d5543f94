// Sums of rows, in fp32 and in their order: by a warp, whose loads run ahead.
#pragma once

#include <type_traits>

#include "peers.cuh"

namespace dsv3 {

constexpr int kWarpBytes = 8 * 1024;  // of shared memory, for rows on their way

// A lane takes kRun consecutive columns, kRuns times a warp's width apart; its loads run ahead through memory of its own.
constexpr int kRun = 8;
template <class T, int kRuns>
struct Ahead {
  static constexpr int kTurn = kRuns * kWarpSize * kRun;  // columns of a warp and turn
  static constexpr int kWords = kRun * sizeof(T) / 16;
  static constexpr int kStages = kWarpBytes / (kTurn * static_cast<int>(sizeof(T)));
  uint4* const words;  // [kStages][kRuns][kWords][lane]: this lane's first

  __device__ __forceinline__ uint4* at(int load, int b, int i) const {
    return words + ((load % kStages * kRuns + b) * kWords + i) * kWarpSize;
  }
  __device__ __forceinline__ void ask(int load, const T* row, int first, int columns) const {
#pragma unroll
    for (int b = 0; b < kRuns; ++b) {
      const int column = first + b * kWarpSize * kRun;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int first_of_word = column + i * (kRun / kWords);
        if (first_of_word < columns) copy_ahead(at(load, b, i), row + first_of_word);
      }
    }
  }
  // Every turn commits, also where it asks for nothing: so the oldest of kStages loads is there.
  __device__ __forceinline__ void commit() const { asm volatile("cp.async.commit_group;"); }
  __device__ __forceinline__ void wait_oldest() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
  }
  __device__ __forceinline__ void add_to(float (&sum)[kRuns][kRun], int load) const {
#pragma unroll
    for (int b = 0; b < kRuns; ++b) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint4 raw = *at(load, b, i);
        float x[kRun / kWords];
        unpack(reinterpret_cast<const Vec<T>&>(raw), x);
#pragma unroll
        for (int j = 0; j < kRun / kWords; ++j) sum[b][i * (kRun / kWords) + j] += x[j];
      }
    }
  }
};

template <class T, int kRuns>
__device__ __forceinline__ void store_sums(T* row, int first, int columns, const float (&sum)[kRuns][kRun]) {
  constexpr int kStep = Vec<T>::kSize;
#pragma unroll
  for (int b = 0; b < kRuns; ++b) {
    const int column = first + b * kWarpSize * kRun;
#pragma unroll
    for (int i = 0; i < kRun / kStep; ++i) {
      float x[kStep];
#pragma unroll
      for (int j = 0; j < kStep; ++j) x[j] = sum[b][i * kStep + j];
      Vec<T> vec;
      pack(x, vec);
      if (column + i * kStep < columns) store(row + column + i * kStep, vec);
    }
  }
}

// out = the sum of `count` rows in their order, of which lane i knows the i-th, rounded to S. kNodes: where `ends` has bit i, rows
// up to the i-th make a sum of their own, rounded to S, to which later ones are added.
template <bool kNodes, class In, class S, class Out>
__device__ __forceinline__ void sum_rows(Out* out, int columns, const In* row, int count, unsigned ends,
                                         uint4* memory) {
  const int lane = threadIdx.x % kWarpSize;
  constexpr int kRuns = kNodes ? 2 : 4;  // nodes have sums of their own in registers
  using Loads = Ahead<In, kRuns>;
  constexpr int kTurn = Loads::kTurn;
  const Loads ahead{memory + lane};
  const int turns = ceil_div(columns, kTurn), loads = turns * count;
  int asked = 0, next_turn = 0, next_row = 0;  // the load to ask for next
  const auto ask = [&] {
    const auto from = __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(row), next_row);
    if (asked < loads) ahead.ask(asked, reinterpret_cast<const In*>(from), next_turn * kTurn + lane * kRun, columns);
    ahead.commit();
    ++asked;
    if (++next_row >= count) next_row = 0, ++next_turn;
  };
#pragma unroll 1
  for (int i = 0; i < Loads::kStages - 1; ++i) ask();
  int load = 0;
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    float sum[kRuns][kRun] = {};
    [[maybe_unused]] float total[kNodes ? kRuns : 1][kRun] = {};
#pragma unroll 1
    for (int i = 0; i < count; ++i, ++load) {
      ask();
      ahead.wait_oldest();
      ahead.add_to(sum, load);
      if constexpr (kNodes) {
        if (!(ends >> i & 1)) continue;
#pragma unroll
        for (int b = 0; b < kRuns; ++b) {
#pragma unroll
          for (int j = 0; j < kRun; ++j) {
            total[b][j] += to_float(from_float<S>(sum[b][j]));
            sum[b][j] = 0.f;
          }
        }
      }
    }
    if constexpr (kNodes) {
      store_sums(out, turn * kTurn + lane * kRun, columns, total);
    } else {
#pragma unroll
      for (int b = 0; b < kRuns; ++b) {
#pragma unroll
        for (int j = 0; j < kRun; ++j) sum[b][j] = to_float(from_float<S>(sum[b][j]));
      }
      store_sums(out, turn * kTurn + lane * kRun, columns, sum);
    }
  }
}

// The slots of the ranks in `mask` as sum_rows wants them: in lane i that of the i-th.
struct Parts {
  const Slot* slot;
  unsigned ends;
};
__device__ __forceinline__ Parts parts_of(int ranks_per_node, unsigned mask, const Slot* slot) {
  const int lane = threadIdx.x % kWarpSize;
  Parts parts{slot, 0};
  int place = 0;
  for (unsigned left = mask; left != 0; left &= left - 1, ++place) {
    const int rank = __ffs(left) - 1, next = __ffs(left & (left - 1)) - 1;
    const auto of_rank = __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(slot), rank);
    if (lane == place) parts.slot = reinterpret_cast<const Slot*>(of_rank);
    if (next < 0 || next / ranks_per_node != rank / ranks_per_node) parts.ends |= 1u << place;
  }
  return parts;
}

// The slots of the ways in `mask`, by node: those of the own node's ranks make one sum, those of other nodes are sums.
__device__ __forceinline__ Parts parts_of_ways(const Rings& r, unsigned mask, const Slot* slot) {
  const int lane = threadIdx.x % kWarpSize;
  Parts parts{slot, 0};
  int place = 0;
  const auto add = [&](unsigned ways, bool one_sum) {
    for (unsigned left = ways; left != 0; left &= left - 1, ++place) {
      const auto of_way = __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(slot), __ffs(left) - 1);
      if (lane == place) parts.slot = reinterpret_cast<const Slot*>(of_way);
      if (!one_sum || (left & (left - 1)) == 0) parts.ends |= 1u << place;
    }
  };
  const unsigned before = (1u << (kMaxRanks + r.node)) - 1;  // ways to this node and to those before it
  add(mask & before & ~kNearWays, false);
  add(mask & kNearWays, true);
  add(mask & ~before, false);
  return parts;
}

// Calls f with a zero of the dtype of sums, bf16 where `narrow`; and with whether there are several nodes, as a constant.
template <class Y, class F>
void visit_sums(bool narrow, F&& f) {
  if constexpr (sizeof(Y) == 2) {
    if (narrow) return f(__nv_bfloat16{});
  }
  f(0.f);
}
template <class Y, class F>
void visit_sums(bool narrow, bool nodes, F&& f) {
  visit_sums<Y>(narrow, [&](auto zero) { nodes ? f(zero, std::true_type{}) : f(zero, std::false_type{}); });
}

}  // namespace dsv3
