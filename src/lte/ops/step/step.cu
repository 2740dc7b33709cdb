// One step of a whole decoder for T sequences, or T consecutive tokens of one (LTE_SEVERAL), in one persistent launch.
//
// Every multiprocessor runs one block, and all blocks wait for each other between the phases of a layer:
//
//   1  x = norm(residual); queries, keys and values
//   2  rotary embedding, new keys and values into the cache, attention: a block per sequence, head of keys and part of
//      the cache, the heads of queries that share the keys as the tokens of a product
//   3  output product
//   4  residual += output; x = norm(residual); which experts are on
//   5  gate, up and down of an equal share of the neurons that any token needs; the blocks' shares of the output are
//      added up in fixed point, where their order does not matter
//
// In a product each block takes an equal share of a matrix's rows, 16 at a time, and its warps share the columns.
// Weights do not depend on activations, so one warp of each block, the producer, does nothing but fetch what its block
// will read next, in the order of use, across phases and layers, through a ring of stages in shared memory. It runs
// ahead as far as the ring is long, also while the block waits for others, and stops only before the neurons of a layer
// whose routing is not known. Keys and values of earlier tokens come the same way.
//
// Of several tokens of one sequence each is a row as other sequences' tokens are. They share a cache, from which all take
// the tokens before the first of them; what the pass itself adds, a row takes from where the projections left it. The last
// of them may begin after their positions: they are none, and nothing is read or computed for them alone. Room for tokens
// that are none costs time all the same. So a pass may be launched as kernels of several sizes one after the other, of which
// the smallest that has room does all, and the others end at once.
//
// A multiprocessor keeps little more than 100 kB of instructions at hand, and each layer runs through all of the code:
// loops that are not rolled out where it does not pay are faster.
//
// Shapes, as macros that begin with LTE_: T sequences or tokens, D hidden size, HQ heads of queries, HKV of keys, HD their size, F neurons, E experts
// (0: a dense model), S neurons of an expert, V vocabulary, P blocks.
//
// Weights, of attention, FFN and head each, are elements, or have 8 bits and a scale for each output, or 4 bits in groups
// of GROUP along the input (BITS of 8 and 4). They lie in shared memory as they lie in global memory: rows of slabs, which
// fill a stage; behind the half bytes of a slab follow its pairs of scale and zero. For the transposed down projection
// groups run along the neurons: a stage of pairs comes before the tiles of each group.

constexpr int T = LTE_T, D = LTE_D, HQ = LTE_HQ, HKV = LTE_HKV, HD = LTE_HD, F = LTE_F, E = LTE_E, S = LTE_S, V = LTE_V;
constexpr int ROTARY = LTE_ROTARY, ACTIVATION = LTE_ACTIVATION, THREADS = LTE_THREADS;
constexpr int SPLIT_KEYS = LTE_SPLIT_KEYS, MAX_SHARE = LTE_MAX_SHARE, FETCHERS = LTE_FETCHERS, P = LTE_BLOCKS;
constexpr bool GATED = LTE_GATED, NORM_PLUS_ONE = LTE_NORM_PLUS_ONE;
// What the plan has, so that there is no code for what it has not: norms of heads and behind a half layer, a bias of the
// down projection, bounded scores, and caches that begin anew at their end.
constexpr bool HEAD_NORMS = LTE_HEAD_NORMS, POST_NORMS = LTE_POST_NORMS, DOWN_BIAS = LTE_DOWN_BIAS, CAPPED = LTE_CAPPED;
constexpr bool RINGS = LTE_RINGS;

#ifdef LTE_ON_CPU
#include "cuda_on_cpu.h"
#else
#include "device.h"
#endif

typedef unsigned int u32;

constexpr int WARPS = THREADS / 32;           // that compute; FETCHERS more fetch
constexpr int SIZE = sizeof(elem);
constexpr int ROWS = 16;                      // of a stage; each fetching warp asks for four, one after the other
constexpr int NATIVE = 8 * SIZE;              // bits
constexpr int ATTENTION_BITS = LTE_ATTENTION_BITS > 0 ? LTE_ATTENTION_BITS : NATIVE;
constexpr int FFN_BITS = LTE_FFN_BITS > 0 ? LTE_FFN_BITS : NATIVE, HEAD_BITS = LTE_HEAD_BITS > 0 ? LTE_HEAD_BITS : NATIVE;
constexpr int GROUP = LTE_GROUP;
#ifndef LTE_EVERY_LANE                        // for racecheck, which sees no order by a thread that arrives for its warp
#define LTE_EVERY_LANE 0
#endif
constexpr int PITCH = 1024 + 16;              // bytes from row to row: eight rows lie in eight different banks
DEVICE constexpr int slab_of(int bits) { return bits == NATIVE ? 1024 / SIZE : 1024; }   // columns of a stage
// Of the first columns of a slab, and of a whole row.
DEVICE constexpr int slab_bytes(int bits, int columns) {
  return columns * bits / 8 + (bits == 4 ? (columns / GROUP * 2 * SIZE + 15) / 16 * 16 : 0);
}
DEVICE constexpr int row_bytes(int bits, int columns) {
  return columns / slab_of(bits) * slab_bytes(bits, slab_of(bits)) + slab_bytes(bits, columns % slab_of(bits));
}
constexpr int PAIRS_BYTES = (D + 511) / 512 * 512 * 2 * SIZE;    // of all columns, as whole rows of a stage
constexpr int DOWN_SLAB = slab_of(FFN_BITS);
constexpr int UNIT = FFN_BITS == 4 ? 2 : 1;   // neurons that stay together: two half bytes of a pair share their scale
constexpr int NQKV = (HQ + 2 * HKV) * HD;
constexpr int OUT = HQ * HD;
constexpr int G = HQ / HKV;                   // heads of queries for each head of keys
constexpr int PER_TILE = GATED ? 8 : 16;      // neurons in a tile of gate and up
constexpr int XS = (D > OUT ? D : OUT) + 16 / SIZE;      // pitch of the inputs of a product
constexpr int HS = (MAX_SHARE + 15) / 16 * 16 + 16 / SIZE;
// Two keys that follow each other lie together in a stage. As rows of a tile they are eight apart, so that the eight rows of
// a load lie in different banks.
constexpr int HEAD_BYTES = HD * SIZE, PAIR_PITCH = 2 * HEAD_BYTES + 16;
constexpr int QS = HD + 16 / SIZE, WS = 16 + 16 / SIZE;                // pitches of queries, and of the weights of keys
constexpr int KEYS_THAT_FIT = ROWS * PITCH / PAIR_PITCH / 8 * 16;
constexpr int MOST_KEYS = 16 * WARPS < 32 * FETCHERS ? 16 * WARPS : 32 * FETCHERS;
// Of a stage: a tile of 16 for each warp and a key for each lane that fetches, at most.
constexpr int KEYS = KEYS_THAT_FIT < MOST_KEYS ? KEYS_THAT_FIT : MOST_KEYS;
constexpr int PARTS = P / (T * HKV) > 1 ? P / (T * HKV) : 1;          // of a cache, at most
constexpr int UNITS = T * HKV * PARTS;
constexpr int PER_THREAD = (E + THREADS - 1) / THREADS > 0 ? (E + THREADS - 1) / THREADS : 1;   // experts
// Sums in fixed point are in units of 1 / FIXED, and what a block adds is MOST at most: the sum of all then fits. A sum that
// is half of that or more was no finite number.
constexpr float FIXED = 4294967296.0f, MOST = 1 << 23;
static_assert(P <= 256, "sums in fixed point");
constexpr int HALF = ROTARY / 2 > 0 ? ROTARY / 2 : 1;
constexpr int NORM_REGISTERS = 16;            // for the residual of the tokens that a norm takes at once
static_assert(D % 32 == 0 && OUT % 32 == 0 && HD % 16 == 0 && HD <= 256 && ROTARY <= HD, "shapes");
static_assert(HQ % HKV == 0 && G <= 8 && T >= 1 && T <= 8 && (E == 0 || F == E * S) && E < 65536, "shapes");
static_assert(FFN_BITS != 4 || (S % UNIT == 0 && F % GROUP == 0 && D % GROUP == 0), "groups");
static_assert(ATTENTION_BITS != 4 || (D % GROUP == 0 && OUT % GROUP == 0), "groups");
static_assert(GROUP % 32 == 0 && 1024 % GROUP == 0 && (1024 / WARPS % GROUP == 0 || GROUP % (1024 / WARPS) == 0), "groups");
static_assert(THREADS % 32 == 0 && THREADS >= ROWS * T && ROWS % FETCHERS == 0, "threads");

