// Sums of rows, in fp32 and in their order: by a warp, whose loads run ahead.
//
// Where a few multiprocessors do all, instructions are what limits: so a row's address is worked out once a turn, and whole
// turns look at no bounds.
#pragma once

#include <type_traits>

#include "../hopper/shared_memory.cuh"
#include "peers.cuh"

namespace dsv3 {

constexpr int kWarpBytes = 8 * 1024;  // of shared memory, for rows on their way
constexpr int kRun = 8;               // consecutive columns of a lane
constexpr int kSumStep = 1024;        // columns of all pieces but a row's last: whole turns

// What a warp sums in a turn: of each lane kRuns times kRun columns, a warp's width apart. A stage holds those of a row, each
// lane's for itself: kRuns times kWords vectors, a warp's width apart.
template <class T, int kRuns>
struct Turn {
  static constexpr int kColumns = kRuns * kWarpSize * kRun, kBytes = kColumns * sizeof(T);
  static constexpr int kStages = kWarpBytes / kBytes, kWords = kRun * sizeof(T) / 16;
  static constexpr int kWidth = kWarpSize * 16;  // bytes
  static_assert(kSumStep % kColumns == 0);

  // Asks for this lane's part of a row, of which `columns` are left from here on, or none (<= 0). stage: its own place there.
  static __device__ __forceinline__ void ask(uint32_t stage, const T* row, int columns) {
    const int first = threadIdx.x % kWarpSize * kRun;
    const T* const own = row + first;
    if (columns >= kColumns) {
      copy<0, false>(stage, own, 0);
    } else {
      copy<0, true>(stage, own, columns - first);
    }
  }
  // Adds what the stage has of this lane's.
  static __device__ __forceinline__ void add(float (&sum)[kRuns][kRun], uint32_t stage) {
    uint4 raw[kRuns * kWords];
    take<0>(stage, raw);
#pragma unroll
    for (int v = 0; v < kRuns * kWords; ++v) {
      constexpr int kValues = kRun / kWords;
      float x[kValues];
      unpack(reinterpret_cast<const Vec<T>&>(raw[v]), x);
#pragma unroll
      for (int j = 0; j < kValues; ++j) sum[v / kWords][v % kWords * kValues + j] += x[j];
    }
  }

 private:
  template <int kVector, bool kBounded>
  static __device__ __forceinline__ void copy(uint32_t stage, const T* own, int columns) {
    if constexpr (kVector < kRuns * kWords) {
      constexpr int kColumn = kVector / kWords * kWarpSize * kRun + kVector % kWords * (kRun / kWords);
      if (!kBounded || kColumn < columns) {
        copy_async_at<kVector * kWidth, kColumn* static_cast<int>(sizeof(T))>(stage, own);
      }
      copy<kVector + 1, kBounded>(stage, own, columns);
    }
  }
  template <int kVector>
  static __device__ __forceinline__ void take(uint32_t stage, uint4 (&raw)[kRuns * kWords]) {
    if constexpr (kVector < kRuns * kWords) {
      uint4& v = raw[kVector];
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "r"(stage), "n"(kVector * kWidth)
                   : "memory");
      take<kVector + 1>(stage, raw);
    }
  }
};

// 16 bytes in one store: the compiler makes four of some otherwise, for want of registers in a row.
template <class T>
__device__ __forceinline__ void store_whole(T* p, const Vec<T>& v) {
  const uint4& raw = reinterpret_cast<const uint4&>(v);
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w)
               : "memory");
}

// This lane's columns of a turn; row has `columns` from here on.
template <class T, int kRuns>
__device__ __forceinline__ void store_sums(T* row, int columns, const float (&sum)[kRuns][kRun]) {
  constexpr int kStep = Vec<T>::kSize;
  const int first = threadIdx.x % kWarpSize * kRun;
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
      if (column + i * kStep < columns) store_whole(row + column + i * kStep, vec);
    }
  }
}

// out = the sum of `count` rows in their order, of which lane i knows the i-th, rounded to S. kNodes: where `ends` has bit i, rows
// up to the i-th make a sum of their own, rounded to S, to which later ones are added.
template <bool kNodes, class In, class S, class Out>
__device__ __forceinline__ void sum_rows(Out* out, int columns, const In* row, int count, unsigned ends,
                                         uint4* memory) {
  static_assert(std::is_same_v<S, Out> || std::is_same_v<S, float>);  // so that rounding to S comes with the store
  constexpr int kRuns = kNodes ? 2 : 4;                               // nodes have sums of their own in registers
  using Load = Turn<In, kRuns>;
  const uint32_t stages = shared_pointer(memory + threadIdx.x % kWarpSize);
  int next_row = 0, left = count > 0 ? columns : 0;  // what to ask for: of whose row, and how many columns are left
  const auto ask = [&](uint32_t stage) {
    const auto from = __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(row), next_row);
    Load::ask(stages + stage, reinterpret_cast<const In*>(from), left);
    // Also where it asks for nothing: so the oldest can be waited for.
    commit_copies();
    if (++next_row == count) next_row = 0, left -= Load::kColumns, row += Load::kColumns;
  };
#pragma unroll 1
  for (uint32_t stage = 0; stage < kWarpBytes; stage += Load::kBytes) ask(stage);
  uint32_t stage = 0;
#pragma unroll 1
  for (; columns > 0; columns -= Load::kColumns, out += Load::kColumns) {
    float sum[kRuns][kRun] = {};
    [[maybe_unused]] float total[kNodes ? kRuns : 1][kRun] = {};
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      wait_for_copies<Load::kStages - 1>();
      Load::add(sum, stages + stage);
      ask(stage);
      stage = (stage + Load::kBytes) % kWarpBytes;
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
      store_sums(out, columns, total);
    } else {
      store_sums(out, columns, sum);
    }
  }
}

__device__ __forceinline__ int first_bit(unsigned mask) { return __ffs(mask) - 1; }  // -1 of none
__device__ __forceinline__ int first_bit(uint64_t mask) { return __ffsll(mask) - 1; }

// The slots of the ranks in `mask` as sum_rows wants them: in lane i that of the i-th, which slot_of(rank) tells all lanes.
struct Parts {
  const Slot* slot;
  unsigned ends;
};
template <class Mask, class F>
__device__ __forceinline__ Parts parts_of(int ranks_per_node, Mask mask, F&& slot_of) {
  const int lane = threadIdx.x % kWarpSize;
  Parts parts{nullptr, 0};
  int place = 0;
  for (Mask left = mask; left != 0; left &= left - 1, ++place) {
    const int rank = first_bit(left), next = first_bit(left & (left - 1));
    const Slot* const slot = slot_of(rank);
    if (lane == place) parts.slot = slot;
    if (next < 0 || next / ranks_per_node != rank / ranks_per_node) parts.ends |= 1u << place;
  }
  return parts;
}
// The same where lane r has the slot of rank r.
__device__ __forceinline__ Parts parts_of(int ranks_per_node, unsigned mask, const Slot* slot) {
  return parts_of(ranks_per_node, mask, [slot](int rank) {
    return reinterpret_cast<const Slot*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(slot), rank));
  });
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
