// The vocabulary in which kernels are written, and how they are launched. The only file with CUDA's
// own syntax: everything else in csrc/cuda is plain C++ over these words, so that tests/emu can
// execute the very same sources on the host (FUSED_RNN_EMULATE).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stddef.h>
#include <stdint.h>

#include "../core/platform.h"
#include "fragments.h"
#include "host.h"

namespace fused_rnn::dev {

// Storage types.

using half = __half;
using bfloat16 = __nv_bfloat16;

template <class T>
struct AccumulateImpl {
  using type = float;
};
template <>
struct AccumulateImpl<double> {
  using type = double;
};
// The type in which a storage type is computed.
template <class T>
using Accumulate = typename AccumulateImpl<T>::type;

FUSED_RNN_HD float widen(float v) {
  return v;
}
FUSED_RNN_HD double widen(double v) {
  return v;
}
FUSED_RNN_HD float widen(half v) {
  return __half2float(v);
}
FUSED_RNN_HD float widen(bfloat16 v) {
  return __bfloat162float(v);
}
// Rounded to nearest even.
template <class T>
FUSED_RNN_HD T narrow(Accumulate<T> v) {
  if constexpr (__is_same(T, half)) {
    return __float2half_rn(v);
  } else if constexpr (__is_same(T, bfloat16)) {
    return __float2bfloat16_rn(v);
  } else {
    return v;
  }
}

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

}  // namespace fused_rnn::dev

#ifdef FUSED_RNN_EMULATE
#include <emulator.h>  // tests/emu
#else

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#define FUSED_RNN_KERNEL __global__
#define FUSED_RNN_DEVICE __device__ FUSED_RNN_INLINE
// Registers are limited so that `blocks` blocks of `threads` threads fit an SM.
#define FUSED_RNN_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)

namespace fused_rnn::dev {

// Who am I.

FUSED_RNN_DEVICE Index thread_index() {
  return {int(threadIdx.x), int(threadIdx.y), int(threadIdx.z)};
}
FUSED_RNN_DEVICE Index block_index() {
  return {int(blockIdx.x), int(blockIdx.y), int(blockIdx.z)};
}
FUSED_RNN_DEVICE Index block_size() {
  return {int(blockDim.x), int(blockDim.y), int(blockDim.z)};
}
FUSED_RNN_DEVICE Index grid_size() {
  return {int(gridDim.x), int(gridDim.y), int(gridDim.z)};
}
// Of the block, x running fastest: warps are 32 consecutive ones.
FUSED_RNN_DEVICE int thread_rank() {
  return int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}
FUSED_RNN_DEVICE int lane_index() {
  return thread_rank() % kWarp;
}
FUSED_RNN_DEVICE int warp_index() {
  return thread_rank() / kWarp;
}

// Barriers. What threads wrote before is seen by all after.

FUSED_RNN_DEVICE void sync_block() {
  __syncthreads();
}
FUSED_RNN_DEVICE void sync_warp(unsigned mask = kFullWarp) {
  __syncwarp(mask);
}
FUSED_RNN_DEVICE void sync_grid() {
  cooperative_groups::this_grid().sync();
}

// Clusters: before sm_90 a kernel that comes here stops with an error.

FUSED_RNN_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n\t"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#else
  __trap();
#endif
}
// Of this block in its cluster.
FUSED_RNN_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  __trap();
  return 0;
#endif
}
FUSED_RNN_DEVICE int cluster_size() {
#if __CUDA_ARCH__ >= 900
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  __trap();
  return 1;
#endif
}
// Where the block of this rank in the cluster has what `p` is here. No block of a cluster may end
// while another reads from it.
template <class T>
FUSED_RNN_DEVICE T* cluster_shared(T* p, int rank) {
#if __CUDA_ARCH__ >= 900
  T* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
  return there;
#else
  __trap();
  return p;
#endif
}

// Barriers in shared memory that count arrivals and bytes, and stores into the shared memory of
// another block of the cluster that are counted there. A phase ends when all its arrivals and all
// bytes it expects are there, and the next one begins. Before sm_90 as clusters.

// By one thread of the block, before a sync_cluster() of all.
FUSED_RNN_DEVICE void phase_init([[maybe_unused]] uint64_t* barrier,
                                 [[maybe_unused]] int arrivals) {
#if __CUDA_ARCH__ >= 900
  const unsigned at = unsigned(__cvta_generic_to_shared(barrier));
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], %1;\n\t"
      "fence.mbarrier_init.release.cluster;" ::"r"(at),
      "r"(arrivals)
      : "memory");