struct Layer {
  const void *q, *k, *v, *out, *gate, *up, *down;
  const elem *norm1, *q_bias, *k_bias, *v_bias, *q_norm, *k_norm, *out_bias, *post1;
  const elem *norm2, *router, *gate_bias, *up_bias, *down_bias, *post2;
  const float* router_bias;
  const float* scales;      // of 8 bits: of the outputs of q, k, v, out, gate, up and down in turn, as far as they have any
  const void* down_pairs;   // of 4 bits: [F / GROUP, PAIRS_BYTES]
  elem *keys, *values;      // [T, HKV, slots, HD]; of several tokens of one sequence [1, HKV, slots, HD]
  float threshold;          // of the logits
  int window;               // tokens that see each other, 0 for all
  int rope;
  int slots, shift;         // of the cache: position p lies in slot (p + shift) % slots
};

struct Args {
  const Layer* layers;
  const long long *token, *position, *start;  // [T]; position in the cache; start: the first that is no padding, after it: none
  const elem *embedding, *final_norm, *head_bias;
  const void* head;
  const float* head_scales;   // [V], of 8 bits
  const float* ropes;         // [num_ropes, 1 + HALF]: a factor of cosines and sines, and an angle per position
  float* logits;              // [T, V]
  // Scratch: of any content.
  float *turns;               // [num_ropes, T, 2, HALF] cosines and sines
  float *residual;            // [2, T, D]
  float *qkv;                 // [T, NQKV]
  float *attended;            // [T, OUT]
  long long *sums;            // [3, T, D] what half a layer adds to the residual, in fixed point: attention, FFNs in turn
  float *splits;              // [T * HKV, P, G, HD + 2]
  u32 *masks;                 // [E]: the launch's tag, and a bit for each token that the expert is on for
  u32 *flags;                 // [P] of the barriers of a few blocks, zero at first
  u32 *counters;              // [3]: barriers, launches, and arrivals at barriers of all blocks; zero at first
  long long* trace;           // [P, TRACE]
  int num_layers, num_ropes;
  int least, larger;          // tokens of a pass that no smaller kernel has room for; whether there is a larger kernel
  float eps, scaling, embedding_scale, attention_cap, logit_cap;
};

struct Working {
  Barrier routed;
  alignas(16) elem xs[T][XS];
  alignas(16) elem h[T][HS];
  float red[2][WARPS][ROWS][T > 2 ? T : 2];
  float sums[2][WARPS][T];
  Layer layers[2];            // this one and the next
  alignas(16) elem q[G][QS];
  alignas(16) elem weights[WARPS][8][WS];   // of keys, for each head of queries
  alignas(16) char newest[2][8][PAIR_PITCH];   // the new tokens' keys and values, as a tile of which few rows count
  float turned[WARPS][HD];
  float stats[2][WARPS][8];   // highest score, sum
  float values[WARPS][G][HD];
  unsigned short experts[E > 0 ? E : 1];
  unsigned char tokens[E > 0 ? E : 1];  // bits of the experts in the list
  int counts[PER_THREAD][WARPS];
  int first, count;           // this block's share of the active neurons
  int position[T], start[T];
#if LTE_SEVERAL
  int rows;                   // tokens that are some
#endif
};

constexpr int STAGES = (LTE_SHARED_BYTES - (int)sizeof(Working) - 128) / (ROWS * PITCH + 2 * (int)sizeof(Barrier));
static_assert(STAGES >= 2, "shared memory is too small");
struct Shared : Working {
  alignas(128) char ring[STAGES][ROWS * PITCH];
  Barrier full[STAGES], empty[STAGES];
};
static_assert(sizeof(Shared) <= LTE_SHARED_BYTES, "shared memory");
static_assert(sizeof(Layer) == LTE_LAYER_BYTES && sizeof(Args) == LTE_ARGS_BYTES, "as the host fills them");

// The number of the activation in `lte.ops.activations.ACTIVATIONS`.
DEVICE float activate(float x) {
  if (ACTIVATION == 0) return x / (1 + exp_(-x));                                                                  // silu
  if (ACTIVATION == 1) return 0.5f * x * (1 + erf_(x * 0.70710678f));                                              // gelu
  if (ACTIVATION == 2) return 0.5f * x * (1 + tanh_(0.79788456f * (x + 0.044715f * x * x * x)));             // gelu_tanh
  return x > 0 ? (ACTIVATION == 3 ? x : x * x) : 0;                                                         // relu, relu2
}
static_assert(ACTIVATION >= 0 && ACTIVATION <= 4, "activation");

DEVICE long long fixed_of(float x) { return to_fixed((x < MOST ? x > -MOST ? x : -MOST : MOST) * FIXED); }   // of NaN: MOST
DEVICE float from_fixed(long long sum) {
  const float x = sum * (1 / FIXED);
  return x < MOST / 2 && x > -MOST / 2 ? x : INFINITY_ - INFINITY_;
}

DEVICE float norm_weight(elem w) { return NORM_PLUS_ONE ? 1 + to_float(w) : to_float(w); }

DEVICE float warp_sum(float x) {
  for (int o = 16; o; o >>= 1) x += shuffle_xor(x, o);
  return x;
}

DEVICE int rows_of(const Working& s) {
#if LTE_SEVERAL
  return s.rows;
#else
  return T;
#endif
}

