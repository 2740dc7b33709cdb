// A ring of two stages in shared memory that one thread fills by bulk copies, in thirty lines: whether racecheck of
// compute-sanitizer follows its barriers. All threads that read a stage say so with EVERY_LANE=1, else one of each warp
// after __syncwarp(), as in src/lte/ops/step/step.cu.
//
//   nvcc -arch=sm_90 -DEVERY_LANE=0 -o control benchmarks/racecheck_control.cu && compute-sanitizer --tool racecheck ./control
#include <cstdio>

#define DEVICE __device__ __forceinline__
typedef unsigned long long Barrier;
constexpr int READERS = 256, PIECES = 64;

DEVICE unsigned address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
DEVICE void start_barrier(Barrier& b, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address(&b)), "r"(count) : "memory");
}
DEVICE void arrive(Barrier& b) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(address(&b)) : "memory");
}
DEVICE void expect(Barrier& b, int bytes) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.expect_tx.shared.b64 t, [%0], %1; }" ::"r"(address(&b)), "r"(bytes)
               : "memory");
}
DEVICE void wait(Barrier& b, unsigned parity) {
  asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @!p bra again; }" ::"r"(
                   address(&b)),
               "r"(parity)
               : "memory");
}
DEVICE void copy(void* to, const void* from, int bytes, Barrier& b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   address(to)),
               "l"(from), "r"(bytes), "r"(address(&b))
               : "memory");
}

__global__ void ring(const float* in, float* out) {
  __shared__ alignas(128) float stages[2][READERS];
  __shared__ Barrier full[2], empty[2];
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) start_barrier(full[i], 1), start_barrier(empty[i], EVERY_LANE ? READERS : READERS / 32);
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x == READERS) {
    for (int i = 0; i < PIECES; i++) {
      const int stage = i % 2;
      if (i >= 2) wait(empty[stage], (i / 2 - 1) & 1);
      expect(full[stage], sizeof(stages[0]));
      copy(stages[stage], in + READERS * i, sizeof(stages[0]), full[stage]);
    }
  } else if (threadIdx.x < READERS) {
    float sum = 0;
    for (int i = 0; i < PIECES; i++) {
      const int stage = i % 2;
      wait(full[stage], (i / 2) & 1);
      sum += stages[stage][threadIdx.x ^ 1];
      __syncwarp();
      if (EVERY_LANE || threadIdx.x % 32 == 0) arrive(empty[stage]);
    }
    out[threadIdx.x] = sum;
  }
}

int main() {
  static float values[PIECES * READERS], sums[READERS];
  float *in, *out;
  for (int i = 0; i < PIECES * READERS; i++) values[i] = i % READERS;
  cudaMalloc(&in, sizeof(values));
  cudaMalloc(&out, sizeof(sums));
  cudaMemcpy(in, values, sizeof(values), cudaMemcpyHostToDevice);
  ring<<<1, READERS + 32>>>(in, out);
  cudaMemcpy(sums, out, sizeof(sums), cudaMemcpyDeviceToHost);
  int wrong = 0;
  for (int i = 0; i < READERS; i++) wrong += sums[i] != (float)PIECES * (i ^ 1);
  printf("wrong %d, %s\n", wrong, cudaGetErrorString(cudaGetLastError()));
}
