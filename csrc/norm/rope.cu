// Rotary position embedding in the interleaved (complex, GPT-J) form, in place on the last R values of every head:
//
//   (x[2i], x[2i+1]) <- (x[2i] cos_i - x[2i+1] sin_i, x[2i] sin_i + x[2i+1] cos_i),   cos, sin = table[position][i]
//
// The inverse (sin negated) is the gradient. Memory-bound: only the rotated part of a head is touched, so q [T, 128,
// 192] with R = 64 moves 2 * 2 * 64 of its 192 values. A thread owns one 16-byte vector of the rotated part in every
// kHeadStep-th head of a token, so that its cosines stay in registers, and has kUnroll of those loads in flight.
#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "../ops.h"

namespace dsv3 {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

struct RopeParams {
  void* x;           // [T, heads * head_dim]
  const float* cos;  // [max_positions, R / 2]
  const float* sin;
  const void* positions;  // [T] int32 or int64
  bool wide_positions;
  int64_t max_positions;
  int64_t row;  // elements a token
  int heads, head_dim, rope_dim;
  float sign;  // -1: the inverse rotation
};

// The angles of vector v at the token's position; NaN marks a position outside the table.
template <int kPairs>
__device__ __forceinline__ void load_angles(const RopeParams& p, int64_t token, int v, float (&cos)[kPairs],
                                            float (&sin)[kPairs]) {
  const int64_t position = p.wide_positions ? static_cast<const int64_t*>(p.positions)[token]
                                            : static_cast<const int32_t*>(p.positions)[token];
  const bool valid = position >= 0 && position < p.max_positions;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int64_t entry = position * (p.rope_dim / 2) + v * kPairs + i;
    cos[i] = valid ? p.cos[entry] : NAN;
    sin[i] = valid ? p.sin[entry] * p.sign : NAN;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) rope_kernel(RopeParams p) {
  constexpr int kSize = Vec<T>::kSize, kPairs = kSize / 2;
  wait_for_inputs();
  release_dependents();
  const int vecs = p.rope_dim / kSize;
  const int v = threadIdx.x % vecs, first_head = threadIdx.x / vecs, head_step = kThreads / vecs;
  const int64_t token = blockIdx.x;
  T* const base = static_cast<T*>(p.x) + token * p.row + p.head_dim - p.rope_dim + v * kSize;
  float cos[kPairs], sin[kPairs];
  for (int head = first_head; head < p.heads; head += head_step * kUnroll) {
    // The loads of x do not wait for those of the position and its angles.
    Vec<T> x[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (head + u * head_step < p.heads) x[u] = load(base + static_cast<int64_t>(head + u * head_step) * p.head_dim);
    }
    if (head == first_head) load_angles<kPairs>(p, token, v, cos, sin);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (head + u * head_step >= p.heads) continue;
      float values[kSize];
      unpack(x[u], values);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float a = values[2 * i], b = values[2 * i + 1];
        values[2 * i] = a * cos[i] - b * sin[i];
        values[2 * i + 1] = a * sin[i] + b * cos[i];
      }
      pack(values, x[u]);
      store(base + static_cast<int64_t>(head + u * head_step) * p.head_dim, x[u]);
    }
  }
}

}  // namespace

void rope_(Tensor x, Tensor cos, Tensor sin, Tensor positions, int64_t head_dim, bool inverse, cudaStream_t stream) {
  DSV3_CHECK(x.dim() == 2 && head_dim > 0 && x.size(1) % head_dim == 0,
             "x must be (tokens, heads * head_dim) with head_dim ", head_dim, ", got ", x);
  DSV3_CHECK(cos.dim() == 2, "cos must be (positions, rope_dim / 2), got ", cos);
  check_operand("x", x, x.dtype());
  check_operand("cos", cos, Dtype::kFloat32);
  check_operand("sin", sin, Dtype::kFloat32, cos.size(0), cos.size(1));
  DSV3_CHECK(positions.dtype() == Dtype::kInt64 || positions.dtype() == Dtype::kInt32,
             "positions must be int32 or int64, got ", positions);
  check_operand("positions", positions, positions.dtype(), x.size(0));
  const int rope_dim = static_cast<int>(2 * cos.size(1));
  const DeviceGuard guard(x);
  visit_float("x", x.dtype(), [&](auto zero) {
    using T = decltype(zero);
    const int vecs = rope_dim / Vec<T>::kSize;
    DSV3_CHECK(rope_dim % Vec<T>::kSize == 0 && vecs > 0 && kThreads % vecs == 0 && rope_dim <= head_dim &&
                   head_dim % Vec<T>::kSize == 0,
               "rope_dim must be a power of two of at least 16 bytes and at most head_dim ", head_dim, ", got ",
               rope_dim);
    const RopeParams p{.x = x.data<T>(),
                       .cos = cos.data<float>(),
                       .sin = sin.data<float>(),
                       .positions = positions.data<void>(),
                       .wide_positions = positions.dtype() == Dtype::kInt64,
                       .max_positions = cos.size(0),
                       .row = x.size(1),
                       .heads = static_cast<int>(x.size(1) / head_dim),
                       .head_dim = static_cast<int>(head_dim),
                       .rope_dim = rope_dim,
                       .sign = inverse ? -1.f : 1.f};
    launch("rope", rope_kernel<T>, {.grid = dim3(x.size(0)), .block = dim3(kThreads)}, stream, p);
  });
}

}  // namespace dsv3
