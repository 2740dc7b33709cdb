// One step of a whole decoder for T sequences in one persistent launch.
//
// Every multiprocessor runs one block, and all blocks wait for each other between the phases of a layer:
//
//   1  x = norm(residual); queries, keys and values
//   2  rotary embedding, new keys and values into the cache, attention: a block per sequence, head of keys and part of
//      the cache
//   3  output product
//   4  residual += output; x = norm(residual); which experts are on
//   5  gate, up and down of an equal share of the neurons that any token needs
//   6  the blocks' shares of the output are added up, each block a slice of the columns
//
// In a product each block takes an equal share of a matrix's rows, 16 at a time, and its warps share the columns.
// Weights do not depend on activations, so one warp of each block, the producer, does nothing but fetch what its block
// will read next, in the order of use, across phases and layers, through a ring of stages in shared memory. It runs
// ahead as far as the ring is long, also while the block waits for others, and stops only before the neurons of a layer
// whose routing is not known.
//
// Shapes, as macros that begin with LTE_: T sequences, D hidden size, HQ heads of queries, HKV of keys, HD their size, F neurons, E experts
// (0: a dense model), S neurons of an expert, V vocabulary. P = gridDim.x blocks.

constexpr int T = LTE_T, D = LTE_D, HQ = LTE_HQ, HKV = LTE_HKV, HD = LTE_HD, F = LTE_F, E = LTE_E, S = LTE_S, V = LTE_V;
constexpr int ROTARY = LTE_ROTARY, ACTIVATION = LTE_ACTIVATION, THREADS = LTE_THREADS;
constexpr int SPLIT_KEYS = LTE_SPLIT_KEYS, MAX_SHARE = LTE_MAX_SHARE, FETCHERS = LTE_FETCHERS;
constexpr bool GATED = LTE_GATED, NORM_PLUS_ONE = LTE_NORM_PLUS_ONE;

#ifdef LTE_ON_CPU
#include "cuda_on_cpu.h"
#else
#include "device.h"
#endif

typedef unsigned int u32;

constexpr int WARPS = THREADS / 32;           // that compute; FETCHERS more fetch
constexpr int SIZE = sizeof(elem);
constexpr int ROWS = 16;                      // of a stage; each fetching warp asks for four, one after the other
constexpr int SLAB = 1024 / SIZE;             // columns of a stage
constexpr int PITCH = 1024 + 16;              // bytes from row to row: eight rows lie in eight different banks
constexpr int SLICE = SLAB / WARPS;           // columns of one warp
constexpr int NQKV = (HQ + 2 * HKV) * HD;
constexpr int OUT = HQ * HD;
constexpr int G = HQ / HKV;                   // heads of queries for each head of keys
constexpr int PER_TILE = GATED ? 8 : 16;      // neurons in a tile of gate and up
constexpr int XS = (D > OUT ? D : OUT) + 16 / SIZE;      // pitch of the inputs of a product
constexpr int HS = (MAX_SHARE + 15) / 16 * 16 + 16 / SIZE;
constexpr int EPL = 8;                        // elements of a key that a lane takes
constexpr int LANES = HD / EPL;               // that share one key
constexpr int LANES2 = LANES <= 8 ? 8 : LANES <= 16 ? 16 : 32;
constexpr int PLACES = 32 / LANES2;           // keys that a warp takes at once
constexpr int KEYS = G <= 2 ? 4 : 2;       // that a thread takes part in at once, as registers allow
constexpr int HALF = ROTARY / 2 > 0 ? ROTARY / 2 : 1;
constexpr int NORM_REGISTERS = 32;            // for the residual of the tokens that a norm takes at once
static_assert(D % 32 == 0 && OUT % 32 == 0 && HD % EPL == 0 && LANES <= 32 && ROTARY <= HD, "shapes");
static_assert(HQ % HKV == 0 && G <= 8 && T >= 1 && T <= 8 && (E == 0 || F == E * S) && E < 65536, "shapes");
static_assert(THREADS % 32 == 0 && THREADS >= ROWS * T && ROWS % FETCHERS == 0, "threads");

struct alignas(16) Numbers { elem x[EPL]; };
DEVICE Numbers load_numbers(const elem* p) {
  union { Numbers numbers; uint4 words[EPL * SIZE / 16]; } x;
#pragma unroll
  for (int i = 0; i < EPL * SIZE / 16; i++) x.words[i] = load16(p + i * 16 / SIZE);
  return x.numbers;
}