// A share of n things for this block.
DEVICE int share_begin(int n) {
  const int b = blockIdx.x, more = n % P;
  return n / P * b + (b < more ? b : more);
}
DEVICE int share_end(int n) { return share_begin(n) + n / P + ((int)blockIdx.x < n % P); }

// Blocks add their shares of the output in different orders of columns, as each number is added to by one at a time.
DEVICE int first_slab() { return (int)blockIdx.x % ((D + DOWN_SLAB - 1) / DOWN_SLAB) * DOWN_SLAB; }
DEVICE int next_slab(int c) { return c + DOWN_SLAB < D ? c + DOWN_SLAB : 0; }

// Keys [begin, end) that the token t sees of one head, and which of how many parts that is.
struct Part { int t, head, split, splits, begin, end; };

// False if there are fewer parts, or no such token.
DEVICE bool part_of(const Shared& s, const Layer& l, int unit, Part& p) {
  p.t = unit % T, p.head = unit / T % HKV, p.split = unit / (T * HKV);
  if (p.t >= rows_of(s)) return false;
  const int start = s.start[p.t], end = s.position[p.t] + 1;
  const int low = l.window > 0 && end - l.window > start ? end - l.window : start, n = end - low;
  if (n <= 0) return false;   // no token: neither a division by zero nor a wait for parts that nobody has
  int splits = (n + SPLIT_KEYS - 1) / SPLIT_KEYS;
  if (splits > PARTS) splits = PARTS;
  const int length = (n + splits - 1) / splits;
  p.splits = (n + length - 1) / length;
  p.begin = low + p.split * length;
  p.end = p.begin + length < end ? p.begin + length : end;
  return p.split < p.splits;
}
// This block's next unit that there is a part for, from `unit` on; of several tokens later ones may have none.
DEVICE bool next_part(const Shared& s, const Layer& l, int& unit, Part& p) {
#pragma unroll 1
  for (; unit < UNITS; unit += P) {
    if (part_of(s, l, unit, p)) return true;
    if (!LTE_SEVERAL) break;
  }
  return false;
}
DEVICE int slot_of(const Layer& l, int position) {
  const int at = position + l.shift;
  return at < l.slots ? at : RINGS ? at % l.slots : 0;
}

// Which of the caches is a token's, and where a part's keys end that were there before this launch.
DEVICE constexpr int sequence_of(int t) { return LTE_SEVERAL ? 0 : t; }
DEVICE int end_of_old(const Part& p, int fresh) {
  const int end = p.end > fresh ? fresh : p.end;
  return LTE_SEVERAL && end < p.begin ? p.begin : end;
}

// This block's share of the neurons that any token needs.
DEVICE void share_neurons(Shared& s, int n) {
  s.first = share_begin(n / UNIT) * UNIT;
  s.count = share_end(n / UNIT) * UNIT - s.first;
}
DEVICE int neuron_of(const Shared& s, int i) {
  const int rank = s.first + i;
  return E == 0 ? rank : s.experts[rank / S] * S + rank % S;
}

// How many of the next neurons, 16 at most, belong to the same group as the first; of a warp's lanes each looks at one.
DEVICE int run_of_group(const Shared& s, int j, int group) {
  const int i = threadIdx.x % 32;
  return popcount(vote(i < ROWS && j + i < s.count && neuron_of(s, j + i) / GROUP == group));
}

// A warp that fetches. Its first lanes have a row each.
struct Producer {
  const Args& a;
  Shared& s;
  int warp, lane, row, stage = 0;   // row of a stage
  u32 parity = 1;
#if LTE_BULK
  const unsigned long long once = read_once();
#endif

  DEVICE Producer(const Args& a, Shared& s) : a(a), s(s), warp((threadIdx.x - THREADS) / 32), lane(threadIdx.x % 32) {
    row = row_of<ROWS / FETCHERS>();
  }
  template <int EACH> DEVICE int row_of() const { return lane < EACH ? warp * EACH + lane : EACH * FETCHERS; }