#else
  __trap();
#endif
}
// Arrives, and has the phase expect so many bytes more.
FUSED_RNN_DEVICE void phase_expect([[maybe_unused]] uint64_t* barrier, [[maybe_unused]] int bytes) {
#if __CUDA_ARCH__ >= 900
  const unsigned at = unsigned(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(at),
               "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}
// Whether the phase has ended: the first, third, ... have parity 0. May wait a little. What the
// counted stores wrote is seen by whoever is told so.
FUSED_RNN_DEVICE bool phase_done([[maybe_unused]] uint64_t* barrier, [[maybe_unused]] int parity) {
#if __CUDA_ARCH__ >= 900
  const unsigned at = unsigned(__cvta_generic_to_shared(barrier));
  unsigned done;
  asm volatile(
      "{\n\t"
      ".reg .pred p;\n\t"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t"
      "}"
      : "=r"(done)
      : "r"(at), "r"(parity)
      : "memory");
  return done != 0;
#else
  __trap();
  return true;
#endif
}
// v goes to where the block of this rank in the cluster has what `p` is here, some time before the
// phase of its `barrier` ends that counts it. T has 4 or 8 bytes.
template <class T>
FUSED_RNN_DEVICE void store_async([[maybe_unused]] T* p, [[maybe_unused]] T v,
                                  [[maybe_unused]] uint64_t* barrier, [[maybe_unused]] int rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
#if __CUDA_ARCH__ >= 900
  unsigned to, at;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(to)
      : "r"(unsigned(__cvta_generic_to_shared(p))), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(at)
      : "r"(unsigned(__cvta_generic_to_shared(barrier))), "r"(rank));
  if constexpr (sizeof(T) == 4) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
        "r"(__builtin_bit_cast(uint32_t, v)), "r"(at)
        : "memory");
  } else {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(to),
        "l"(__builtin_bit_cast(uint64_t, v)), "r"(at)
        : "memory");
  }
#else
  __trap();
#endif
}

// Of a clock that all blocks share; it may stand still for a microsecond.
FUSED_RNN_DEVICE uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

// Warp collectives. They order no memory accesses: that takes sync_warp. T has 4 or 8 bytes. All
// lanes in the mask come here together; only their values may be asked for.

template <class T>
FUSED_RNN_DEVICE T shuffle(T v, int source, unsigned mask = kFullWarp) {
  return __shfl_sync(mask, v, source);
}
template <class T>
FUSED_RNN_DEVICE T shuffle_xor(T v, int lane_mask, unsigned mask = kFullWarp) {
  return __shfl_xor_sync(mask, v, lane_mask);
}
// From the lane `delta` further on; at the end of the warp v stays.
template <class T>
FUSED_RNN_DEVICE T shuffle_down(T v, int delta, unsigned mask = kFullWarp) {
  return __shfl_down_sync(mask, v, unsigned(delta));
}
FUSED_RNN_DEVICE unsigned ballot(bool v, unsigned mask = kFullWarp) {
  return __ballot_sync(mask, v);
}

// The shared memory of the launch, LaunchConfig::shared_bytes, aligned to 128. Contents undefined.
template <class T>
FUSED_RNN_DEVICE T* shared() {
  extern __shared__ __align__(128) unsigned char fused_rnn_shared[];
  return reinterpret_cast<T*>(fused_rnn_shared);
}

// Copies of 4, 8 or 16 bytes from global to shared memory that run on their own (cp.async). Both
// addresses are aligned to the size. Without `valid` zeros are written and nothing is read. A
// thread sees its own copies after its wait, others after a barrier behind that.

template <int kBytes>
FUSED_RNN_DEVICE void copy_async(void* to_shared, const void* from_global, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const unsigned to = unsigned(__cvta_generic_to_shared(to_shared));
  const size_t from = __cvta_generic_to_global(from_global);
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {  // .cg: not through L1
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes),
                 "r"(bytes)
                 : "memory");
  }
}
// Closes a group of the copies since the last commit, perhaps of none.
FUSED_RNN_DEVICE void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most so many of this thread's groups, the latest, are under way.
template <int kGroups>
FUSED_RNN_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Matrix products of a warp, d += a b. All 32 lanes take part; which lane holds which element says
// fragments.h.

// T is half or bfloat16. Sums are in float, not in the order of k.
template <class T>
FUSED_RNN_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(__is_same(T, half) || __is_same(T, bfloat16));
  if constexpr (__is_same(T, half)) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}