struct Layer {
  const elem *norm1, *q, *k, *v, *q_bias, *k_bias, *v_bias, *q_norm, *k_norm, *out, *out_bias, *post1;
  const elem *norm2, *router, *gate, *up, *down, *gate_bias, *up_bias, *down_bias, *post2;
  const float* router_bias;
  elem *keys, *values;      // [T, HKV, slots, HD]
  float threshold;          // of the logits
  int window;               // tokens that see each other, 0 for all
  int rope;
  int slots, shift;         // of the cache: position p lies in slot (p + shift) % slots
};

struct Args {
  const Layer* layers;
  const long long *token, *position, *start;  // [T]; position in the cache; start: the first that is no padding
  const elem *embedding, *final_norm, *head, *head_bias;
  const float* ropes;         // [num_ropes, 1 + HALF]: a factor of cosines and sines, and an angle per position
  float* logits;              // [T, V]
  // Scratch: of any content.
  float *turns;               // [num_ropes, T, 2, HALF] cosines and sines
  float *residual;            // [2, T, D]
  float *qkv;                 // [T, NQKV]
  float *attended;            // [T, OUT]
  float *delta;               // [T, D] what half a layer adds to the residual
  float *partial;             // [P, T, D]
  float *splits;              // [T * HKV, P, G, HD + 2]
  u32 *masks;                 // [E]: the launch's tag, and a bit for each token that the expert is on for
  u32 *flags;                 // [P] of the barrier, zero at first
  u32 *counters;              // [2]: where the flags are, and launches; zero at first
  long long* trace;           // [P, TRACE]
  int num_layers, num_ropes;
  float eps, scaling, embedding_scale, attention_cap, logit_cap;
};

struct Working {
  Barrier routed;
  alignas(16) elem xs[T][XS];
  alignas(16) elem h[T][HS];
  float red[2][WARPS][ROWS][T > 2 ? T : 2];
  float sums[WARPS][T], halves[2][WARPS];
  float q[G][HD];
  float new_key[HD], new_value[HD];
  float stats[WARPS][G][2];   // highest score, sum
  float values[WARPS][G][HD];
  unsigned short experts[E > 0 ? E : 1];
  unsigned char tokens[E > 0 ? E : 1];  // bits of the experts in the list
  int counts[WARPS];
  int first, count;           // this block's share of the active neurons
  int position[T], start[T];
};

constexpr int STAGES = (LTE_SHARED_BYTES - (int)sizeof(Working) - 128) / (ROWS * PITCH + 2 * (int)sizeof(Barrier));
static_assert(STAGES >= 2, "shared memory is too small");
struct Shared : Working {
  alignas(128) char ring[STAGES][ROWS * PITCH];
  Barrier full[STAGES], empty[STAGES];
};
static_assert(sizeof(Shared) <= LTE_SHARED_BYTES, "shared memory");
static_assert(sizeof(Layer) == LTE_LAYER_BYTES && sizeof(Args) == LTE_ARGS_BYTES, "as the host fills them");

DEVICE float activate(float x) {
  if (ACTIVATION == 0) return x > 0 ? x : 0;
  if (ACTIVATION == 1) return x / (1 + exp_(-x));                                 // silu
  if (ACTIVATION == 2) return 0.5f * x * (1 + erf_(x * 0.70710678f));             // gelu
  if (ACTIVATION == 4) return x > 0 ? x * x : 0;                                  // squared relu
  return 0.5f * x * (1 + tanh_(0.79788456f * (x + 0.044715f * x * x * x)));       // its tanh form
}

DEVICE float norm_weight(elem w) { return NORM_PLUS_ONE ? 1 + to_float(w) : to_float(w); }

DEVICE float warp_sum(float x) {
  for (int o = 16; o; o >>= 1) x += shuffle_xor(x, o);
  return x;
}

// A share of n things for this block.
DEVICE int share_begin(int n) { return (int)((long long)n * blockIdx.x / gridDim.x); }
DEVICE int share_end(int n) { return (int)((long long)n * (blockIdx.x + 1) / gridDim.x); }