  // Rows of a stage, some for each warp; the first lanes of a warp know where theirs comes `from`.
  DEVICE void fetch(const void* from, int rows, int bytes) {
    wait(s.empty[stage], parity);
#if LTE_BULK
    if (row == 0) expect(s.full[stage], rows * bytes);
    if (row < rows) bulk_copy<false>(s.ring[stage] + row * PITCH, from, bytes, s.full[stage], once);
#else
    // All lanes share the warp's rows, 16 bytes at a time.
#pragma unroll 1
    for (int i = 0, first = warp * (ROWS / FETCHERS); i < ROWS / FETCHERS && first + i < rows; i++)
      copy_line(s.ring[stage] + (first + i) * PITCH, shuffle((const char*)from, i), bytes);
    arrive_when_copied(s.full[stage]);
#endif
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  // The keys, or values, [from, from + n) of a head, by pairs: a copy of one would take longer than its bytes.
  DEVICE void fetch_keys(const Layer& l, const elem* cache, int from, int n) {
    constexpr int EACH = (KEYS / 2 + FETCHERS - 1) / FETCHERS;
    wait(s.empty[stage], parity);
#if LTE_BULK
    const int pair = row_of<EACH>(), k = 2 * pair;
    char* to = s.ring[stage] + pair * PAIR_PITCH;
    if (pair == 0) expect(s.full[stage], n * HEAD_BYTES);
    if (k < n) {
      const int first = slot_of(l, from + k), second = k + 1 < n ? slot_of(l, from + k + 1) : -1;
      const bool together = second == first + 1;
      bulk_copy<true>(to, cache + (size_t)first * HD, together ? 2 * HEAD_BYTES : HEAD_BYTES, s.full[stage], once);
      if (second >= 0 && !together)
        bulk_copy<true>(to + HEAD_BYTES, cache + (size_t)second * HD, HEAD_BYTES, s.full[stage], once);
    }
#else
#pragma unroll 1
    for (int k = 2 * EACH * warp; k < 2 * EACH * (warp + 1) && k < n; k++)
      copy_line(s.ring[stage] + k / 2 * PAIR_PITCH + k % 2 * HEAD_BYTES, (const char*)(cache + (size_t)slot_of(l, from + k) * HD),
                HEAD_BYTES);
    arrive_when_copied(s.full[stage]);
#endif
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
#if !LTE_BULK
  DEVICE void copy_line(char* to, const char* from, int bytes) {
    for (int at = lane * 16; at < bytes; at += 32 * 16) copy16(to + at, from + at);
  }
#endif
  template <int BITS> DEVICE void tile(const char* from, int rows, int columns) {
    constexpr int SLAB = slab_of(BITS);
#pragma unroll 1
    for (int c = 0; c < columns; c += SLAB, from += slab_bytes(BITS, SLAB))
      fetch(from, rows, slab_bytes(BITS, columns - c < SLAB ? columns - c : SLAB));
  }
  template <int BITS> DEVICE void matrix(const void* base, int n, int columns) {
    const int end = share_end(n);
#pragma unroll 1
    for (int r = share_begin(n); r < end; r += ROWS)
      tile<BITS>((const char*)base + (size_t)(r + row) * row_bytes(BITS, columns), end - r < ROWS ? end - r : ROWS, columns);
  }
  DEVICE void queries_keys_values(const Layer& l) {
    constexpr int BYTES = row_bytes(ATTENTION_BITS, D);
    const int end = share_end(NQKV);
#pragma unroll 1
    for (int r = share_begin(NQKV); r < end; r += ROWS) {
      const int i = r + row;
      const char* from = i < OUT ? (const char*)l.q + (size_t)i * BYTES
                         : i < OUT + HKV * HD ? (const char*)l.k + (size_t)(i - OUT) * BYTES
                                              : (const char*)l.v + (size_t)(i - OUT - HKV * HD) * BYTES;
      tile<ATTENTION_BITS>(from, end - r < ROWS ? end - r : ROWS, D);
    }
  }
  // Keys and values of the tokens before the new ones, a stage of each in turn.
  DEVICE void cache(const Layer& l) {
    Part p;
#pragma unroll 1
    for (int unit = blockIdx.x; next_part(s, l, unit, p); unit += P) {
      const int end = end_of_old(p, s.position[sequence_of(p.t)]);
      const size_t base = (size_t)(sequence_of(p.t) * HKV + p.head) * l.slots * HD;
#pragma unroll 1
      for (int from = p.begin; from < end; from += KEYS) {
        const int n = end - from < KEYS ? end - from : KEYS;
        fetch_keys(l, l.keys + base, from, n);
        fetch_keys(l, l.values + base, from, n);
      }
    }
  }
  DEVICE void run() {
#pragma unroll 1
    for (int i = 0; i < a.num_layers; i++) {
      const Layer& l = a.layers[i];
      queries_keys_values(l);
      cache(l);
      matrix<ATTENTION_BITS>(l.out, D, OUT);
      const char *gate = (const char*)l.gate, *up = (const char*)l.up, *down = (const char*)l.down;
      const char* pairs = (const char*)l.down_pairs;
      if (E > 0) {
        matrix<NATIVE>(l.router, E, D);
        wait(s.routed, i & 1);
      }
      const int n = s.count;
#pragma unroll 1
      for (int j = 0; j < n; j += PER_TILE) {
        // Gate and up of eight neurons, or up of sixteen.
        const int left = n - j < PER_TILE ? n - j : PER_TILE, k = row % PER_TILE;
        tile<FFN_BITS>((GATED && row < PER_TILE ? gate : up) + (size_t)neuron_of(s, j + (k < left ? k : 0)) * row_bytes(FFN_BITS, D),
                       GATED ? ROWS : left, D);
      }
      // Rows of the down projection have no pairs of their own.
      constexpr int SLAB = DOWN_SLAB;
#pragma unroll 1
      for (int k = 0, c = first_slab(); k < D; k += SLAB, c = next_slab(c)) {
        const int columns = D - c < SLAB ? D - c : SLAB;
        int group = -1;
        for (int j = 0, left; j < n; j += left) {
          left = n - j < ROWS ? n - j : ROWS;
          if (FFN_BITS == 4) {
            if (neuron_of(s, j) / GROUP != group) {
              group = neuron_of(s, j) / GROUP;
              const char* from = pairs + (size_t)group * PAIRS_BYTES + c * 2 * SIZE;
              fetch(from + row * 1024, (columns * 2 * SIZE + 1023) / 1024, 1024);
            }
            left = run_of_group(s, j, group);
          }
          const size_t at = (size_t)neuron_of(s, j + (row < left ? row : 0)) * D + c;
          fetch(down + at * FFN_BITS / 8, left, columns * FFN_BITS / 8);
        }
      }
    }
    matrix<HEAD_BITS>(a.head, V, D);
  }
};

struct Step {
  const Args& a;
  Shared& s;
  int tid, lane, warp, stage = 0, buffer = 0, sums_buffer = 0, event = 0;
  u32 parity = 0, goal, tag;

  DEVICE Step(const Args& a, Shared& s) : a(a), s(s), tid(threadIdx.x), lane(tid % 32), warp(tid / 32) {
    goal = load_relaxed(a.counters);
    tag = load_relaxed(a.counters + 1) + 1;
  }

  DEVICE void stamp() {
#ifdef LTE_TRACE
    if (tid == 0 && event < LTE_TRACE) a.trace[blockIdx.x * LTE_TRACE + event++] = clock_ns();
#endif
  }

  // All blocks wait for each other: what a block wrote before, all read afterwards.
  DEVICE void grid_sync() {
    goal++;
    team_sync();
    if (tid == 0) {
      delay(goal);
      add_release(a.counters + 2, 1);
      stamp();
      for (u32 tries = 0; (int)(load_acquire(a.counters + 2) - goal * P) < 0;) spin(tries);
      delay(~goal);
    }
    team_sync();
    stamp();
  }
  // The same for `n` blocks, `first` and each `apart` from the one before; this block is one of them.
  DEVICE void sync(int first, int apart, int n) {
    team_sync();
    if (tid == 0) {
      delay(goal);
      store_release(a.flags + blockIdx.x, goal + 1);
    }
    for (int p = tid; p < n; p += THREADS)
      for (u32 tries = 0; (int)(load_acquire(a.flags + first + p * apart) - goal - 1) < 0;) spin(tries);
    team_sync();
  }

  // Sums over the block. One barrier, as buffers alternate: who writes one anew has passed that of the other.
  template <int N> DEVICE void team_sums(float (&x)[N]) {
    sums_buffer ^= 1;
#pragma unroll
    for (int t = 0; t < N; t++) {
      x[t] = warp_sum(x[t]);
      if (lane == 0) s.sums[sums_buffer][warp][t] = x[t];
    }
    team_sync();
#pragma unroll
    for (int t = 0; t < N; t++) {
      x[t] = 0;
      for (int i = 0; i < WARPS; i++) x[t] += s.sums[sums_buffer][i][t];
    }
  }

  // residual = before + addend, before + norm(addend), or the token's embedding; then s.xs = norm(residual). The addend is
  // in fixed point.
  DEVICE void add_and_norm(const float* before, const long long* sums_of_half, const elem* post, float* after, const elem* weight) {
    constexpr int N = (D / 4 + THREADS - 1) / THREADS;   // fours of columns of a thread
    constexpr int AT_ONCE = 4 * N * T <= NORM_REGISTERS ? T : 8 * N <= NORM_REGISTERS ? NORM_REGISTERS / (4 * N) : 1;   // tokens
    // All loads at once, before anything waits for one, and of the next tokens while the sums of these are shared.
    Four<elem> w[N];
    Four<float> old[AT_ONCE][N];
    Four<long long> fixed[AT_ONCE][N];
    const auto load = [&](int t0) {
#pragma unroll
      for (int i = 0; i < N; i++) {
        const int c = column_of(i) < D ? column_of(i) : 0;
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
          const int t = t0 + k < T ? t0 + k : 0;
          if (before != nullptr) old[k][i] = load_four(before + t * D + c), fixed[k][i] = load_four(sums_of_half + t * D + c);
        }
      }
    };
#pragma unroll
    for (int i = 0; i < N; i++) w[i] = load_four(weight + (column_of(i) < D ? column_of(i) : 0));
    load(0);
#pragma unroll 1
    for (int t0 = 0; t0 < rows_of(s); t0 += AT_ONCE) {
      float x[AT_ONCE][N][4], sums[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++)
#pragma unroll
        for (int i = 0; i < N; i++) {
          const bool mine = t0 + k < T && column_of(i) < D;
          if (before == nullptr) {
            const elem* row = a.embedding + (mine ? (size_t)a.token[t0 + k] * D + column_of(i) : 0);
            for (int j = 0; j < 4; j++) old[k][i].x[j] = 0, x[k][i][j] = to_float(from_float(to_float(row[j]) * a.embedding_scale));
          } else {
            for (int j = 0; j < 4; j++) x[k][i][j] = from_fixed(fixed[k][i].x[j]);
          }
          for (int j = 0; j < 4; j++)
            if (!mine) x[k][i][j] = old[k][i].x[j] = 0;
        }
      if (POST_NORMS && post != nullptr) {
        square_sums<AT_ONCE, N>(x, sums);
#pragma unroll
        for (int i = 0; i < N; i++)
          if (column_of(i) < D) {
            const Four<elem> factor = load_four(post + column_of(i));
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++)
              for (int j = 0; j < 4; j++) x[k][i][j] *= rsqrt_(sums[k] / D + a.eps) * norm_weight(factor.x[j]);
          }
      }
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++)
#pragma unroll
        for (int i = 0; i < N; i++)
          for (int j = 0; j < 4; j++) x[k][i][j] += old[k][i].x[j];
      if (AT_ONCE < T && t0 + AT_ONCE < rows_of(s)) load(t0 + AT_ONCE);
      square_sums<AT_ONCE, N>(x, sums);
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        const float r = rsqrt_(sums[k] / D + a.eps);
#pragma unroll
        for (int i = 0; i < N; i++) {
          const int t = t0 + k, c = column_of(i);
          if (t >= T || c >= D) continue;
          // The other buffer: others still read this one.
          if (after != nullptr && c / 4 % P == (int)blockIdx.x)
            for (int j = 0; j < 4; j++) after[t * D + c + j] = x[k][i][j];
          Four<elem> y;
          for (int j = 0; j < 4; j++) y.x[j] = from_float(x[k][i][j] * r * norm_weight(w[i].x[j]));
          *(Four<elem>*)&s.xs[t][c] = y;
        }
      }
    }
    team_sync();
  }
  DEVICE int column_of(int i) const { return (i * THREADS + tid) * 4; }
  template <int K, int N> DEVICE void square_sums(const float (&x)[K][N][4], float (&sums)[K]) {
#pragma unroll
    for (int k = 0; k < K; k++) {
      sums[k] = 0;
#pragma unroll
      for (int i = 0; i < N; i++)
        for (int j = 0; j < 4; j++) sums[k] += x[k][i][j] * x[k][i][j];
    }
    team_sums(sums);
  }

  DEVICE const char* next_stage() {
    wait(s.full[stage], parity);
    return s.ring[stage];
  }
  DEVICE void release() {
    warp_sync();
    if (LTE_EVERY_LANE || lane == 0) arrive(s.empty[stage]);
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }

  // Sixteen rows of weights times the inputs [T][pitch], the sum over this warp's columns of each slab.
  template <int BITS> DEVICE void tile_dot(const elem* inputs, int pitch, int columns, Tile& sum) {
    constexpr int SLAB = slab_of(BITS), SLICE = SLAB / WARPS;
    clear(sum);
#pragma unroll 1
    for (int c = 0; c < columns; c += SLAB) {
      const char* weights = next_stage();
      const int first = warp * SLICE, width = columns - c - first;
      const elem* x = inputs + c + first;
      if (width > 0) {
        if constexpr (BITS == NATIVE) tile_product<SLICE, PITCH>(sum, weights + first * SIZE, x, pitch, width);
        else if constexpr (BITS == 8) bytes_product<SLICE, PITCH>(sum, weights + first, x, pitch, width);
        else {
          const char* pairs = weights + (columns - c < SLAB ? columns - c : SLAB) / 2 + first / GROUP * sizeof(Pair);
          half_bytes_product<SLICE, PITCH, GROUP>(sum, weights + first / 2, pairs, x, pitch, width);
        }
      }
      release();
    }
  }
  // Adds up the tiles of all warps: afterwards `total(row, token)` gives a sum. One barrier; buffers alternate.
  DEVICE void share_tile(const Tile& sum) {
    buffer ^= 1;
    store_tile<T, (T > 2 ? T : 2)>(sum, &s.red[buffer][warp][0][0]);
    team_sync();
  }
  DEVICE float total(int row, int t) const {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += s.red[buffer][w][row][t];
    return sum;
  }

  // The product of s.xs with this block's share of a matrix's rows: emit(row, token, sum + bias(row)).
  template <int BITS, class Bias, class Emit>
  DEVICE void matrix(int n, int columns, const float* scales, Bias bias, Emit emit) {
    const int end = share_end(n), row = tid / T, t = tid % T;
#pragma unroll 1
    for (int r = share_begin(n); r < end; r += ROWS) {
      const bool mine = row < ROWS && r + row < end && t < rows_of(s);
      const float b = mine ? bias(r + row) : 0, scale = BITS == 8 && mine ? scales[r + row] : 1;
      Tile sum;
      tile_dot<BITS>(&s.xs[0][0], XS, columns, sum);
      share_tile(sum);
      if (mine) emit(r + row, t, total(row, t) * scale + b);
    }
  }

  // A head of queries, keys or values of the new token into `to`, by one warp: its norm and its rotation, if there are.
  DEVICE void turn_head(const float* from, const elem* norm, const float* turn, elem* to) {
    constexpr int N = (HD + 31) / 32;
    float x[N], cosine[N], sine[N], squares = 0, *staged = s.turned[warp];
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int d = i * 32 + lane;
      const bool turns = turn != nullptr && d < ROTARY;
      x[i] = d < HD ? load_fresh(from + d) : 0;
      cosine[i] = turns ? load_fresh(turn + d % HALF) : 1;
      sine[i] = turns ? load_fresh(turn + HALF + d % HALF) : 0;
    }
