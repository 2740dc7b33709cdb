// What step.cu needs of a GPU, without CUDA's headers, which a machine that runs PyTorch need not have.
#define DEVICE __device__ __forceinline__
#define KERNEL __global__ __launch_bounds__(THREADS + 32 * FETCHERS, 1)
#define SHARED_MEMORY(type, name)                   \
  extern __shared__ __align__(128) char _memory[];  \
  type& name = *reinterpret_cast<type*>(_memory)
#define INFINITY_ __int_as_float(0x7f800000)

#if LTE_ELEM == 32
typedef float elem;
DEVICE float to_float(elem x) { return x; }
DEVICE elem from_float(float x) { return x; }
#elif LTE_ELEM == 16
typedef unsigned short elem;
DEVICE float to_float(elem x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
DEVICE elem from_float(float x) { elem y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
#else  // bf16
typedef unsigned short elem;
DEVICE float to_float(elem x) { return __uint_as_float((unsigned)x << 16); }
DEVICE elem from_float(float x) { elem y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
#endif

DEVICE float fma_(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float exp_(float x) { return __expf(x); }
DEVICE float erf_(float x) { return erff(x); }
DEVICE float tanh_(float x) { return tanhf(x); }
DEVICE float cos_(float x) { return cosf(x); }
DEVICE float sin_(float x) { return sinf(x); }
DEVICE float rsqrt_(float x) { return rsqrtf(x); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
DEVICE unsigned vote(bool x) { return __ballot_sync(~0u, x); }
DEVICE int popcount(unsigned x) { return __popc(x); }
DEVICE void warp_sync() { __syncwarp(); }
DEVICE void block_sync() { __syncthreads(); }
// All threads but the producer's.
DEVICE void team_sync() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }
DEVICE const char* shuffle(const char* x, int lane) {
  return (const char*)__shfl_sync(~0u, (unsigned long long)x, lane);
}
// Between two looks at memory that another block writes. A launch whose blocks do not all run at once would wait for
// ever: it ends with an error after about ten seconds instead, half a microsecond or more for each look.
DEVICE void spin(unsigned& tries) {
  if (++tries == 1u << 24) asm volatile("trap;");
}
DEVICE long long clock_ns() { long long t; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)); return t; }
// For tests of races: up to LTE_DELAY nanoseconds, other ones for each block and each time.
DEVICE void delay(unsigned time) {
#ifdef LTE_DELAY
  unsigned x = (time * 2654435761u) ^ (blockIdx.x * 2246822519u);
  x = (x ^ x >> 15) * 2246822519u;
  x = (x ^ x >> 13) * 3266489917u;
  asm volatile("nanosleep.u32 %0;" ::"r"((x >> 8) % LTE_DELAY));
#endif
}

// Memory that other multiprocessors write in the same launch is read from the L2 cache.
DEVICE float load_fresh(const float* p) {
  float x;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(p) : "memory");
  return x;
}
template <class N> struct alignas(4 * sizeof(N)) Four { N x[4]; };
template <> struct alignas(16) Four<long long> { long long x[4]; };
DEVICE Four<float> load_four(const float* p) {
  Four<float> y;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(y.x[0]), "=f"(y.x[1]), "=f"(y.x[2]), "=f"(y.x[3]) : "l"(p) : "memory");
  return y;
}
DEVICE Four<long long> load_four(const long long* p) {
  Four<long long> y;
  asm volatile("ld.global.cg.v2.s64 {%0, %1}, [%4]; ld.global.cg.v2.s64 {%2, %3}, [%4+16];"
               : "=l"(y.x[0]), "=l"(y.x[1]), "=l"(y.x[2]), "=l"(y.x[3])
               : "l"(p)
               : "memory");
  return y;
}
#if LTE_ELEM != 32
DEVICE Four<elem> load_four(const elem* p) {
  Four<elem> y;
  asm volatile("ld.global.v4.u16 {%0, %1, %2, %3}, [%4];" : "=h"(y.x[0]), "=h"(y.x[1]), "=h"(y.x[2]), "=h"(y.x[3]) : "l"(p));
  return y;
}
#endif
DEVICE unsigned load_relaxed(const unsigned* p) {
  unsigned x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
DEVICE unsigned load_acquire(const unsigned* p) {
  unsigned x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
DEVICE void store_relaxed(unsigned* p, unsigned x) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
DEVICE void store_release(unsigned* p, unsigned x) {
  asm volatile("fence.acq_rel.gpu; st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
DEVICE void add_release(unsigned* p, unsigned x) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
DEVICE void add_relaxed(long long* p, long long x) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
}
DEVICE long long to_fixed(float x) { return __float2ll_rn(x); }

// Barriers of shared memory, and copies into it that arrive at one.
typedef unsigned long long Barrier;
DEVICE unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
DEVICE void start_barrier(Barrier& b, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&b)), "r"(count) : "memory");
}
DEVICE void arrive(Barrier& b) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(shared_address(&b)) : "memory");
}
// Rows come by bulk copies, which one lane asks for, or else 16 bytes for each lane.
#ifndef LTE_BULK
#define LTE_BULK (__CUDA_ARCH__ >= 900)
#endif
#if __CUDA_ARCH__ >= 900
#define LOOK "mbarrier.try_wait.parity.shared.b64"   // sleeps a little
#else
#define LOOK "mbarrier.test_wait.parity.shared.b64"
#endif
DEVICE void wait(Barrier& b, unsigned parity) {
  asm volatile("{ .reg .pred p; again: " LOOK " p, [%0], %1; @!p bra again; }" ::"r"(shared_address(&b)), "r"(parity)
               : "memory");
}
#if LTE_BULK
DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async;" ::: "memory"); }
DEVICE void expect(Barrier& b, int bytes) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.expect_tx.shared.b64 t, [%0], %1; }" ::"r"(shared_address(&b)), "r"(bytes)
               : "memory");
}
// What is read once a step leaves the L2 cache first, so that all else stays there.
DEVICE unsigned long long read_once() {
  unsigned long long policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
template <bool KEEP> DEVICE void bulk_copy(void* to, const void* from, int bytes, Barrier& b, unsigned long long once) {
  if (KEEP)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(&b))
                 : "memory");
  else
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(&b)), "l"(once)
        : "memory");
}
#else
DEVICE void publish_barriers() {}
DEVICE void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// Once this thread's copies are there.
DEVICE void arrive_when_copied(Barrier& b) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&b)) : "memory");
}
#endif

// Tensor cores: C [16, 8] += A [16, 16] B [16, 8]. A lane holds the rows lane / 4 and + 8, and two tokens of C.
DEVICE void load_matrices(unsigned (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void load_matrices_transposed(unsigned (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if LTE_ELEM == 16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
// a b + c of two numbers each, rounded once.
DEVICE unsigned multiply_add(unsigned a, unsigned b, unsigned c) {
  unsigned x;
#if LTE_ELEM == 16
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
#else
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
#endif
  return x;
}
// The bytes `first` and first + 1 in the low bytes of the halves.
DEVICE unsigned spread(unsigned x, int first) { return __byte_perm(x, 0, first == 0 ? 0x4140 : 0x4342); }
DEVICE unsigned x_bits(unsigned short x) { return x; }
#include "tile.h"
