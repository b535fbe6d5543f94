// AdamW (Loshchilov and Hutter, 2019) over a list of tensors in one launch: fp32 master weights and gradients, bf16
// moments, and the model's bf16 weights rewritten from the master.
//
//   g = grad * grad_scale;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  t = step + 1
//   master = (1 - lr wd) master - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
//
// Memory-bound: 20 bytes an element (22 with the bf16 weight). Learning rate, gradient scale, step and skip flag are
// read from the device, so that the step never waits for the host; with skip set nothing is touched. The table of
// tensors travels in the kernel's parameters (up to 32 KiB with CUDA 12.1 or newer). Blocks walk over chunks of all
// tensors laid end to end.
#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "../ops.h"

namespace dsv3 {
namespace {

constexpr int kThreads = 256;
constexpr int kElements = 8;                      // a thread and step: one 16-byte vector of bf16, two of fp32
constexpr int64_t kChunk = kThreads * kElements;  // elements a block takes at once
constexpr int kMaxTensors = 512;                  // a launch

struct Entry {
  float* master;
  const float* grad;
  __nv_bfloat16* exp_avg;
  __nv_bfloat16* exp_avg_sq;
  __nv_bfloat16* weight;  // or null
  int64_t numel;
  int first_chunk;
  float weight_decay;
};

struct AdamwParams {
  Entry entries[kMaxTensors];
  int tensors;
  int chunks;
  const float* lr;
  const float* grad_scale;
  const float* step;
  const bool* skip;
  float beta1, beta2, eps;
};
static_assert(sizeof(AdamwParams) <= 32764, "kernel parameters are limited to 32764 bytes");

struct Scalars {
  float lr, grad_scale, step_size, inverse_root, beta1, beta2, eps;
};

__device__ __forceinline__ float update(float master, float grad, float& m, float& v, float decay, const Scalars& s) {
  const float g = grad * s.grad_scale;
  m += (g - m) * (1.f - s.beta1);
  v += (g * g - v) * (1.f - s.beta2);
  return master * decay - s.step_size * m / (sqrtf(v) * s.inverse_root + s.eps);
}

__device__ __forceinline__ void update_chunk(const Entry& e, int64_t first, float decay, const Scalars& s) {
  float master[kElements], grad[kElements];
  *reinterpret_cast<Vec<float>*>(master) = load(e.master + first);
  *reinterpret_cast<Vec<float>*>(master + 4) = load(e.master + first + 4);
  *reinterpret_cast<Vec<float>*>(grad) = load(e.grad + first);
  *reinterpret_cast<Vec<float>*>(grad + 4) = load(e.grad + first + 4);
  Vec<__nv_bfloat16> m = load(e.exp_avg + first), v = load(e.exp_avg_sq + first), weight;
  float ms[kElements], vs[kElements];
  unpack(m, ms);
  unpack(v, vs);
#pragma unroll
  for (int i = 0; i < kElements; ++i) master[i] = update(master[i], grad[i], ms[i], vs[i], decay, s);
  pack(ms, m);
  pack(vs, v);
  pack(master, weight);
  store(e.master + first, *reinterpret_cast<Vec<float>*>(master));
  store(e.master + first + 4, *reinterpret_cast<Vec<float>*>(master + 4));
  store(e.exp_avg + first, m);
  store(e.exp_avg_sq + first, v);
  if (e.weight) store(e.weight + first, weight);
}

__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ AdamwParams p) {
  __shared__ Scalars shared;
  wait_for_inputs();
  release_dependents();
  if (*p.skip) return;
  if (threadIdx.x == 0) {
    const double t = static_cast<double>(*p.step) + 1.0;
    const double correction1 = 1.0 - pow(static_cast<double>(p.beta1), t),
                 correction2 = 1.0 - pow(static_cast<double>(p.beta2), t);
    shared = {.lr = *p.lr,
              .grad_scale = *p.grad_scale,
              .step_size = static_cast<float>(*p.lr / correction1),
              .inverse_root = static_cast<float>(1.0 / sqrt(correction2)),
              .beta1 = p.beta1,
              .beta2 = p.beta2,
              .eps = p.eps};
  }
  __syncthreads();
  const Scalars s = shared;
  int tensor = 0;
  for (int chunk = blockIdx.x; chunk < p.chunks; chunk += gridDim.x) {
    while (tensor + 1 < p.tensors && p.entries[tensor + 1].first_chunk <= chunk) ++tensor;
    const Entry& e = p.entries[tensor];
    const float decay = 1.f - s.lr * e.weight_decay;
    const int64_t first = (chunk - e.first_chunk) * kChunk + threadIdx.x * kElements;
    if (first + kElements <= e.numel) {
      update_chunk(e, first, decay, s);
      continue;
    }
    for (int64_t i = first; i < e.numel; ++i) {
      float m = to_float(e.exp_avg[i]), v = to_float(e.exp_avg_sq[i]);
      const float master = update(e.master[i], e.grad[i], m, v, decay, s);
      e.master[i] = master;
      e.exp_avg[i] = from_float<__nv_bfloat16>(m);
      e.exp_avg_sq[i] = from_float<__nv_bfloat16>(v);
      if (e.weight) e.weight[i] = from_float<__nv_bfloat16>(master);
    }
  }
}

void check_list(const char* name, const std::vector<Tensor>& list, const std::vector<Tensor>& master, Dtype dtype) {
  DSV3_CHECK(list.size() == master.size(), name, " must have as many tensors as master, ", master.size(), ", got ",
             list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    check_operand(name, list[i], dtype);
    DSV3_CHECK(list[i].numel() == master[i].numel(), name, "[", i, "] must have as many elements as master[", i, "] ",
               master[i], ", got ", list[i]);
  }
}

}  // namespace