#pragma unroll
    for (int i = 0; i < N; i++) squares += x[i] * x[i];
    const float r = !HEAD_NORMS || norm == nullptr ? 1 : rsqrt_(warp_sum(squares) / HD + a.eps);
    warp_sync();
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int d = i * 32 + lane;
      if (HEAD_NORMS && norm != nullptr && d < HD) x[i] *= r * norm_weight(norm[d]);
      if (d < HD) staged[d] = x[i];
    }
    warp_sync();
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int d = i * 32 + lane;
      const float other = d >= ROTARY ? 0 : d < HALF ? -staged[d + HALF] : staged[d - HALF];
      if (d < HD) to[d] = from_float(x[i] * cosine[i] + other * sine[i]);
    }
  }

  DEVICE void attention(const Layer& l) {
    Part p;
    int unit = blockIdx.x;
#pragma unroll 1
    for (bool first = true;; first = false, unit += P) {
      const bool any = next_part(s, l, unit, p);
      if (first) grid_sync();
      if (!any) break;
      attend(l, p);
    }
  }

  // What a warp knows of the heads lane % 4 * 2 and + 1 of queries: the highest score, the sum of weights in this lane,
  // and the values so far.
  struct Attended { float top[2], sum[2]; Columns<HD> values; };

  // The key or value of the new token k of a part.
  DEVICE elem* new_key(bool value, int k) { return (elem*)(s.newest[value][k / 2] + k % 2 * HEAD_BYTES); }

  DEVICE void attend(const Layer& l, const Part& p) {
    // Keys of the cache end with `old`; `news` are what this launch adds, and this token's own the last of them.
    const float *turn = ROTARY > 0 ? a.turns + (l.rope * T + p.t) * 2 * HALF : nullptr, *qkv = a.qkv + p.t * NQKV;
    const int position = s.position[p.t], old = end_of_old(p, LTE_SEVERAL ? s.position[0] : position);
    const bool newest = LTE_SEVERAL ? p.end > old : p.end == position + 1;
    const int news = LTE_SEVERAL ? p.end - old : newest, own = LTE_SEVERAL ? news - 1 : 0;
#pragma unroll 1
    for (int g = warp; g < G + (LTE_SEVERAL ? 2 * news : 2); g += WARPS)
      if (g < G || newest) {
        const bool query = g < G, value = LTE_SEVERAL ? !query && (g - G) % 2 : g == G + 1;
        const int k = LTE_SEVERAL && !query ? (g - G) / 2 : 0, back = LTE_SEVERAL && !query ? position - old - k : 0;
        const float* from = qkv + (query ? p.head * G + g : HQ + (value ? HKV : 0) + p.head) * HD - back * NQKV;
        turn_head(from, query ? l.q_norm : value ? nullptr : l.k_norm, value ? nullptr : turn - back * 2 * HALF,
                  query ? s.q[g] : new_key(value, k));
      }
    team_sync();
    if (LTE_SEVERAL ? p.end == position + 1 : newest)
      for (int d = tid; d < HD; d += THREADS) {
        const size_t at = ((size_t)(sequence_of(p.t) * HKV + p.head) * l.slots + slot_of(l, position)) * HD + d;
        l.keys[at] = new_key(0, own)[d];
        l.values[at] = new_key(1, own)[d];
      }

    Attended x;
    x.top[0] = x.top[1] = -INFINITY_, x.sum[0] = x.sum[1] = 0;
    clear(x.values);
    // The tiles of a stage go to the warps in turn, and the new tokens are a tile of their own.
    const int stages = (old - p.begin + KEYS - 1) / KEYS;
    int first = 0;
#pragma unroll 1
    for (int k = 0; k < stages + newest; k++) {
      const bool fetched = k < stages;
      const int left = old - p.begin - k * KEYS, n = !fetched ? LTE_SEVERAL ? news : 1 : left < KEYS ? left : KEYS;
      const int at = (warp + WARPS - first) % WARPS * 16, mine = n - at < 16 ? n - at : 16;
      const char* keys = fetched ? next_stage() : s.newest[0][0];
      if (mine > 0) weigh(keys + at / 2 * PAIR_PITCH, mine, x);
      if (fetched) release();
      const char* values = fetched ? next_stage() : s.newest[1][0];
      if (mine > 0)
        columns_product<HD, PAIR_PITCH, 8, HEAD_BYTES>(x.values, values + at / 2 * PAIR_PITCH, s.weights[warp][0], WS, mine);
      if (fetched) release();
      first = (first + (n + 15) / 16) % WARPS;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      for (int o = 4; o < 32; o <<= 1) x.sum[h] += shuffle_xor(x.sum[h], o);
      if (lane < 4) s.stats[0][warp][lane * 2 + h] = x.top[h], s.stats[1][warp][lane * 2 + h] = x.sum[h];
    }
    each_column<HD, G>(x.values, HD, [&](int d, int g, float y) { s.values[warp][g][d] = y; });
    team_sync();
#pragma unroll 1
    for (int i = tid; i < G * HD; i += THREADS) {
      const int g = i / HD, d = i % HD;
      float highest = -INFINITY_, weight = 0, value = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) highest = s.stats[0][w][g] > highest ? s.stats[0][w][g] : highest;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float factor = exp_(s.stats[0][w][g] - highest);
        weight += factor * s.stats[1][w][g];
        value += factor * s.values[w][g][d];
      }
      if (p.splits == 1) a.attended[p.t * OUT + p.head * G * HD + i] = value / weight;
      else {
        float* to = split_of(p.t * HKV + p.head, p.split, g);
        to[d] = value;
        if (d == 0) to[HD] = highest, to[HD + 1] = weight;
      }
    }
    // Another unit, or nothing, but the other blocks' parts of this head.
    team_sync();
    if (p.splits > 1) {
      sync(p.t + T * p.head, T * HKV, p.splits);
      combine(p.t, p.head, p.split, p.splits);
    }
  }

  // The weights of a tile of keys of which n count, for all heads: s.weights, and what was there before is scaled.
  DEVICE void weigh(const char* keys, int n, Attended& x) {
    Tile scores;
    clear(scores);
    tile_product<HD, PAIR_PITCH, G, HEAD_BYTES>(scores, keys, s.q[0], QS, HD);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float& y = scores.c[i];
      y *= a.scaling;
      if (CAPPED) y = a.attention_cap * tanh_(y / a.attention_cap);
      if (lane / 4 * 2 + i / 2 >= n) y = -INFINITY_;
    }
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float highest = scores.c[h] > scores.c[2 + h] ? scores.c[h] : scores.c[2 + h];
      for (int o = 4; o < 32; o <<= 1) {
        const float other = shuffle_xor(highest, o);
        highest = other > highest ? other : highest;
      }
      highest = x.top[h] > highest ? x.top[h] : highest;
      factor[h] = exp_(x.top[h] - highest);
      x.top[h] = highest, x.sum[h] *= factor[h];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float weight = exp_(scores.c[i] - x.top[i % 2]);
      x.sum[i % 2] += weight;
      s.weights[warp][lane % 4 * 2 + i % 2][lane / 4 + i / 2 * 8] = from_float(weight);
    }