// The operands are floats of which only the first 19 bits count: see to_tf32.
FUSED_RNN_DEVICE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FUSED_RNN_DEVICE void mma_m8n8k4(double (&d)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(d[0]), "+d"(d[1])
               : "d"(a), "d"(b));
}
// Rounded to the 10 bits of significand that tf32 has, halves away from zero.
FUSED_RNN_DEVICE uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}
// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l gives the address of row l % 8
// of matrix l / 8, 16 bytes and aligned so. r[m] is then the elements of matrix m, row lane / 4,
// columns lane % 4 * 2 and the next; of its transpose in the second form.
FUSED_RNN_DEVICE void load_matrices(uint32_t (&r)[4], const void* row_in_shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(unsigned(__cvta_generic_to_shared(row_in_shared)))
               : "memory");
}
FUSED_RNN_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row_in_shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(unsigned(__cvta_generic_to_shared(row_in_shared)))
               : "memory");
}

// Memory shared with other blocks while a kernel runs: T has 4 or 8 bytes. What a thread wrote
// before its store_release or add_release is seen by whoever has loaded that value, or a later one,
// by load_acquire. There are no fences: ThreadSanitizer would not understand them.

template <class T>
FUSED_RNN_DEVICE T load_acquire(const T* p) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    asm volatile("ld.acquire.gpu.b32 %0, [%1];" : "=r"(bits) : "l"(p) : "memory");
    return __builtin_bit_cast(T, bits);
  } else {
    uint64_t bits;
    asm volatile("ld.acquire.gpu.b64 %0, [%1];" : "=l"(bits) : "l"(p) : "memory");
    return __builtin_bit_cast(T, bits);
  }
}
template <class T>
FUSED_RNN_DEVICE T load_relaxed(const T* p) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    asm volatile("ld.relaxed.gpu.b32 %0, [%1];" : "=r"(bits) : "l"(p) : "memory");
    return __builtin_bit_cast(T, bits);
  } else {
    uint64_t bits;
    asm volatile("ld.relaxed.gpu.b64 %0, [%1];" : "=l"(bits) : "l"(p) : "memory");
    return __builtin_bit_cast(T, bits);
  }
}
template <class T>
FUSED_RNN_DEVICE void store_release(T* p, T v) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.release.gpu.b32 [%0], %1;" ::"l"(p), "r"(__builtin_bit_cast(uint32_t, v))
                 : "memory");
  } else {
    asm volatile("st.release.gpu.b64 [%0], %1;" ::"l"(p), "l"(__builtin_bit_cast(uint64_t, v))
                 : "memory");
  }
}
// 16 bytes, aligned so; each of the words is loaded for itself.
FUSED_RNN_DEVICE void load_relaxed(uint32_t (&words)[4], const void* p) {
  asm volatile("ld.relaxed.gpu.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(p)
               : "memory");
}
// T may have 2 bytes too.
template <class T>
FUSED_RNN_DEVICE void store_relaxed(T* p, T v) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (sizeof(T) == 2) {
    asm volatile("st.relaxed.gpu.b16 [%0], %1;" ::"l"(p), "h"(__builtin_bit_cast(uint16_t, v))
                 : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.relaxed.gpu.b32 [%0], %1;" ::"l"(p), "r"(__builtin_bit_cast(uint32_t, v))
                 : "memory");
  } else {
    asm volatile("st.relaxed.gpu.b64 [%0], %1;" ::"l"(p), "l"(__builtin_bit_cast(uint64_t, v))
                 : "memory");
  }
}
// The value before.
FUSED_RNN_DEVICE uint32_t add_relaxed(uint32_t* p, uint32_t v) {
  uint32_t before;
  asm volatile("atom.add.relaxed.gpu.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(v) : "memory");
  return before;
}
FUSED_RNN_DEVICE uint32_t add_release(uint32_t* p, uint32_t v) {
  uint32_t before;
  asm volatile("atom.add.release.gpu.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(v) : "memory");
  return before;
}
FUSED_RNN_DEVICE uint32_t add_acq_rel(uint32_t* p, uint32_t v) {
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(v) : "memory");
  return before;
}

// The host's side.

inline Status status_of(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // what is reported here is not to be found again by the next who asks
  return Status::error(std::string(what) + ": " + cudaGetErrorString(error) + " (" +
                       cudaGetErrorName(error) + ")");
}

// Any error means that there is no GPU: without a driver every call fails and leaves its results
// as they were.
inline Status device_count(int* count) {
  *count = 0;
  int found = 0;
  Status status = status_of(cudaGetDeviceCount(&found), "no GPU");
  if (!status.ok()) return status;
  if (found == 0) return Status::error("no GPU: the driver knows no device");
  *count = found;
  return {};
}

inline Status current_device(int* device) {
  return status_of(cudaGetDevice(device), "cudaGetDevice");
}

inline Status device_info(int device, DeviceInfo* info) {
  int count;
  if (Status status = device_count(&count); !status.ok()) return status;
  cudaDeviceProp p;
  Status status = status_of(cudaGetDeviceProperties(&p, device), "cudaGetDeviceProperties");
  if (!status.ok()) return status;
  info->name = p.name;
  info->capability = 10 * p.major + p.minor;
  info->sms = p.multiProcessorCount;
  info->threads_per_sm = p.maxThreadsPerMultiProcessor;
  info->shared_per_block = p.sharedMemPerBlockOptin;
  info->shared_per_sm = p.sharedMemPerMultiprocessor;
  info->l2_bytes = size_t(p.l2CacheSize);
  info->cooperative = p.cooperativeLaunch != 0;
  info->clusters = p.major >= 9;
  return {};
}

// Above 48 KB of shared memory, and above 8 blocks per cluster, a kernel has to be told.
inline Status allow(const void* kernel, size_t shared_bytes, int cluster) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return status_of(error, "shared memory of a launch");
  }
  if (cluster > 8) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return status_of(error, "cluster of a launch");
  }
  return {};
}