void adamw(std::vector<Tensor> master, std::vector<Tensor> grad, std::vector<Tensor> exp_avg,
           std::vector<Tensor> exp_avg_sq, std::vector<Tensor> weight, Tensor lr, Tensor grad_scale, Tensor skip,
           Tensor step, std::vector<double> weight_decay, double beta1, double beta2, double eps, cudaStream_t stream) {
  check_list("master", master, master, Dtype::kFloat32);
  check_list("grad", grad, master, Dtype::kFloat32);
  check_list("exp_avg", exp_avg, master, Dtype::kBFloat16);
  check_list("exp_avg_sq", exp_avg_sq, master, Dtype::kBFloat16);
  if (!weight.empty()) check_list("weight", weight, master, Dtype::kBFloat16);
  DSV3_CHECK(weight_decay.size() == master.size(), "weight_decay must have one number a tensor, ", master.size(),
             ", got ", weight_decay.size());
  for (const auto& [name, t] : {std::pair{"lr", &lr}, {"grad_scale", &grad_scale}, {"step", &step}}) {
    DSV3_CHECK(t->is_cuda() && t->numel() == 1 && t->dtype() == Dtype::kFloat32, name,
               " must be one float32 on the GPU, got ", *t);
  }
  DSV3_CHECK(skip.is_cuda() && skip.numel() == 1 && skip.dtype() == Dtype::kBool,
             "skip must be one bool on the GPU, got ", skip);
  const DeviceGuard guard(lr);
  AdamwParams p{.lr = lr.data<float>(),
                .grad_scale = grad_scale.data<float>(),
                .step = step.data<float>(),
                .skip = skip.data<bool>(),
                .beta1 = static_cast<float>(beta1),
                .beta2 = static_cast<float>(beta2),
                .eps = static_cast<float>(eps)};
  for (size_t i = 0; i < master.size(); ++i) {
    const int64_t numel = master[i].numel(), chunks = (numel + kChunk - 1) / kChunk;
    DSV3_CHECK(p.chunks + chunks < INT32_MAX, "too many elements in one call");
    if (chunks > 0) {
      p.entries[p.tensors++] = {.master = master[i].data<float>(),
                                .grad = grad[i].data<float>(),
                                .exp_avg = exp_avg[i].data<__nv_bfloat16>(),
                                .exp_avg_sq = exp_avg_sq[i].data<__nv_bfloat16>(),
                                .weight = weight.empty() ? nullptr : weight[i].data<__nv_bfloat16>(),
                                .numel = numel,
                                .first_chunk = p.chunks,
                                .weight_decay = static_cast<float>(weight_decay[i])};
      p.chunks += static_cast<int>(chunks);
    }
    if (p.tensors == kMaxTensors || (i + 1 == master.size() && p.tensors > 0)) {
      const int blocks = std::min(p.chunks, 8 * sm_count());
      launch("adamw", adamw_kernel, {.grid = dim3(blocks), .block = dim3(kThreads)}, stream, p);
      p.tensors = p.chunks = 0;
    }
  }
}

}  // namespace dsv3