DEVICE int neuron_of(const Shared& s, int i) {
  const int rank = s.first + i;
  return E == 0 ? rank : s.experts[rank / S] * S + rank % S;
}

// A warp that fetches. Its first lanes have a row each.
struct Producer {
  static constexpr int EACH = ROWS / FETCHERS;
  const Args& a;
  Shared& s;
  int row, stage = 0;   // row of a stage
  u32 parity = 1;

  DEVICE Producer(const Args& a, Shared& s) : a(a), s(s) {
    const int lane = threadIdx.x % 32;
    row = lane < EACH ? (threadIdx.x - THREADS) / 32 * EACH + lane : ROWS;
  }

  DEVICE void fetch(const elem* from, int rows, int columns) {
    wait(s.empty[stage], parity);
    const int bytes = columns * SIZE;
#if LTE_BULK
    if (row == 0) expect(s.full[stage], rows * bytes);
    if (row < rows) bulk_copy(s.ring[stage] + row * PITCH, from, bytes, s.full[stage]);
#else
    // All lanes share the warp's rows, 16 bytes at a time.
    const int lane = threadIdx.x % 32, first = (threadIdx.x - THREADS) / 32 * EACH;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const char* line = shuffle((const char*)from, i);
      if (first + i >= rows) continue;
      for (int at = lane * 16; at < bytes; at += 32 * 16) copy16(s.ring[stage] + (first + i) * PITCH + at, line + at);
    }
    arrive_when_copied(s.full[stage]);
#endif
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  DEVICE void tile(const elem* from, int rows, int columns) {
#pragma unroll 1
    for (int c = 0; c < columns; c += SLAB) fetch(from + c, rows, columns - c < SLAB ? columns - c : SLAB);
  }
  DEVICE void matrix(const elem* base, int n, int columns) {
    const int end = share_end(n);
#pragma unroll 1
    for (int r = share_begin(n); r < end; r += ROWS)
      tile(base + (size_t)(r + row) * columns, end - r < ROWS ? end - r : ROWS, columns);
  }
  DEVICE void queries_keys_values(const Layer& l) {
    const int end = share_end(NQKV);
#pragma unroll 1
    for (int r = share_begin(NQKV); r < end; r += ROWS) {
      const int i = r + row;
      const elem* from = i < OUT ? l.q + (size_t)i * D
                         : i < OUT + HKV * HD ? l.k + (size_t)(i - OUT) * D : l.v + (size_t)(i - OUT - HKV * HD) * D;
      tile(from, end - r < ROWS ? end - r : ROWS, D);
    }
  }
  DEVICE void run() {
#pragma unroll 1
    for (int i = 0; i < a.num_layers; i++) {
      const Layer& l = a.layers[i];
      queries_keys_values(l);
      matrix(l.out, D, OUT);
      if (E > 0) {
        matrix(l.router, E, D);
        wait(s.routed, i & 1);
      }
      const int n = s.count;
#pragma unroll 1
      for (int j = 0; j < n; j += PER_TILE) {
        // Gate and up of eight neurons, or up of sixteen.
        const int left = n - j < PER_TILE ? n - j : PER_TILE, k = row % PER_TILE;
        const elem* from = (GATED && row < PER_TILE ? l.gate : l.up) + (size_t)neuron_of(s, j + (k < left ? k : 0)) * D;
        tile(from, GATED ? ROWS : left, D);
      }
#pragma unroll 1
      for (int c = 0; c < D; c += SLAB)
        for (int j = 0; j < n; j += ROWS) {
          const int left = n - j < ROWS ? n - j : ROWS;
          fetch(l.down + (size_t)neuron_of(s, j + (row < left ? row : 0)) * D + c, left, D - c < SLAB ? D - c : SLAB);
        }
    }
    matrix(a.head, V, D);
  }
};

struct Step {
  const Args& a;
  Shared& s;
  int tid, lane, warp, stage = 0, buffer = 0, event = 0;
  u32 parity = 0, goal, tag;

  DEVICE Step(const Args& a, Shared& s) : a(a), s(s), tid(threadIdx.x), lane(tid % 32), warp(tid / 32) {
    goal = load_fresh(a.counters);
    tag = load_fresh(a.counters + 1) + 1;
  }

  DEVICE void stamp() {
#ifdef LTE_TRACE
    if (tid == 0 && event < LTE_TRACE) a.trace[blockIdx.x * LTE_TRACE + event++] = clock_ns();
#endif
  }