// How many blocks of the kernel an SM of the current device holds at a time.
template <auto kKernel>
Status blocks_per_sm(int threads, size_t shared_bytes, int* blocks) {
  *blocks = 0;
  const void* kernel = reinterpret_cast<const void*>(kKernel);
  if (Status status = allow(kernel, shared_bytes, 1); !status.ok()) return status;
  return status_of(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared_bytes),
      "occupancy");
}

// How many clusters of such a launch the current device holds at a time.
template <auto kKernel>
Status active_clusters(const LaunchConfig& config, int* clusters) {
  *clusters = 0;
  const void* kernel = reinterpret_cast<const void*>(kKernel);
  if (Status status = allow(kernel, config.shared_bytes, config.cluster); !status.ok()) {
    return status;
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(config.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t c = {};
  c.gridDim = dim3(unsigned(config.grid.x));
  c.blockDim = dim3(unsigned(config.block.x));
  c.dynamicSmemBytes = config.shared_bytes;
  c.attrs = &attribute;
  c.numAttrs = 1;
  return status_of(cudaOccupancyMaxActiveClusters(clusters, kernel, &c), "clusters");
}

// Starts the kernel on the stream of the current device and does not wait. Arguments are converted
// to the kernel's parameters.
template <auto kKernel, class... Args>
Status launch(const LaunchConfig& config, Stream stream, Args&&... args) {
  const void* kernel = reinterpret_cast<const void*>(kKernel);
  if (Status status = allow(kernel, config.shared_bytes, config.cluster); !status.ok()) {
    return status;
  }
  const auto dim = [](Index i) { return dim3(unsigned(i.x), unsigned(i.y), unsigned(i.z)); };
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t c = {};
  c.gridDim = dim(config.grid);
  c.blockDim = dim(config.block);
  c.dynamicSmemBytes = config.shared_bytes;
  c.stream = static_cast<cudaStream_t>(stream);
  c.attrs = attributes;
  if (config.cooperative) {
    attributes[c.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[c.numAttrs++].val.cooperative = 1;
  }
  if (config.cluster > 1) {
    attributes[c.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[c.numAttrs].val.clusterDim.x = unsigned(config.cluster);
    attributes[c.numAttrs].val.clusterDim.y = 1;
    attributes[c.numAttrs++].val.clusterDim.z = 1;
  }
  return status_of(cudaLaunchKernelEx(&c, kKernel, static_cast<Args&&>(args)...), "launch");
}

// In the order of the stream.
inline Status fill_bytes(void* to, int byte, size_t bytes, Stream stream) {
  return status_of(cudaMemsetAsync(to, byte, bytes, static_cast<cudaStream_t>(stream)),
                   "cudaMemsetAsync");
}
inline Status copy_bytes(void* to, const void* from, size_t bytes, Stream stream) {
  return status_of(
      cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)),
      "cudaMemcpyAsync");
}
inline Status wait_for(Stream stream) {
  return status_of(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)),
                   "cudaStreamSynchronize");
}

}  // namespace fused_rnn::dev

#endif  // FUSED_RNN_EMULATE
