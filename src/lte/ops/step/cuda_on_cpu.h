// What step.cu needs of a GPU, on a CPU: a fiber for each thread, so that the kernel's tests need no GPU.
//
// The order of the threads is random by a seed, a copy into shared memory arrives when it is waited for and not before,
// and memory starts as NaN, so a missing barrier or wait gives a wrong result. A kernel that hangs ends with an error.
#undef _FORTIFY_SOURCE  // which takes a jump between stacks for an error
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>
#include <algorithm>

#define DEVICE inline
#define KERNEL
#define INFINITY_ __builtin_inff()
using std::size_t;
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };

#if LTE_ELEM == 32
typedef float elem;
inline float to_float(elem x) { return x; }
inline elem from_float(float x) { return x; }
#elif LTE_ELEM == 16
typedef _Float16 elem;
inline float to_float(elem x) { return (float)x; }
inline elem from_float(float x) { return (elem)x; }
#else  // bf16
typedef unsigned short elem;
inline float to_float(elem x) { unsigned bits = (unsigned)x << 16; float y; std::memcpy(&y, &bits, 4); return y; }
inline elem from_float(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fff;
  return (elem)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#endif

#ifndef LTE_BULK
#define LTE_BULK 1
#endif

struct Meeting { int arrived = 0; unsigned generation = 0; };
struct Warp { Meeting meeting; float values[32]; bool votes[32]; const char* rows[32]; unsigned a[32][4], b[32][2]; };
struct Block { Meeting meeting, team; std::vector<Warp> warps; std::vector<char> memory; int index; };
struct Barrier;
struct Copy { void* to; const void* from; int bytes; };
// Copies that arrive together, and then at a barrier: their bytes, or as a thread.
struct Copies { std::vector<Copy> list; Barrier* barrier; bool as_thread; };
struct Fiber {
  ucontext_t context;
  jmp_buf place;              // where it goes on; a jump, unlike a swap of contexts, asks nothing of the system
  bool started = false;
  Block* block;
  int thread;
  bool done = false;
  std::vector<Copy> asked;   // for copies that will arrive as this thread
};
struct Machine {
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* now = nullptr;
  jmp_buf scheduler;
  std::mt19937 random;
  long long idle = 0;         // turns since any thread got on
  bool hangs = false;
  int threads, team, grid;
};
static Machine machine;
struct Index { int x; };
#define threadIdx (Index{machine.now->thread})
#define blockIdx (Index{machine.now->block->index})
#define gridDim (Index{machine.grid})
#define SHARED_MEMORY(type, name) \
  if (machine.now->block->memory.empty()) machine.now->block->memory.assign(sizeof(type) + 128, (char)0xff); \
  type& name = *reinterpret_cast<type*>(((uintptr_t)machine.now->block->memory.data() + 127) / 128 * 128)

inline void yield() { if (!_setjmp(machine.now->place)) _longjmp(machine.scheduler, 1); }
inline void spin(unsigned&) { yield(); }
inline void delay(unsigned) {}
inline void got_on() { machine.idle = 0; }
inline void meet(Meeting& meeting, int count) {
  const unsigned mine = meeting.generation;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    meeting.generation++;
    got_on();
  }
  while (meeting.generation == mine) yield();
}
inline Warp& warp_now() { return machine.now->block->warps[machine.now->thread / 32]; }
inline void warp_sync() { meet(warp_now().meeting, 32); }
inline void block_sync() { meet(machine.now->block->meeting, machine.threads); }
inline void team_sync() { meet(machine.now->block->team, machine.team); }
inline float shuffle_xor(float x, int mask) {
  Warp& warp = warp_now();
  const int lane = machine.now->thread % 32;
  warp.values[lane] = x;
  warp_sync();
  const float y = warp.values[lane ^ mask];
  warp_sync();
  return y;
}
inline unsigned vote(bool x) {
  Warp& warp = warp_now();
  warp.votes[machine.now->thread % 32] = x;
  warp_sync();
  unsigned bits = 0;
  for (int i = 0; i < 32; i++) bits |= (unsigned)warp.votes[i] << i;
  warp_sync();
  return bits;
}
inline const char* shuffle(const char* x, int from) {
  Warp& warp = warp_now();
  warp.rows[machine.now->thread % 32] = x;
  warp_sync();
  const char* y = warp.rows[from];
  warp_sync();
  return y;
}
inline long long clock_ns() { return std::chrono::steady_clock::now().time_since_epoch().count(); }
inline int popcount(unsigned x) { return __builtin_popcount(x); }
inline float fma_(float a, float b, float c) { return std::fma(a, b, c); }
inline float exp_(float x) { return std::exp(x); }
inline float erf_(float x) { return std::erf(x); }
inline float tanh_(float x) { return std::tanh(x); }
inline float cos_(float x) { return std::cos(x); }
inline float sin_(float x) { return std::sin(x); }
inline float rsqrt_(float x) { return 1 / std::sqrt(x); }
template <class N> inline N load_fresh(const N* p) { return *p; }
template <class N> struct Four { N x[4]; };
template <class N> inline Four<N> load_four(const N* p) { Four<N> x; std::memcpy(&x, p, sizeof x); return x; }
inline unsigned load_relaxed(const unsigned* p) { return *p; }
inline unsigned load_acquire(const unsigned* p) { return *p; }
inline void store_relaxed(unsigned* p, unsigned x) { *p = x; got_on(); }
inline void store_release(unsigned* p, unsigned x) { *p = x; got_on(); }
inline void add_release(unsigned* p, unsigned x) { *p += x; got_on(); }
inline void add_relaxed(long long* p, long long x) { *p += x; }
inline long long to_fixed(float x) { return std::llrint(x); }

