// Allocation and mapping of the ranks' memory: see peers.h.
#include "peers.h"

#include <cstring>

#include "../common/launch.cuh"
#include "peers.cuh"

namespace dsv3 {

Peers::Peers(int device, int rank, int ranks, int node, int nodes, int channels, int slots, int window_tokens,
             int window_pieces, double timeout_seconds)
    : device_(device) {
  DSV3_CHECK(ranks >= 1 && ranks <= kMaxRanks && rank >= 0 && rank < ranks, "ranks must be 1..", kMaxRanks, ", got ",
             ranks);
  DSV3_CHECK(nodes >= 1 && nodes <= kMaxNodes && node >= 0 && node < nodes && nodes * ranks <= kMaxGroup,
             "nodes must be 1..", kMaxNodes, " and have at most ", kMaxGroup, " ranks, got ", nodes, " of ", ranks);
  DSV3_CHECK(channels >= 1 && channels <= kMaxChannels, "channels must be 1..", kMaxChannels, ", got ", channels);
  DSV3_CHECK(slots >= 1 && (slots & (slots - 1)) == 0,
             "slots must be a power of two, since items are counted modulo 2^32, got ", slots);
  const Current guard(device);
  rings_.rank = rank;
  rings_.ranks = ranks;
  rings_.node = node;
  rings_.nodes = nodes;
  rings_.channels = channels;
  rings_.slots = slots;
  DSV3_CHECK(window_tokens >= 0 && window_tokens <= kMaxWindowTokens && window_pieces >= 0,
             "window_tokens must be at most ", kMaxWindowTokens, ", got ", window_tokens);
  rings_.window_tokens = window_tokens;
  rings_.window_pieces = window_pieces;
  rings_.timeout_ns = static_cast<uint64_t>(timeout_seconds * 1e9);
  bytes_ = peer_bytes(rings_);
  try {
    allocate();
  } catch (...) {
    release();
    throw;
  }
}

void Peers::allocate() {
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, bytes_), "cudaMalloc of the rings");
  rings_.base[rings_.rank] = static_cast<char*>(memory);
  check_cuda(cudaMemset(memory, 0, bytes_), "cudaMemset of the rings");
  check_cuda(cudaDeviceSynchronize(), "cudaMemset of the rings");  // before a peer can write
  void* waiting = nullptr;
  check_cuda(cudaHostAlloc(&waiting, sizeof(Waiting), cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc");
  rings_.waiting = new (waiting) Waiting{};
  cudaIpcMemHandle_t handle;
  check_cuda(cudaIpcGetMemHandle(&handle, memory), "cudaIpcGetMemHandle");
  handle_.assign(reinterpret_cast<const char*>(&handle), sizeof(handle));
}

void Peers::connect(const std::vector<std::string>& handles) {
  DSV3_CHECK(static_cast<int>(handles.size()) == rings_.ranks, "handles must be those of ", rings_.ranks, " ranks");
  const Current guard(device_);
  for (int peer = 0; peer < rings_.ranks; ++peer) {
    if (peer == rings_.rank) continue;
    cudaIpcMemHandle_t handle;
    DSV3_CHECK(handles[peer].size() == sizeof(handle), "a handle must have ", sizeof(handle), " bytes");
    std::memcpy(&handle, handles[peer].data(), sizeof(handle));
    void* memory = nullptr;
    check_cuda(cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess), "cudaIpcOpenMemHandle");
    rings_.base[peer] = static_cast<char*>(memory);
  }
}

void Peers::disconnect() {
  for (int peer = 0; peer < rings_.ranks; ++peer) {
    if (peer == rings_.rank || rings_.base[peer] == nullptr) continue;
    cudaIpcCloseMemHandle(rings_.base[peer]);
    rings_.base[peer] = nullptr;
  }
}

void Peers::release() {
  if (rings_.base[rings_.rank] == nullptr) return;
  cudaFree(rings_.base[rings_.rank]);
  cudaFreeHost(rings_.waiting);
  rings_.base[rings_.rank] = nullptr;
  rings_.waiting = nullptr;
}

int Peers::lost() const {
  if (rings_.waiting == nullptr) return -1;
  return static_cast<int>(static_cast<volatile Waiting*>(rings_.waiting)->lost) - 1;
}

void Peers::give_up(int rank) {
  if (rings_.waiting != nullptr) static_cast<volatile Waiting*>(rings_.waiting)->lost = rank + 1;
}

bool Peers::take_long_wait() {
  if (rings_.waiting == nullptr) return false;
  volatile Waiting* const waiting = rings_.waiting;
  const bool seen = waiting->long_wait != 0;
  waiting->long_wait = 0;
  return seen;
}

}  // namespace dsv3
