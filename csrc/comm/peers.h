// The memory through which the ranks of a node exchange rows: every rank has one piece of its GPU's memory, which the
// others map (CUDA IPC). What lies in it: peers.cuh.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dsv3 {

constexpr int kMaxRanks = 16;  // of a node
constexpr int kMaxNodes = 8;
constexpr int kMaxGroup = 64;  // ranks of all nodes

// What kernels and the host tell each other without a synchronisation, in pinned memory.
struct Waiting {
  uint32_t lost;  // 0, or 1 + the rank that is no longer waited for: set by a kernel whose time is over, or by the host
  uint32_t long_wait;  // set by kernels that have waited for a second
};

// A ring of slots leads from every rank of a node to every rank of it on each channel, for each node whose tokens it is to
// carry. It lies in the receiver's memory.
struct Rings {
  char* base[kMaxRanks];  // the memory of the node's ranks
  Waiting* waiting;
  uint64_t timeout_ns;
  int rank, ranks;  // this one's place in its node, and how many are there
  int node, nodes;
  int channels, slots;
  int window_tokens, window_pieces;  // of the windows of low-latency mode, or 0
};

// Owns this rank's memory and the mappings of the others'. A node's ranks make it, tell each other `handle` and `connect`.
class Peers {
 public:
  // rank, ranks: of the node. window_tokens: most tokens of a rank in a call of low-latency mode; window_pieces: most pieces
  // of a row there. Windows of several nodes lie elsewhere (nvshmem/network.h).
  Peers(int device, int rank, int ranks, int node, int nodes, int channels, int slots, int window_tokens,
        int window_pieces, double timeout_seconds);
  virtual ~Peers() { Peers::disconnect(); }
  Peers(const Peers&) = delete;
  Peers& operator=(const Peers&) = delete;

  const std::string& handle() const { return handle_; }
  int64_t bytes() const { return bytes_; }
  // handles: of the node's ranks in their order. Throws std::runtime_error where one cannot be mapped.
  void connect(const std::vector<std::string>& handles);
  // Unmaps the others' memory; release frees this rank's. In between all ranks meet: no kernel of theirs may still write.
  virtual void disconnect();
  void release();
  // The rank, of all nodes', that was waited for in vain, or -1.
  int lost() const;
  // Kernels wait no longer: `rank` is lost.
  void give_up(int rank);
  // Whether a kernel has waited long since the last call.
  bool take_long_wait();

  const Rings& rings() const { return rings_; }
  int device() const { return device_; }

 private:
  void allocate();

  Rings rings_{};
  int device_;
  int64_t bytes_ = 0;
  std::string handle_;
};

}  // namespace dsv3