// A barrier of shared memory: complete when all have arrived and all bytes are there.
struct Barrier { int count = 0, left = 0, bytes = 0; unsigned phase = 0; };
static std::vector<Copies> copies;   // on their way
inline void settle(Barrier& b) {
  if (b.left == 0 && b.bytes == 0) b.left = b.count, b.phase ^= 1, got_on();
}
inline void start_barrier(Barrier& b, int count) { b = {count, count, 0, 0}; }
inline void publish_barriers() {}
inline void arrive(Barrier& b) { b.left--; settle(b); }
inline void expect(Barrier& b, int bytes) { b.bytes += bytes; b.left--; settle(b); }
inline void wait(Barrier& b, unsigned parity) { while (b.phase == parity) yield(); }
inline unsigned long long read_once() { return 0; }

template <bool> inline void bulk_copy(void* to, const void* from, int bytes, Barrier& b, unsigned long long) {
  std::memset(to, 0xff, bytes);
  copies.push_back({{{to, from, bytes}}, &b, false});
}
inline void copy16(void* to, const void* from) {
  std::memset(to, 0xff, 16);
  machine.now->asked.push_back({to, from, 16});
}
inline void arrive_when_copied(Barrier& b) {
  copies.push_back({std::move(machine.now->asked), &b, true});
  machine.now->asked.clear();
}
// Some of the copies arrive, in any order.
inline void deliver() {
  std::shuffle(copies.begin(), copies.end(), machine.random);
  size_t some = copies.size() / 2 + 1;
  for (; some > 0 && !copies.empty(); some--) {
    const Copies some_copies = std::move(copies.back());
    copies.pop_back();
    for (const Copy& c : some_copies.list) {
      std::memcpy(c.to, c.from, c.bytes);
      if (!some_copies.as_thread) some_copies.barrier->bytes -= c.bytes;
    }
    if (some_copies.as_thread) some_copies.barrier->left--;
    settle(*some_copies.barrier);
  }
}