#pragma unroll
    for (int k = 0; k < (HD + 15) / 16; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) x.values.c[k][i] *= factor[i % 2];
    warp_sync();
  }

  DEVICE float* split_of(int unit, int split, int g) const {
    return a.splits + (((size_t)unit * P + split) * G + g) * (HD + 2);
  }

  // Adds up all parts of a head's attention, each block for its share of the numbers, some lanes for each number.
  DEVICE void combine(int t, int head, int split, int splits) {
    constexpr int AT_ONCE = 4;
    int lanes = 1;
    while (lanes < splits && lanes < 32) lanes *= 2;
    const int begin = G * HD * split / splits, end = G * HD * (split + 1) / splits;
#pragma unroll 1
    for (int from = begin; from < end; from += THREADS / lanes) {
      const int i = from + tid / lanes, at = i < end ? i : begin;
      float top = -INFINITY_, weight = 0, value = 0;
#pragma unroll 1
      for (int p0 = tid % lanes; p0 < splits; p0 += AT_ONCE * lanes) {
        float tops[AT_ONCE], weights[AT_ONCE], values[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
          const int p = p0 + k * lanes;
          const float* part = split_of(t * HKV + head, p < splits ? p : p0, at / HD);
          tops[k] = load_fresh(part + HD);
          weights[k] = load_fresh(part + HD + 1);
          values[k] = load_fresh(part + at % HD);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
          if (p0 + k * lanes < splits) merge(top, weight, value, tops[k], weights[k], values[k]);
      }
#pragma unroll 1
      for (int o = lanes / 2; o; o >>= 1)
        merge(top, weight, value, shuffle_xor(top, o), shuffle_xor(weight, o), shuffle_xor(value, o));
      if (i < end && tid % lanes == 0) a.attended[t * OUT + head * G * HD + i] = value / weight;
    }
  }
  DEVICE static void merge(float& top, float& weight, float& value, float top2, float weight2, float value2) {
    const float highest = top2 > top ? top2 : top;
    if (highest == -INFINITY_) return;
    const float factor = exp_(top - highest), factor2 = exp_(top2 - highest);
    weight = weight * factor + weight2 * factor2;
    value = value * factor + value2 * factor2;
    top = highest;
  }

  DEVICE void output(const Layer& l) {
    constexpr int AT_ONCE = 8;
    const int n = rows_of(s) * OUT;
#pragma unroll 1
    for (int from = tid; from < n; from += AT_ONCE * THREADS) {
      float x[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) x[k] = load_fresh(a.attended + (from + k * THREADS < n ? from + k * THREADS : 0));
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        const int i = from + k * THREADS;
        if (i < n) s.xs[i / OUT][i % OUT] = from_float(x[k]);
      }
    }
    team_sync();
    matrix<ATTENTION_BITS>(D, OUT, l.scales + NQKV, [&](int r) { return l.out_bias == nullptr ? 0 : to_float(l.out_bias[r]); },
           [&](int r, int t, float sum) { a.sums[t * D + r] = fixed_of(sum); });
  }

  // Publishes which experts are on, finds this block's share of their neurons, and lets the producer go on.
  DEVICE void route(const Layer& l, int layer) {
    if (E == 0) return;
    const u32 mark = (tag * a.num_layers + layer) << 8;
    // Rounded as every other path rounds it, so that all decide alike.
    const int end = share_end(E);
#pragma unroll 1
    for (int r = share_begin(E); r < end; r += ROWS) {
      const bool mine = tid < ROWS && r + tid < end;
      const float bias = mine && l.router_bias != nullptr ? l.router_bias[r + tid] : 0;
      Tile sum;
      tile_dot<NATIVE>(&s.xs[0][0], XS, D, sum);
      share_tile(sum);
      if (mine) {
        u32 on = 0;
        for (int t = 0; t < rows_of(s); t++) on |= (u32)(to_float(from_float(total(tid, t))) + bias > l.threshold) << t;
        store_relaxed(a.masks + r + tid, mark | on);
      }
    }
    // In ascending order: a prefix sum over the masks, each of which arrives in its own time.
    u32 words[PER_THREAD], votes[PER_THREAD];
    bool all = false;
    for (u32 tries = 0; !all; spin(tries)) {
      all = true;
#pragma unroll
      for (int k = 0; k < PER_THREAD; k++) {
        const int e = k * THREADS + tid;
        words[k] = e < E ? load_relaxed(a.masks + e) : mark;
        all &= (words[k] & ~255u) == mark;
      }
    }
    warp_sync();
#pragma unroll
    for (int k = 0; k < PER_THREAD; k++) {
      votes[k] = vote((words[k] & 255) != 0);
      if (lane == 0) s.counts[k][warp] = popcount(votes[k]);
    }
    team_sync();
    int active = 0;
#pragma unroll
    for (int k = 0; k < PER_THREAD; k++) {
      int before = active;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        if (w < warp) before += s.counts[k][w];
        active += s.counts[k][w];
      }
      if (words[k] & 255) {
        const int i = before + popcount(votes[k] & ((1u << lane) - 1));
        s.experts[i] = (unsigned short)(k * THREADS + tid);
        s.tokens[i] = (unsigned char)words[k];
      }
    }
    team_sync();
    if (tid == 0) share_neurons(s, active * S);
    if (LTE_EVERY_LANE) team_sync();
    if (LTE_EVERY_LANE || tid == 0) arrive(s.routed);
    team_sync();
  }

  template <int BITS, int WIDTH, int N>
  DEVICE void add_rows(Columns<WIDTH>& sum, const char* weights, const Pair (&pairs)[N], const elem* h, int rows) {
    if constexpr (BITS == NATIVE) columns_product<WIDTH, PITCH>(sum, weights, h, HS, rows);
    else if constexpr (BITS == 8) bytes_columns<WIDTH, PITCH>(sum, weights, h, HS);
    else half_bytes_columns<WIDTH, PITCH>(sum, weights, pairs, h, HS, rows);
  }

  DEVICE void neurons(const Layer& l, int layer) {
    const int n = s.count, padded = (n + 15) / 16 * 16;
    const float *scales = l.scales + NQKV + D, *down_scales = scales + (GATED ? 2 : 1) * F;
#pragma unroll 1
    for (int i = tid; i < T * (padded - n); i += THREADS) s.h[i % T][n + i / T] = from_float(0);
#pragma unroll 1
    for (int j = 0; j < n; j += PER_TILE) {
      Tile sum;
      tile_dot<FFN_BITS>(&s.xs[0][0], XS, D, sum);
      share_tile(sum);
      const int i = j + tid / T, t = tid % T;
      if (tid / T < PER_TILE && i < n) {
        const int neuron = neuron_of(s, i);
        float up = total(GATED ? tid / T + PER_TILE : tid / T, t);
        if (FFN_BITS == 8) up *= scales[(GATED ? F : 0) + neuron];
        if (l.up_bias != nullptr) up += to_float(l.up_bias[neuron]);
        float h;
        if (GATED) {
          float gate = total(tid / T, t);
          if (FFN_BITS == 8) gate *= scales[neuron];
          if (l.gate_bias != nullptr) gate += to_float(l.gate_bias[neuron]);
          h = activate(gate) * up;
        } else {
          h = activate(up);
        }
        if (E > 0 && T > 1 && !(s.tokens[(s.first + i) / S] >> t & 1)) h = 0;
        s.h[t][i] = from_float(h);
      }
    }
    team_sync();
    long long* to = sums_of(layer);
    constexpr int SLAB = DOWN_SLAB, SLICE = SLAB / WARPS;
    Pair pairs[FFN_BITS == 4 ? SLICE / 8 : 1];   // of this lane's columns
#pragma unroll 1
    for (int k = 0, c = first_slab(); k < D; k += SLAB, c = next_slab(c)) {
      Columns<SLICE> sum;
      clear(sum);
      const int first = warp * SLICE;
      const bool mine = c + first < D;
      int group = -1;
#pragma unroll 1
      for (int j = 0, left; j < n; j += left) {
        left = ROWS;
        if (FFN_BITS == 4) {
          if (neuron_of(s, j) / GROUP != group) {
            group = neuron_of(s, j) / GROUP;
            const char* weights = next_stage();
#pragma unroll
            for (int i = 0; i < SLICE / 8; i++) {
              const int at = (first + i / 4 * 32 + lane / 4 * 4 + i % 4) * sizeof(Pair);
              pairs[i] = *(const Pair*)(weights + at / 1024 * PITCH + at % 1024);
            }
            release();
          }
          left = run_of_group(s, j, group);
        }
        const char* weights = next_stage();
        if (mine) add_rows<FFN_BITS>(sum, weights + first * FFN_BITS / 8, pairs, &s.h[0][j], FFN_BITS == 4 ? left : n - j);
        release();
      }
      if (mine)
        each_column<SLICE, T, FFN_BITS>(sum, D - c - first, [&](int column, int t, float y) {
          const int i = c + first + column;
          if (t >= rows_of(s)) return;
          if (FFN_BITS == 8) y *= down_scales[i];
          if (DOWN_BIAS && blockIdx.x == 0 && l.down_bias != nullptr) y += to_float(l.down_bias[i]);
          add_relaxed(to + t * D + i, fixed_of(y));
        });
    }
  }

  DEVICE long long* sums_of(int layer) const { return a.sums + (1 + (layer & 1)) * T * D; }
  DEVICE void clear_sums(int layer) {
    long long* to = sums_of(layer);
    const int end = share_end(T * D);
#pragma unroll 1
    for (int i = share_begin(T * D) + tid; i < end; i += THREADS) to[i] = 0;
  }
  DEVICE void fetch_layer(int layer) {
    constexpr int WORDS = sizeof(Layer) / 4;
    static_assert(WORDS <= 64 && WORDS <= THREADS, "a layer's arguments");
    if (layer < a.num_layers && tid < WORDS) ((u32*)&s.layers[layer & 1])[tid] = ((const u32*)(a.layers + layer))[tid];
  }

  // The new tokens' angles, for the attention of all layers.
  DEVICE void turn() {
    for (int i = blockIdx.x * THREADS + tid; i < a.num_ropes * T * HALF; i += P * THREADS) {
      const int t = i / HALF % T;
      const float* rope = a.ropes + i / (T * HALF) * (1 + HALF);
      const float angle = (s.position[t] - s.start[t]) * rope[1 + i % HALF];
      float* to = a.turns + i / HALF * 2 * HALF + i % HALF;
      to[0] = cos_(angle) * rope[0];
      to[HALF] = sin_(angle) * rope[0];
    }
  }

  DEVICE void run() {
    turn();
    fetch_layer(0);
    clear_sums(0);
    clear_sums(1);
    team_sync();
    int at = 1;  // which half of the residual is the newest
    stamp();
    // The first half of each layer is attention, the second the FFN; the last norm has neither.
#pragma unroll 1
    for (int half = 0;; half++) {
      const int i = half / 2;
      const bool ffn = half % 2 != 0, last = i == a.num_layers;
      const Layer &l = s.layers[i & 1], &before = s.layers[(i & 1) ^ 1];
      add_and_norm(half > 0 ? a.residual + at * T * D : nullptr, ffn ? a.sums : sums_of(i - 1),
                   ffn ? l.post1 : half > 0 ? before.post2 : nullptr, last ? nullptr : a.residual + (1 - at) * T * D,
                   last ? a.final_norm : ffn ? l.norm2 : l.norm1);
      at = 1 - at;
      stamp();
      if (last) break;
      if (ffn) {
        route(l, i);
        stamp();
        neurons(l, i);
      } else {
        matrix<ATTENTION_BITS>(NQKV, D, l.scales,
               [&](int r) {
                 const elem* bias = r < OUT ? l.q_bias : r < OUT + HKV * HD ? l.k_bias : l.v_bias;
                 return bias == nullptr ? 0 : to_float(bias[r < OUT ? r : r < OUT + HKV * HD ? r - OUT : r - OUT - HKV * HD]);
               },
               [&](int r, int t, float sum) { a.qkv[t * NQKV + r] = sum; });
        attention(l);
        // All have read what the last layer added.
        if (i > 0) clear_sums(i - 1);
        grid_sync();
        output(l);
        fetch_layer(i + 1);
      }
      grid_sync();
    }
    matrix<HEAD_BITS>(V, D, a.head_scales, [&](int r) { return a.head_bias == nullptr ? 0 : to_float(a.head_bias[r]); },
           [&](int r, int t, float y) {
             a.logits[(size_t)t * V + r] = a.logit_cap > 0 ? a.logit_cap * tanh_(y / a.logit_cap) : y;
           });
    stamp();
    if (blockIdx.x == 0 && tid == 0) {
      store_relaxed(a.counters, goal);
      store_relaxed(a.counters + 1, tag);
    }
  }
};