  // Waits until `n` blocks are here, `first` and each `apart` from the one before; this block is one of them.
  DEVICE void sync(int first, int apart, int n) {
    team_sync();
    if (tid == 0) {
      delay(goal);
      store_release(a.flags + blockIdx.x, goal);
    }
    stamp();
    for (int p = tid; p < n; p += THREADS)
      for (u32 tries = 0; (int)(load_acquire(a.flags + first + p * apart) - goal) < 0;) spin(tries);
    if (tid == 0) delay(~goal);
    team_sync();
    stamp();
  }
  DEVICE void grid_sync() {
    goal++;
    sync(0, 1, gridDim.x);
  }

  // Sums over the block.
  template <int N> DEVICE void team_sums(float (&x)[N]) {
#pragma unroll
    for (int t = 0; t < N; t++) {
      x[t] = warp_sum(x[t]);
      if (lane == 0) s.sums[warp][t] = x[t];
    }
    team_sync();
#pragma unroll
    for (int t = 0; t < N; t++) {
      x[t] = 0;
      for (int i = 0; i < WARPS; i++) x[t] += s.sums[i][t];
    }
    team_sync();
  }

  // The same of one number; calls in a row have `half` 0 and 1 in turn.
  DEVICE float team_sum(float x, int half) {
    x = warp_sum(x);
    if (lane == 0) s.halves[half][warp] = x;
    team_sync();
    x = 0;
    for (int i = 0; i < WARPS; i++) x += s.halves[half][i];
    return x;
  }

