// Bulk copies (TMA without a descriptor) between global memory and a ring of stages in shared memory. One thread issues
// them; the data arrives while the other threads work on earlier stages, whatever their occupancy.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>
#include <cute/arch/copy_sm90_tma.hpp>

#include "shared_memory.cuh"

namespace dsv3 {

using TransactionBarrier = cutlass::arch::ClusterTransactionBarrier;

// To be called by one thread, before a __syncthreads.
__device__ __forceinline__ void init_barriers(TransactionBarrier* barriers, int count) {
  for (int i = 0; i < count; ++i) barriers[i].init(1);
  cutlass::arch::fence_barrier_init();
}

// bytes is a multiple of 16, like both addresses. Completion counts on `full`, which must expect the bytes.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, int bytes, TransactionBarrier& full) {
  cute::SM90_BULK_COPY_G2S::copy(global, reinterpret_cast<uint64_t*>(&full), shared, bytes);
}

// The writers of `shared` have called fence_shared_writes and then met in a barrier.
__device__ __forceinline__ void bulk_store(void* global, const void* shared, int bytes) {
  cute::SM90_BULK_COPY_S2G::copy(shared, global, bytes);
  cute::tma_store_arrive();
}

// Waits until all but the kPending latest stores of this thread have read their shared memory.
template <int kPending>
__device__ __forceinline__ void wait_bulk_stores_read() {
  cute::tma_store_wait<kPending>();
}
// Waits until all of them have arrived.
__device__ __forceinline__ void wait_bulk_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

}  // namespace dsv3