// Whether this kernel is the one for the tokens of a pass; arguments hold all of them, also those beyond T.
DEVICE bool fits(const Args& a) {
  if (a.least > 1 && a.start[a.least - 1] > a.position[a.least - 1]) return false;
  return !a.larger || a.start[T] > a.position[T];
}

extern "C" KERNEL void decode_step(const Args a) {
  if (!fits(a)) return;
  SHARED_MEMORY(Shared, s);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      start_barrier(s.full[i], LTE_BULK ? 1 : 32 * FETCHERS);
      start_barrier(s.empty[i], LTE_EVERY_LANE ? 32 * WARPS : WARPS);
    }
    start_barrier(s.routed, LTE_EVERY_LANE ? THREADS : 1);
    share_neurons(s, F);
    publish_barriers();
  }
  if (threadIdx.x < T) {
    s.position[threadIdx.x] = (int)a.position[threadIdx.x];
    s.start[threadIdx.x] = (int)a.start[threadIdx.x];
  }
#if LTE_SEVERAL
  if (threadIdx.x == 0) {
    s.rows = 0;
    for (int t = 0; t < T; t++) s.rows += a.start[t] <= a.position[t];
  }
#endif
  block_sync();
  if (threadIdx.x < THREADS) {
    Step step(a, s);
    step.run();
  } else {
    Producer producer(a, s);
    producer.run();
  }
}

#ifdef LTE_ON_CPU
static const Args* launched;
inline void start_fiber() {
  decode_step(*launched);
  machine.now->done = true;
  got_on();
  yield();
}
extern "C" int launch(const Args* a, int grid, unsigned seed) {
  launched = a;
  return run_grid(grid, THREADS + 32 * FETCHERS, THREADS, seed);
}
#endif
