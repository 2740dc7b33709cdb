// How fast a grid that stays can stream weights, and meet: what a decoding step cannot beat. Needs nvcc and sm_90.
//
//     nvcc -arch=sm_90 -O3 -std=c++17 benchmarks/stream.cu -o stream && ./stream
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <vector>

typedef unsigned long long Barrier;
#define DEVICE __device__ __forceinline__
DEVICE unsigned shared(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
DEVICE void start(Barrier& b, int n) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared(&b)), "r"(n) : "memory"); }
DEVICE void arrive(Barrier& b) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(shared(&b)) : "memory");
}
DEVICE void wait(Barrier& b, unsigned parity) {
  asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @!p bra again; }" ::"r"(shared(&b)),
               "r"(parity)
               : "memory");
}
DEVICE void expect(Barrier& b, int n) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.expect_tx.shared.b64 t, [%0], %1; }" ::"r"(shared(&b)), "r"(n) : "memory");
}
DEVICE void copy(void* to, const void* from, int n, Barrier& b, unsigned long long policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                   shared(to)),
               "l"(from), "r"(n), "r"(shared(&b)), "l"(policy)
               : "memory");
}

// FETCHERS warps fill a ring of STAGES stages of STAGE bytes by pieces of PIECE bytes, from rows of `row` bytes or, where
// that is 0, from one run of memory; 256 threads read a little of each stage and give it back.
template <int FETCHERS, int PIECE, int STAGE, int STAGES, int PAD>
__global__ __launch_bounds__(256 + 32 * FETCHERS, 1) void ring(const char* weights, size_t bytes, int row, float* out) {
  extern __shared__ __align__(128) char memory[];
  __shared__ Barrier full[STAGES], empty[STAGES];
  constexpr int PIECES = STAGE / PIECE, EACH = PIECES / FETCHERS, PITCH = PIECE + PAD;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, n = bytes / STAGE;
  if (tid == 0) {
    for (int i = 0; i < STAGES; i++) start(full[i], 1), start(empty[i], 8);
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async;" ::: "memory");
  }
  __syncthreads();
  const char* mine = weights + bytes * blockIdx.x;
  int stage = 0;
  if (warp >= 8) {
    unsigned long long policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    unsigned parity = 1;
    const int piece = lane < EACH ? (warp - 8) * EACH + lane : PIECES, slabs = row ? row / PIECE : 1;
    for (int i = 0; i < n; i++) {
      wait(empty[stage], parity);
      if (warp == 8 && lane == 0) expect(full[stage], STAGE);
      if (piece < PIECES) {
        const size_t at = row ? (size_t)(i / slabs) * PIECES * row + (size_t)piece * row + i % slabs * PIECE
                              : (size_t)i * STAGE + piece * PIECE;
        copy(memory + (stage * PIECES + piece) * PITCH, mine + at, PIECE, full[stage], policy);
      }
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
  } else {
    unsigned parity = 0;
    float sum = 0;
    for (int i = 0; i < n; i++) {
      wait(full[stage], parity);
      sum += *(float*)(memory + stage * PIECES * PITCH + tid * 16);
      __syncwarp();
      if (lane == 0) arrive(empty[stage]);
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    if (sum == 12345) out[0] = sum;
  }
}

// The same by loads of 16 bytes into registers, LOADS of them at once for each thread.
template <int THREADS, int LOADS>
__global__ __launch_bounds__(THREADS, 1) void direct(const char* weights, size_t bytes, float* out) {
  const uint4* from = (const uint4*)(weights + bytes * blockIdx.x);
  unsigned sum = 0;
  for (size_t i = threadIdx.x; i + THREADS * (LOADS - 1) < bytes / 16; i += THREADS * LOADS) {
    uint4 x[LOADS];
#pragma unroll
    for (int k = 0; k < LOADS; k++)
      asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(x[k].x), "=r"(x[k].y), "=r"(x[k].z), "=r"(x[k].w)
                   : "l"(from + i + k * THREADS));
#pragma unroll
    for (int k = 0; k < LOADS; k++) sum ^= x[k].x ^ x[k].y ^ x[k].z ^ x[k].w;
  }
  if (sum == 12345) out[0] = sum;
}

// Barriers of all blocks: 0 a flag for each block, 1 one counter, 2 one counter without fences.
__global__ void meet(unsigned* flags, unsigned rounds, int kind) {
  const int tid = threadIdx.x;
  for (unsigned round = 1; round <= rounds; round++) {
    unsigned seen;
    __syncthreads();
    if (kind == 0) {
      if (tid == 0)
        asm volatile("fence.acq_rel.gpu; st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(flags + blockIdx.x), "r"(round) : "memory");
      for (int p = tid; p < (int)gridDim.x; p += blockDim.x) do
          asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flags + p) : "memory");
        while ((int)(seen - round) < 0);
    } else if (tid == 0) {
      if (kind == 1) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(flags) : "memory");
      if (kind == 2) asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(flags) : "memory");
      do {
        if (kind == 1) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flags) : "memory");
        if (kind == 2) asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flags) : "memory");
      } while (seen < round * gridDim.x);
    }
    __syncthreads();
  }
}