  // residual = before + delta, before + norm(delta), or the token's embedding; then s.xs = norm(residual).
  DEVICE void add_and_norm(const float* before, const elem* post, float* after, const elem* weight) {
    constexpr int N = (D + THREADS - 1) / THREADS;
    constexpr int AT_ONCE = N * T <= NORM_REGISTERS ? T : N * 2 <= NORM_REGISTERS ? NORM_REGISTERS / N : 1;   // tokens
    float w[N];
#pragma unroll
    for (int i = 0; i < N; i++) w[i] = i * THREADS + tid < D ? norm_weight(weight[i * THREADS + tid]) : 0;
#pragma unroll 1
    for (int t0 = 0; t0 < T; t0 += AT_ONCE) {
      float x[AT_ONCE][N], sums[AT_ONCE];
      // All loads of a token at once, before anything waits for one.
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        const int t = t0 + k;
        float old[N];
#pragma unroll
        for (int i = 0; i < N; i++) {
          const int c = i * THREADS + tid;
          old[i] = x[k][i] = 0;
          if (t >= T || c >= D) continue;
          if (before == nullptr)
            x[k][i] = to_float(from_float(to_float(a.embedding[(size_t)a.token[t] * D + c]) * a.embedding_scale));
          else x[k][i] = load_fresh(a.delta + t * D + c), old[i] = load_fresh(before + t * D + c);
        }
        if (post != nullptr && before != nullptr) {
          float squares = 0;
#pragma unroll
          for (int i = 0; i < N; i++) squares += x[k][i] * x[k][i];
          const float r = rsqrt_(team_sum(squares, t & 1) / D + a.eps);
#pragma unroll
          for (int i = 0; i < N; i++) x[k][i] *= i * THREADS + tid < D ? r * norm_weight(post[i * THREADS + tid]) : 0;
        }
        sums[k] = 0;
#pragma unroll
        for (int i = 0; i < N; i++) x[k][i] += old[i], sums[k] += x[k][i] * x[k][i];
      }
      team_sums(sums);
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        const int t = t0 + k;
        const float r = rsqrt_(sums[k] / D + a.eps);
#pragma unroll
        for (int i = 0; i < N; i++) {
          const int c = i * THREADS + tid;
          if (t >= T || c >= D) continue;
          // The other buffer: others still read this one.
          if (after != nullptr && (int)(c % gridDim.x) == (int)blockIdx.x) after[t * D + c] = x[k][i];
          s.xs[t][c] = from_float(x[k][i] * r * w[i]);
        }
      }
    }
    team_sync();
  }

  DEVICE const char* next_stage() {
    wait(s.full[stage], parity);
    return s.ring[stage];
  }
  DEVICE void release() {
    warp_sync();
    if (lane == 0) arrive(s.empty[stage]);
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }

  // Sixteen rows of weights times the inputs [T][pitch], the sum over this warp's columns of each slab.
  DEVICE void tile_dot(const elem* inputs, int pitch, int columns, Tile& sum) {
    clear(sum);
#pragma unroll 1
    for (int c = 0; c < columns; c += SLAB) {
      const char* weights = next_stage();
      if (c + warp * SLICE < columns)
        tile_product<SLICE, PITCH>(sum, weights + warp * SLICE * SIZE, inputs + c + warp * SLICE, pitch, columns - c - warp * SLICE);
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

  // The product of s.xs with this block's share of a matrix's rows: emit(row, token, sum).
  template <class Emit>
  DEVICE void matrix(int n, int columns, Emit emit) {
    const int end = share_end(n);
#pragma unroll 1
    for (int r = share_begin(n); r < end; r += ROWS) {
      Tile sum;
      tile_dot(&s.xs[0][0], XS, columns, sum);
      share_tile(sum);
      const int row = tid / T, t = tid % T;
      if (row < ROWS && r + row < end) emit(r + row, t, total(row, t));
    }
  }

  // A head of queries or keys of the new token into `to`, by one warp: its norm, if there is one, and its rotation.
  DEVICE void rotate(const float* from, const elem* norm, const float* turn, float scale, float* to) {
    constexpr int N = (HD + 31) / 32;
    float x[N], squares = 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int d = i * 32 + lane;
      x[i] = d < HD ? load_fresh(from + d) : 0;
      squares += x[i] * x[i];
    }
    if (norm != nullptr) {
      const float r = rsqrt_(warp_sum(squares) / HD + a.eps);
#pragma unroll
      for (int i = 0; i < N; i++) {
        const int d = i * 32 + lane;
        if (d < HD) x[i] *= r * norm_weight(norm[d]);
      }
    }
#pragma unroll
    for (int i = 0; i < N; i++)
      if (i * 32 + lane < HD) to[i * 32 + lane] = x[i];
    warp_sync();
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int d = i * 32 + lane;
      if (d < ROTARY) {
        const float other = d < HALF ? -to[d + HALF] : to[d - HALF];
        x[i] = x[i] * load_fresh(turn + d % HALF) + other * load_fresh(turn + HALF + d % HALF);
      }
      x[i] *= scale;
    }
    warp_sync();
#pragma unroll
    for (int i = 0; i < N; i++)
      if (i * 32 + lane < HD) to[i * 32 + lane] = x[i];
  }

  DEVICE static int slot_of(const Layer& l, int position) {
    const int at = position + l.shift;
    return at < l.slots ? at : at % l.slots;
  }

  DEVICE void attention(const Layer& l) {
    // More than one only where each block has one unit at most, so that blocks can wait for each other.
    const int parts = gridDim.x / (T * HKV) > 1 ? gridDim.x / (T * HKV) : 1;
    goal++;
#pragma unroll 1
    for (int unit = blockIdx.x; unit < T * HKV * parts; unit += gridDim.x) {
      const int t = unit % T, head = unit / T % HKV, split = unit / (T * HKV);
      const int start = s.start[t], end = s.position[t] + 1;
      const int low = l.window > 0 && end - l.window > start ? end - l.window : start, n = end - low;
      int splits = (n + SPLIT_KEYS - 1) / SPLIT_KEYS;
      if (splits > parts) splits = parts;
      const int length = (n + splits - 1) / splits;
      splits = (n + length - 1) / length;
      if (split >= splits) continue;
      const int begin = low + split * length;
      attend(l, t, head, split, splits, begin, begin + length < end ? begin + length : end, end - 1);
    }
  }

  DEVICE void attend(const Layer& l, int t, int head, int split, int splits, int begin, int end, int position) {
    const float *turn = a.turns + (l.rope * T + t) * 2 * HALF, *qkv = a.qkv + t * NQKV;
    const bool newest = end == position + 1;
    const size_t base = (size_t)(t * HKV + head) * l.slots * HD;
#pragma unroll 1
    for (int g = warp; g < G + 2; g += WARPS) {
      if (g < G) rotate(qkv + (head * G + g) * HD, l.q_norm, turn, a.scaling, s.q[g]);
      else if (g == G && newest) rotate(qkv + OUT + head * HD, l.k_norm, turn, 1, s.new_key);
      else if (newest)
        for (int d = lane; d < HD; d += 32) s.new_value[d] = load_fresh(qkv + OUT + (HKV + head) * HD + d);
    }
    team_sync();
    if (newest)
      for (int d = tid; d < HD; d += THREADS) {
        const elem k = from_float(s.new_key[d]), v = from_float(s.new_value[d]);
        l.keys[base + (size_t)slot_of(l, position) * HD + d] = k;
        l.values[base + (size_t)slot_of(l, position) * HD + d] = v;
      }

    // Each group of LANES2 lanes has keys of its own, and its own sums.
    const int part = lane % LANES2, place = warp * PLACES + lane / LANES2;
    const bool mine = part < LANES;
    float top[G], sum[G], acc[G][EPL];
#pragma unroll
    for (int g = 0; g < G; g++) {
      top[g] = -INFINITY_, sum[g] = 0;
#pragma unroll
      for (int i = 0; i < EPL; i++) acc[g][i] = 0;
    }
#pragma unroll 1
    for (int from = begin; from < end; from += WARPS * PLACES * KEYS) {
      Numbers keys[KEYS], values[KEYS];
#pragma unroll
      for (int u = 0; u < KEYS; u++) {
        const int j = from + u * WARPS * PLACES + place;
        keys[u] = values[u] = {};
        if (mine && j < end && j != position) {
          const size_t at = base + (size_t)slot_of(l, j) * HD + part * EPL;
          keys[u] = load_numbers(l.keys + at);
          values[u] = load_numbers(l.values + at);
        }
        if (mine && j < end && j == position) {
          // As the cache will hold them.
#pragma unroll
          for (int i = 0; i < EPL; i++) {
            keys[u].x[i] = from_float(s.new_key[part * EPL + i]);
            values[u].x[i] = from_float(s.new_value[part * EPL + i]);
          }
        }
      }
#pragma unroll
      for (int g = 0; g < G; g++) {
        float scores[KEYS], highest = top[g];
#pragma unroll
        for (int u = 0; u < KEYS; u++) {
          scores[u] = 0;
          if (mine)
#pragma unroll
            for (int i = 0; i < EPL; i++)
              scores[u] = fma_(to_float(keys[u].x[i]), s.q[g][part * EPL + i], scores[u]);
          for (int o = LANES2 / 2; o; o >>= 1) scores[u] += shuffle_xor(scores[u], o);
          if (a.attention_cap > 0) scores[u] = a.attention_cap * tanh_(scores[u] / a.attention_cap);
          if (from + u * WARPS * PLACES + place >= end) scores[u] = -INFINITY_;
          highest = scores[u] > highest ? scores[u] : highest;
        }
        if (highest == -INFINITY_) continue;
        const float factor = exp_(top[g] - highest);
        top[g] = highest;
        sum[g] *= factor;
#pragma unroll
        for (int i = 0; i < EPL; i++) acc[g][i] *= factor;
#pragma unroll
        for (int u = 0; u < KEYS; u++) {
          const float p = exp_(scores[u] - highest);
          sum[g] += p;
#pragma unroll
          for (int i = 0; i < EPL; i++) acc[g][i] = fma_(p, to_float(values[u].x[i]), acc[g][i]);
        }
      }
    }
    // Over the groups of a warp, then over the warps.
#pragma unroll
    for (int g = 0; g < G; g++) {
      float highest = top[g];
      for (int o = LANES2; o < 32; o <<= 1) {
        const float other = shuffle_xor(highest, o);
        highest = other > highest ? other : highest;
      }
      const float factor = highest == -INFINITY_ ? 0 : exp_(top[g] - highest);
      sum[g] *= factor;
      for (int o = LANES2; o < 32; o <<= 1) sum[g] += shuffle_xor(sum[g], o);
#pragma unroll
      for (int i = 0; i < EPL; i++) {
        acc[g][i] *= factor;
        for (int o = LANES2; o < 32; o <<= 1) acc[g][i] += shuffle_xor(acc[g][i], o);
        if (lane < LANES) s.values[warp][g][lane * EPL + i] = acc[g][i];
      }
      if (lane == 0) s.stats[warp][g][0] = highest, s.stats[warp][g][1] = sum[g];
    }
    team_sync();
#pragma unroll 1
    for (int i = tid; i < G * HD; i += THREADS) {
      const int g = i / HD, d = i % HD;
      float highest = -INFINITY_, weight = 0, value = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) highest = s.stats[w][g][0] > highest ? s.stats[w][g][0] : highest;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float factor = exp_(s.stats[w][g][0] - highest);
        weight += factor * s.stats[w][g][1];
        value += factor * s.values[w][g][d];
      }
      if (splits == 1) a.attended[t * OUT + head * G * HD + i] = value / weight;
      else {
        float* to = split_of(t * HKV + head, split, g);
        to[d] = value;
        if (d == 0) to[HD] = highest, to[HD + 1] = weight;
      }
    }
    team_sync();
    if (splits > 1) {
      sync(t + T * head, T * HKV, splits);
      combine(t, head, split, splits);
    }
  }

  DEVICE float* split_of(int unit, int split, int g) const {
    return a.splits + (((size_t)unit * gridDim.x + split) * G + g) * (HD + 2);
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
    for (int i = tid; i < T * OUT; i += THREADS) s.xs[i / OUT][i % OUT] = from_float(load_fresh(a.attended + i));
    team_sync();
    matrix(D, OUT, [&](int r, int t, float sum) {
      a.delta[t * D + r] = sum + (l.out_bias == nullptr ? 0 : to_float(l.out_bias[r]));
    });
  }

  // Publishes which experts are on, finds this block's share of their neurons, and lets the producer go on.
  DEVICE void route(const Layer& l, int layer) {
    if (E == 0) return;
    const u32 mark = (tag * a.num_layers + layer) << 8;
    const int end = share_end(E);
#pragma unroll 1
    for (int r = share_begin(E); r < end; r += ROWS) {
      Tile sum;
      tile_dot(&s.xs[0][0], XS, D, sum);
      share_tile(sum);
      if (tid < ROWS && r + tid < end) {
        u32 on = 0;
        const float bias = l.router_bias == nullptr ? 0 : l.router_bias[r + tid];
        // Rounded as every other path rounds it, so that all decide alike.
        for (int t = 0; t < T; t++) on |= (u32)(to_float(from_float(total(tid, t))) + bias > l.threshold) << t;
        store_relaxed(a.masks + r + tid, mark | on);
      }
    }
    // In ascending order: a prefix sum over the masks, each of which arrives in its own time.
    int active = 0;
#pragma unroll 1
    for (int e0 = 0; e0 < E; e0 += THREADS) {
      const int e = e0 + tid;
      u32 word = mark;
      if (e < E)
        for (u32 tries = 0; ((word = load_relaxed(a.masks + e)) & ~255u) != mark;) spin(tries);
      const bool on = (word & 255) != 0;
      const u32 votes = vote(on);
      if (lane == 0) s.counts[warp] = popcount(votes);
      team_sync();
      int before = active;
      for (int w = 0; w < WARPS; w++) {
        if (w < warp) before += s.counts[w];
        active += s.counts[w];
      }
      if (on) {
        const int i = before + popcount(votes & ((1u << lane) - 1));
        s.experts[i] = (unsigned short)e;
        s.tokens[i] = (unsigned char)word;
      }
      team_sync();
    }
    if (tid == 0) {
      s.first = share_begin(active * S);
      s.count = share_end(active * S) - s.first;
      arrive(s.routed);
    }
    team_sync();
  }

  DEVICE void neurons(const Layer& l) {
    const int n = s.count, padded = (n + 15) / 16 * 16;
    for (int i = tid; i < T * (padded - n); i += THREADS) s.h[i % T][n + i / T] = from_float(0);
#pragma unroll 1
    for (int j = 0; j < n; j += PER_TILE) {
      Tile sum;
      tile_dot(&s.xs[0][0], XS, D, sum);
      share_tile(sum);
      const int i = j + tid / T, t = tid % T;
      if (tid / T < PER_TILE && i < n) {
        const int neuron = neuron_of(s, i);
        float up = total(GATED ? tid / T + PER_TILE : tid / T, t);
        if (l.up_bias != nullptr) up += to_float(l.up_bias[neuron]);
        float h;
        if (GATED) {
          float gate = total(tid / T, t);
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
    float* to = a.partial + (size_t)blockIdx.x * T * D;
#pragma unroll 1
    for (int c = 0; c < D; c += SLAB) {
      Columns<SLICE> sum;
      clear(sum);
      const bool mine = c + warp * SLICE < D;
#pragma unroll 1
      for (int j = 0; j < n; j += ROWS) {
        const char* weights = next_stage();
        if (mine) columns_product<SLICE, PITCH>(sum, weights + warp * SLICE * SIZE, &s.h[0][j], HS, n - j);
        release();
      }
      if (mine) store_columns<SLICE, T>(sum, to + c + warp * SLICE, D, D - c - warp * SLICE);
    }
  }

  // delta for this block's columns, 32 at a time.
  DEVICE void add_partials(const Layer& l) {
    float* red = &s.red[0][0][0][0];
    const int end = share_end(D);
    int half = 0;
#pragma unroll 1
    for (int c0 = share_begin(D); c0 < end; c0 += 32)
#pragma unroll 1
      for (int t = 0; t < T; t++) {
        const int c = c0 + lane;
        float sum = 0;
        if (c < end)
#pragma unroll 9
          for (int p = warp; p < (int)gridDim.x; p += WARPS) sum += load_fresh(a.partial + ((size_t)p * T + t) * D + c);
        half ^= 1;
        red[(half * WARPS + warp) * 32 + lane] = sum;
        team_sync();
        if (warp == 0 && c < end) {
          float all = l.down_bias == nullptr ? 0 : to_float(l.down_bias[c]);
          for (int w = 0; w < WARPS; w++) all += red[(half * WARPS + w) * 32 + lane];
          a.delta[t * D + c] = all;
        }
      }
  }

  // The new tokens' angles, for the attention of all layers.
  DEVICE void turn() {
    for (int i = blockIdx.x * THREADS + tid; i < a.num_ropes * T * HALF; i += gridDim.x * THREADS) {
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
    int at = 1;  // which half of the residual is the newest
    float* halves[2] = {a.residual, a.residual + T * D};
    stamp();
#pragma unroll 1
    for (int i = 0; i < a.num_layers; i++) {
      const Layer& l = a.layers[i];
      add_and_norm(i > 0 ? halves[at] : nullptr, i > 0 ? a.layers[i - 1].post2 : nullptr, halves[1 - at], l.norm1);
      at = 1 - at;
      stamp();
      matrix(NQKV, D, [&](int r, int t, float sum) {
        const elem* bias = r < OUT ? l.q_bias : r < OUT + HKV * HD ? l.k_bias : l.v_bias;
        const int i = r < OUT ? r : r < OUT + HKV * HD ? r - OUT : r - OUT - HKV * HD;
        a.qkv[t * NQKV + r] = sum + (bias == nullptr ? 0 : to_float(bias[i]));
      });
      grid_sync();
      attention(l);
      grid_sync();
      output(l);
      grid_sync();
      add_and_norm(halves[at], l.post1, halves[1 - at], l.norm2);
      at = 1 - at;
      stamp();
      route(l, i);
      stamp();
      neurons(l);
      grid_sync();
      add_partials(l);
      grid_sync();
    }
    add_and_norm(halves[at], a.layers[a.num_layers - 1].post2, nullptr, a.final_norm);
    matrix(V, D, [&](int r, int t, float sum) {
      const float y = sum + (a.head_bias == nullptr ? 0 : to_float(a.head_bias[r]));
      a.logits[(size_t)t * V + r] = a.logit_cap > 0 ? a.logit_cap * tanh_(y / a.logit_cap) : y;
    });
    stamp();
    if (blockIdx.x == 0 && tid == 0) {
      store_relaxed(a.counters, goal);
      store_relaxed(a.counters + 1, tag);
    }
  }
};

extern "C" KERNEL void decode_step(const Args a) {
  SHARED_MEMORY(Shared, s);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      start_barrier(s.full[i], LTE_BULK ? 1 : 32 * FETCHERS);
      start_barrier(s.empty[i], WARPS);
    }
    start_barrier(s.routed, 1);
    s.first = share_begin(F);
    s.count = share_end(F) - s.first;
    publish_barriers();
  }
  if (threadIdx.x < T) {
    s.position[threadIdx.x] = (int)a.position[threadIdx.x];
    s.start[threadIdx.x] = (int)a.start[threadIdx.x];
  }
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