#if LTE_ELEM != 32
inline elem element(unsigned pair, int i) { const unsigned short half = pair >> 16 * i; elem x; std::memcpy(&x, &half, 2); return x; }
inline unsigned x_bits(elem x) { unsigned short bits; std::memcpy(&bits, &x, 2); return bits; }
inline unsigned multiply_add(unsigned a, unsigned b, unsigned c) {
  unsigned x = 0;
  for (int i = 0; i < 2; i++)
    x |= x_bits(from_float(std::fma(to_float(element(a, i)), to_float(element(b, i)), to_float(element(c, i))))) << 16 * i;
  return x;
}
inline unsigned spread(unsigned x, int first) { return (x >> 8 * first & 255) | (x >> (8 * first + 8) & 255) << 16; }
inline void load_squares(unsigned (&x)[4], const void* row, bool transposed) {
  Warp& warp = warp_now();
  const int lane = machine.now->thread % 32;
  warp.rows[lane] = (const char*)row;
  warp_sync();
  for (int i = 0; i < 4; i++) {
    unsigned short pair[2];
    for (int j = 0; j < 2; j++) {
      const int r = transposed ? lane % 4 * 2 + j : lane / 4, c = transposed ? lane / 4 : lane % 4 * 2 + j;
      std::memcpy(&pair[j], warp.rows[i * 8 + r] + 2 * c, 2);
    }
    x[i] = pair[0] | (unsigned)pair[1] << 16;
  }
  warp_sync();
}
inline void load_matrices(unsigned (&x)[4], const void* row) { load_squares(x, row, false); }
inline void load_matrices_transposed(unsigned (&x)[4], const void* row) { load_squares(x, row, true); }
inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  Warp& warp = warp_now();
  const int lane = machine.now->thread % 32;
  for (int i = 0; i < 4; i++) warp.a[lane][i] = a[i];
  warp.b[lane][0] = b0, warp.b[lane][1] = b1;
  warp_sync();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const float x = to_float(element(warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2));
      c[i] = std::fma(x, to_float(element(warp.b[column * 4 + k % 8 / 2][k / 8], k % 2)), c[i]);
    }
  }
  warp_sync();
}
#endif
#include "tile.h"

inline void start_fiber();
// Runs a grid of threads; false if they hang.
inline bool run_grid(int grid, int threads, int team, unsigned seed) {
  copies.clear();
  machine.random.seed(seed);
  machine.grid = grid, machine.threads = threads, machine.team = team, machine.idle = 0, machine.hangs = false;
  machine.blocks.assign(grid, {});
  machine.fibers.clear();
  // Gigabytes of addresses, of which little is touched; they are given back, as a process of many kernels could else start
  // no other one.
  const size_t size = 256 << 10, bytes = size * grid * threads;
  char* stacks = (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) return false;
  for (int b = 0; b < grid; b++) {
    machine.blocks[b].index = b;
    machine.blocks[b].warps.resize(threads / 32);
    for (int t = 0; t < threads; t++) {
      auto fiber = std::make_unique<Fiber>();
      fiber->block = &machine.blocks[b], fiber->thread = t;
      getcontext(&fiber->context);
      fiber->context.uc_stack.ss_sp = stacks + size * machine.fibers.size(), fiber->context.uc_stack.ss_size = size;
      fiber->context.uc_link = nullptr;
      makecontext(&fiber->context, (void (*)())start_fiber, 0);
      machine.fibers.push_back(std::move(fiber));
    }
  }
  std::vector<int> order(machine.fibers.size());
  for (size_t i = 0; i < order.size(); i++) order[i] = i;
  int left = order.size();
  while (left > 0) {
    std::shuffle(order.begin(), order.end(), machine.random);
    for (int i : order) {
      Fiber& fiber = *machine.fibers[i];
      if (fiber.done) continue;
      machine.now = &fiber;
      if (!_setjmp(machine.scheduler)) {
        if (fiber.started) _longjmp(fiber.place, 1);
        fiber.started = true;
        setcontext(&fiber.context);
      }
      left -= machine.now->done;
    }
    deliver();
    if (++machine.idle > 1000) break;
  }
  machine.fibers.clear();
  munmap(stacks, bytes);
  return left == 0;
}