template <class Run> float median_ms(Run run) {
  std::vector<float> times;
  cudaEvent_t begin, end;
  cudaEventCreate(&begin), cudaEventCreate(&end);
  for (int i = 0; i < 9; i++) {
    float ms;
    cudaEventRecord(begin), run(), cudaEventRecord(end), cudaEventSynchronize(end);
    cudaEventElapsedTime(&ms, begin, end);
    times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

int main() {
  int blocks;
  cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, 0);
  const size_t bytes = 48ull << 20, all = bytes * blocks;
  char* weights;
  float* out;
  unsigned* flags;
  cudaMalloc(&weights, all), cudaMemset(weights, 0, all), cudaMalloc(&out, 4), cudaMalloc(&flags, 4096);
  auto tell = [&](const char* name, float ms) {
    printf("%-70s %.3f ms, %.2f TB/s, %s\n", name, ms, all / ms / 1e9, cudaGetErrorString(cudaGetLastError()));
  };
#define RING(FETCHERS, PIECE, STAGE, STAGES, PAD, ROW)                                                            \
  {                                                                                                               \
    auto kernel = ring<FETCHERS, PIECE, STAGE, STAGES, PAD>;                                                      \
    const int size = STAGES * (STAGE / PIECE) * (PIECE + PAD);                                                    \
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, size);                              \
    tell("ring, fetchers " #FETCHERS ", pieces " #PIECE " + " #PAD ", stages " #STAGES " x " #STAGE ", row " #ROW, \
         median_ms([&] { kernel<<<blocks, 256 + 32 * FETCHERS, size>>>(weights, bytes, ROW, out); }));             \
  }
  RING(1, 1024, 16384, 12, 16, 8192)
  RING(2, 1024, 16384, 12, 16, 8192)
  RING(4, 1024, 16384, 12, 16, 8192)
  RING(8, 1024, 16384, 12, 16, 8192)
  RING(4, 1024, 16384, 6, 16, 8192)
  RING(4, 512, 16384, 12, 16, 8192)
  RING(4, 2048, 16384, 12, 16, 8192)
  RING(1, 16384, 16384, 12, 0, 0)
  tell("loads, 512 threads x 4", median_ms([&] { direct<512, 4><<<blocks, 512>>>(weights, bytes, out); }));
  tell("loads, 1024 threads x 4", median_ms([&] { direct<1024, 4><<<blocks, 1024>>>(weights, bytes, out); }));
  tell("copy, read and written",
       median_ms([&] { cudaMemcpyAsync(weights, weights + all / 2, all / 2, cudaMemcpyDeviceToDevice); }));
  for (int kind = 0; kind < 3; kind++) {
    unsigned rounds = 2000;
    void* arguments[] = {&flags, &rounds, &kind};
    const float ms = median_ms([&] {
      cudaMemsetAsync(flags, 0, 4096);
      cudaLaunchCooperativeKernel((void*)meet, dim3(blocks), dim3(256), arguments, 0, 0);
    });
    printf("barrier of kind %d: %.3f us, %s\n", kind, ms / rounds * 1e3, cudaGetErrorString(cudaGetLastError()));
  }
}
