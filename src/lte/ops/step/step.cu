// One step of a whole decoder for T sequences in one persistent launch.
//
// Every multiprocessor runs one block, and all blocks wait for each other between the phases of a layer:
//
//   1  x = norm(residual); queries, keys and values
//   2  rotary embedding, new keys and values into the cache, attention: a block per sequence, head of keys and part of
//      the cache
//   3  output product
//   4  residual += output; x = norm(residual); which experts are on
//   5  gate, up and down of an equal share of the neurons that any token needs; the blocks' shares of the output are
//      added up in fixed point, so that their order does not matter
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
constexpr int ROTARY = LTE_ROTARY, ACTIVATION = LTE_ACTIVATION, THREADS = LTE_THREADS, STAGES = LTE_STAGES;
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
constexpr int EPL = 16 / SIZE;                // elements in 16 bytes
constexpr int LANES = HD / EPL;               // that share one key
constexpr int LANES2 = LANES <= 8 ? 8 : LANES <= 16 ? 16 : 32;
constexpr int PLACES = 32 / LANES2;           // keys that a warp takes at once
constexpr int KEYS = 4;                       // that a thread takes part in at once
constexpr int DIRECT = 8;                     // parts of a cache that are combined by whoever reads them
constexpr int PER_THREAD = (E + THREADS - 1) / THREADS > 0 ? (E + THREADS - 1) / THREADS : 1;   // experts
constexpr float FIXED = 1.0f / (1 << 30);
static_assert(D % 32 == 0 && OUT % 32 == 0 && THREADS % 32 == 0 && LANES <= 32 && T <= 8, "shapes");

struct Layer {
  const elem *norm1, *q, *k, *v, *q_bias, *k_bias, *v_bias, *q_norm, *k_norm, *out, *out_bias, *post1;
  const elem *norm2, *router, *gate, *up, *down, *gate_bias, *up_bias, *down_bias, *post2;
  const float* router_bias;
  elem *keys, *values;      // [T, HKV, slots, HD]
  const float *cos, *sin;   // [positions, ROTARY]
  float threshold;          // of the logits
  int window;               // tokens that see each other, 0 for all
  int slots, shift;         // of the cache: position p lies in slot (p + shift) % slots
};

struct Args {
  const Layer* layers;
  const long long *token, *position, *start;  // [T]; position in the cache; start: the first that is no padding
  const elem *embedding, *final_norm, *head, *head_bias;
  float* logits;              // [T, V]
  // Scratch: of any content.
  float *residual;            // [2, T, D]
  float *qkv;                 // [T, NQKV]
  float *attended;            // [T, OUT]
  float *delta;               // [T, D] what half a layer adds to the residual
  long long *sums;            // [2, T, D] what FFNs add to the residual, in units of FIXED; two layers in turn
  float *splits;              // [T * HKV, P, G, HD + 2]
  u32 *masks;                 // [E]: the launch's tag, and a bit for each token that the expert is on for
  u32 *counters;              // [3 + T * HKV]: barriers so far, launches, arrivals at barriers; of the splits; zero at first
  long long* trace;           // [P, TRACE]
  int num_layers;
  float eps, scaling, embedding_scale, attention_cap, logit_cap;
};

struct Shared {
  char ring[STAGES][ROWS * PITCH];
  Barrier full[STAGES], empty[STAGES], routed;
  alignas(16) elem xs[T][XS];
  alignas(16) elem h[T][HS];
  Layer layers[2];            // this one and the next
  float red[2][WARPS][ROWS][T > 2 ? T : 2];
  float sums[WARPS][T], halves[2][WARPS];
  float q[G][HD];
  float new_key[HD], new_value[HD];
  alignas(16) elem newest[2][HD];   // the same as the cache holds them
  float stats[WARPS][G][2];   // highest score, sum
  float factors[T][HQ][DIRECT];
  float values[WARPS][G][HD];
  unsigned short experts[E > 0 ? E : 1];
  unsigned char tokens[E > 0 ? E : 1];  // bits of the experts in the list
  int counts[PER_THREAD][WARPS];
  int first, count;           // this block's share of the active neurons
  int last;
  int position[T], start[T];
};

DEVICE float activate(float x) {
  if (ACTIVATION == 0) return x > 0 ? x : 0;
  if (ACTIVATION == 1) return x / (1 + exp_(-x));                                 // silu
  if (ACTIVATION == 2) return 0.5f * x * (1 + erf_(x * 0.70710678f));             // gelu
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
  const Args& a;
  Shared& s;
  int row, stage = 0;   // of a stage
  u32 parity = 1;
  const unsigned long long policy = read_once();

  DEVICE Producer(const Args& a, Shared& s) : a(a), s(s) {
    constexpr int EACH = ROWS / FETCHERS;
    const int lane = threadIdx.x % 32;
    row = lane < EACH ? (threadIdx.x - THREADS) / 32 * EACH + lane : ROWS;
  }

  DEVICE void fetch(const elem* from, int rows, int columns) {
    wait(s.empty[stage], parity);
    const int bytes = columns * SIZE;
    if (row == 0) expect(s.full[stage], rows * bytes);
    if (row < rows) bulk_copy(s.ring[stage] + row * PITCH, from, bytes, s.full[stage], policy);
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

  // All blocks wait for each other: what a block wrote before `arrive_at_grid`, all read after `wait_for_grid`.
  DEVICE void arrive_at_grid() {
    goal++;
    team_sync();
    if (tid == 0) add_release(a.counters + 2, 1);
    stamp();
  }
  DEVICE void wait_for_grid() {
    if (tid == 0)
      while ((int)(load_acquire(a.counters + 2) - goal * gridDim.x) < 0) spin();
    team_sync();
    stamp();
  }
  DEVICE void grid_sync() {
    arrive_at_grid();
    wait_for_grid();
  }

  // Sums over the block, one for each token.
  DEVICE void team_sums(float (&x)[T]) {
#pragma unroll
    for (int t = 0; t < T; t++) {
      x[t] = warp_sum(x[t]);
      if (lane == 0) s.sums[warp][t] = x[t];
    }
    team_sync();
#pragma unroll
    for (int t = 0; t < T; t++) {
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
  DEVICE void add_and_norm(const float* before, const long long* sums_of_ffn, const elem* post, float* after, const elem* weight) {
    constexpr int N = (D + THREADS - 1) / THREADS;
    float x[T][N], sums[T], w[N];
#pragma unroll
    for (int i = 0; i < N; i++) w[i] = i * THREADS + tid < D ? norm_weight(weight[i * THREADS + tid]) : 0;
    // All loads of a token at once, before anything waits for one.
#pragma unroll
    for (int t = 0; t < T; t++) {
      float old[N];
#pragma unroll
      for (int i = 0; i < N; i++) {
        const int c = i * THREADS + tid;
        old[i] = x[t][i] = 0;
        if (c < D && before == nullptr)
          x[t][i] = to_float(from_float(to_float(a.embedding[(size_t)a.token[t] * D + c]) * a.embedding_scale));
        else if (c < D && sums_of_ffn != nullptr)
          x[t][i] = load_fresh(sums_of_ffn + t * D + c) * FIXED, old[i] = load_fresh(before + t * D + c);
        else if (c < D) x[t][i] = load_fresh(a.delta + t * D + c), old[i] = load_fresh(before + t * D + c);
      }
      if (post != nullptr && before != nullptr) {
        float squares = 0;
#pragma unroll
        for (int i = 0; i < N; i++) squares += x[t][i] * x[t][i];
        const float r = rsqrt_(team_sum(squares, t & 1) / D + a.eps);
#pragma unroll
        for (int i = 0; i < N; i++) x[t][i] *= i * THREADS + tid < D ? r * norm_weight(post[i * THREADS + tid]) : 0;
      }
      sums[t] = 0;
#pragma unroll
      for (int i = 0; i < N; i++) x[t][i] += old[i], sums[t] += x[t][i] * x[t][i];
    }
    team_sums(sums);
#pragma unroll
    for (int t = 0; t < T; t++) {
      const float r = rsqrt_(sums[t] / D + a.eps);
#pragma unroll
      for (int i = 0; i < N; i++) {
        const int c = i * THREADS + tid;
        if (c >= D) continue;
        // The other buffer: others still read this one.
        if (after != nullptr && (int)(c % gridDim.x) == (int)blockIdx.x) after[t * D + c] = x[t][i];
        s.xs[t][c] = from_float(x[t][i] * r * w[i]);
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

  // The product of s.xs with this block's share of a matrix's rows: emit(row, token, sum + bias(row)).
  template <class Bias, class Emit>
  DEVICE void matrix(int n, int columns, Bias bias, Emit emit) {
    const int end = share_end(n), row = tid / T, t = tid % T;
#pragma unroll 1
    for (int r = share_begin(n); r < end; r += ROWS) {
      const bool mine = row < ROWS && r + row < end;
      const float b = mine ? bias(r + row) : 0;
      Tile sum;
      tile_dot(&s.xs[0][0], XS, columns, sum);
      share_tile(sum);
      if (mine) emit(r + row, t, total(row, t) + b);
    }
  }

  // A head of queries or keys of the new token into `to`, by one warp: its norm, if there is one, and its rotation.
  DEVICE void rotate(const float* from, const elem* norm, const float* cos, const float* sin, float scale, float* to) {
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
        const float other = d < ROTARY / 2 ? -to[d + ROTARY / 2] : to[d - ROTARY / 2];
        x[i] = x[i] * cos[d] + other * sin[d];
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

  // Keys [begin, end) of the cache of sequence t for one head of keys.
  struct Part { int t, head, split, splits, begin, end; };
  struct Chunk { uint4 keys[KEYS], values[KEYS]; };

  DEVICE int first_key(const Layer& l, int t) const {
    const int start = s.start[t], end = s.position[t] + 1;
    return l.window > 0 && end - l.window > start ? end - l.window : start;
  }
  // How many keys each part of a sequence's cache has; the last may have fewer.
  DEVICE int part_length(const Layer& l, int t) const {
    const int n = s.position[t] + 1 - first_key(l, t), most = gridDim.x / (T * HKV) > 1 ? gridDim.x / (T * HKV) : 1;
    const int wanted = (n + SPLIT_KEYS - 1) / SPLIT_KEYS;
    return wanted <= most ? (n + wanted - 1) / wanted : (n + most - 1) / most;
  }
  DEVICE int splits_of(const Layer& l, int t) const {
    const int length = part_length(l, t);
    return (s.position[t] + 1 - first_key(l, t) + length - 1) / length;
  }
  DEVICE bool part_of(const Layer& l, int unit, Part& p) const {
    p.t = unit % T, p.head = unit / T % HKV, p.split = unit / (T * HKV), p.splits = splits_of(l, p.t);
    const int length = part_length(l, p.t), end = s.position[p.t] + 1;
    p.begin = first_key(l, p.t) + p.split * length;
    p.end = p.begin + length < end ? p.begin + length : end;
    return p.split < p.splits;
  }

  // Where the cache of a part lies, and this thread's share of keys: groups of LANES2 lanes have keys of their own.
  DEVICE size_t base_of(const Layer& l, const Part& p) const { return (size_t)(p.t * HKV + p.head) * l.slots * HD; }
  DEVICE void load_chunk(const Layer& l, const Part& p, int from, Chunk& chunk) const {
    const int part = lane % LANES2, place = warp * PLACES + lane / LANES2;
    const size_t base = base_of(l, p);
#pragma unroll
    for (int u = 0; u < KEYS; u++) {
      const int j = from + u * WARPS * PLACES + place;
      chunk.keys[u] = chunk.values[u] = {0, 0, 0, 0};
      if (part < LANES && j < p.end && j != s.position[p.t]) {
        const size_t at = base + (size_t)slot_of(l, j) * HD + part * EPL;
        chunk.keys[u] = load16(l.keys + at);
        chunk.values[u] = load16(l.values + at);
      }
    }
  }

  // What attention reads besides the new token is on its way before the others have computed that.
  DEVICE void attention(const Layer& l) {
    const int units = T * HKV * (gridDim.x / (T * HKV) > 1 ? gridDim.x / (T * HKV) : 1);
    Part p;
    Chunk chunk;
    const bool any = (int)blockIdx.x < units && part_of(l, blockIdx.x, p);
    if (any) load_chunk(l, p, p.begin, chunk);
    wait_for_grid();
    if (any) attend(l, p, chunk);
#pragma unroll 1
    for (int unit = blockIdx.x + gridDim.x; unit < units; unit += gridDim.x)
      if (part_of(l, unit, p)) {
        load_chunk(l, p, p.begin, chunk);
        attend(l, p, chunk);
      }
  }

  DEVICE void attend(const Layer& l, const Part& p, Chunk& chunk) {
    const int position = s.position[p.t], angle = position - s.start[p.t];
    const float *cos = l.cos + (size_t)angle * ROTARY, *sin = l.sin + (size_t)angle * ROTARY, *qkv = a.qkv + p.t * NQKV;
    const bool newest = p.end == position + 1;
#pragma unroll 1
    for (int g = warp; g < G + 2; g += WARPS) {
      if (g < G) rotate(qkv + (p.head * G + g) * HD, l.q_norm, cos, sin, a.scaling, s.q[g]);
      else if (g == G && newest) rotate(qkv + OUT + p.head * HD, l.k_norm, cos, sin, 1, s.new_key);
      else if (newest)
        for (int d = lane; d < HD; d += 32) s.new_value[d] = load_fresh(qkv + OUT + (HKV + p.head) * HD + d);
    }
    team_sync();
    if (newest) {
      for (int d = tid; d < HD; d += THREADS) {
        const size_t at = base_of(l, p) + (size_t)slot_of(l, position) * HD + d;
        l.keys[at] = s.newest[0][d] = from_float(s.new_key[d]);
        l.values[at] = s.newest[1][d] = from_float(s.new_value[d]);
      }
      team_sync();
    }

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
    for (int from = p.begin; from < p.end; from += WARPS * PLACES * KEYS) {
      if (from > p.begin) load_chunk(l, p, from, chunk);
      if (newest && mine)
#pragma unroll
        for (int u = 0; u < KEYS; u++)
          if (from + u * WARPS * PLACES + place == position) {
            chunk.keys[u] = *(const uint4*)(s.newest[0] + part * EPL);
            chunk.values[u] = *(const uint4*)(s.newest[1] + part * EPL);
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
              scores[u] = fma_(to_float(((const elem*)&chunk.keys[u])[i]), s.q[g][part * EPL + i], scores[u]);
        }
#pragma unroll
        for (int o = LANES2 / 2; o; o >>= 1)
#pragma unroll
          for (int u = 0; u < KEYS; u++) scores[u] += shuffle_xor(scores[u], o);
#pragma unroll
        for (int u = 0; u < KEYS; u++) {
          if (a.attention_cap > 0) scores[u] = a.attention_cap * tanh_(scores[u] / a.attention_cap);
          if (from + u * WARPS * PLACES + place >= p.end) scores[u] = -INFINITY_;
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
          const float weight = exp_(scores[u] - highest);
          sum[g] += weight;
#pragma unroll
          for (int i = 0; i < EPL; i++) acc[g][i] = fma_(weight, to_float(((const elem*)&chunk.values[u])[i]), acc[g][i]);
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
      if (p.splits == 1) a.attended[p.t * OUT + p.head * G * HD + i] = value / weight;
      else {
        float* to = split_of(p.t * HKV + p.head, p.split, g);
        to[d] = value;
        if (d == 0) to[HD] = highest, to[HD + 1] = weight;
      }
    }
    team_sync();
    if (p.splits > DIRECT) {
      // The block that comes last adds up the parts, always in the same order.
      const int unit = p.t * HKV + p.head;
      if (tid == 0) {
        s.last = add_acq_rel(a.counters + 3 + unit, 1) == (u32)p.splits - 1;
        if (s.last) store_relaxed(a.counters + 3 + unit, 0);
      }
      team_sync();
      if (s.last) combine(p);
      team_sync();
    }
  }

  DEVICE float* split_of(int unit, int split, int g) const {
    return a.splits + (((size_t)unit * gridDim.x + split) * G + g) * (HD + 4);
  }

  DEVICE void combine(const Part& p) {
    const int unit = p.t * HKV + p.head;
#pragma unroll 1
    for (int i = tid; i < G * HD; i += THREADS) {
      const int g = i / HD, d = i % HD;
      float top = -INFINITY_, sum = 0, weight = 0;
#pragma unroll 1
      for (int from = 0; from < p.splits; from += 16) {
        float highest[16], weights[16], values[16], most = top;
#pragma unroll
        for (int j = 0; j < 16; j++) {
          const bool there = from + j < p.splits;
          const float* part = split_of(unit, there ? from + j : 0, g);
          highest[j] = there ? load_fresh(part + HD) : -INFINITY_;
          weights[j] = load_fresh(part + HD + 1);
          values[j] = load_fresh(part + d);
        }
#pragma unroll
        for (int j = 0; j < 16; j++) most = highest[j] > most ? highest[j] : most;
        const float before = exp_(top - most);
        sum *= before, weight *= before, top = most;
#pragma unroll
        for (int j = 0; j < 16; j++) {
          const float factor = exp_(highest[j] - most);
          weight += factor * weights[j];
          sum += factor * values[j];
        }
      }
      a.attended[p.t * OUT + p.head * G * HD + i] = sum / weight;
    }
  }

  // The attended values of all heads into s.xs, few parts of a cache combined on the way.
  DEVICE void gather(const Layer& l) {
    bool parts = false;
#pragma unroll
    for (int t = 0; t < T; t++) {
      const int splits = splits_of(l, t);
      parts |= splits > 1 && splits <= DIRECT;
    }
    if (parts) {
#pragma unroll 1
      for (int i = tid; i < T * HQ; i += THREADS) {
        const int t = i / HQ, head = i % HQ, splits = splits_of(l, t);
        if (splits == 1 || splits > DIRECT) continue;
        float highest[DIRECT], weights[DIRECT], top = -INFINITY_, sum = 0;
#pragma unroll
        for (int p = 0; p < DIRECT; p++) {
          const float* part = split_of(t * HKV + head / G, p < splits ? p : 0, head % G);
          highest[p] = p < splits ? load_fresh(part + HD) : -INFINITY_;
          weights[p] = load_fresh(part + HD + 1);
        }
#pragma unroll
        for (int p = 0; p < DIRECT; p++) top = highest[p] > top ? highest[p] : top;
#pragma unroll
        for (int p = 0; p < DIRECT; p++) sum += weights[p] *= exp_(highest[p] - top);
#pragma unroll
        for (int p = 0; p < DIRECT; p++) s.factors[t][head][p] = weights[p] == 0 ? 0 : exp_(highest[p] - top) / sum;
      }
      team_sync();
    }
    constexpr int N = (OUT + THREADS - 1) / THREADS;
#pragma unroll 1
    for (int t = 0; t < T; t++) {
      const int splits = splits_of(l, t);
      float x[N];
      if (splits == 1 || splits > DIRECT) {
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = i * THREADS + tid < OUT ? load_fresh(a.attended + t * OUT + i * THREADS + tid) : 0;
      } else {
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = 0;
#pragma unroll 2
        for (int p = 0; p < splits; p++)
#pragma unroll
          for (int i = 0; i < N; i++) {
            const int c = i * THREADS + tid, head = c / HD;
            if (c < OUT) x[i] = fma_(s.factors[t][head][p], load_fresh(split_of(t * HKV + head / G, p, head % G) + c % HD), x[i]);
          }
      }
#pragma unroll
      for (int i = 0; i < N; i++)
        if (i * THREADS + tid < OUT) s.xs[t][i * THREADS + tid] = from_float(x[i]);
    }
    team_sync();
  }

  DEVICE void output(const Layer& l) {
    gather(l);
    matrix(D, OUT, [&](int r) { return l.out_bias == nullptr ? 0 : to_float(l.out_bias[r]); },
           [&](int r, int t, float sum) { a.delta[t * D + r] = sum; });
  }

  // Publishes which experts are on, finds this block's share of their neurons, and lets the producer go on.
  DEVICE void route(const Layer& l, int layer) {
    if (E == 0) return;
    const u32 mark = (tag * a.num_layers + layer) << 8;
    const int end = share_end(E);
#pragma unroll 1
    for (int r = share_begin(E); r < end; r += ROWS) {
      const bool mine = tid < ROWS && r + tid < end;
      const float bias = mine && l.router_bias != nullptr ? l.router_bias[r + tid] : 0;
      Tile sum;
      tile_dot(&s.xs[0][0], XS, D, sum);
      share_tile(sum);
      if (mine) {
        u32 on = 0;
        // Rounded as every other path rounds it, so that all decide alike.
        for (int t = 0; t < T; t++) on |= (u32)(to_float(from_float(total(tid, t))) + bias > l.threshold) << t;
        store_relaxed(a.masks + r + tid, mark | on);
      }
    }
    // In ascending order: a prefix sum over the masks, each of which arrives in its own time.
    u32 words[PER_THREAD], votes[PER_THREAD];
    bool all;
    do {
      all = true;
#pragma unroll
      for (int k = 0; k < PER_THREAD; k++) {
        const int e = k * THREADS + tid;
        words[k] = e < E ? load_relaxed(a.masks + e) : mark;
        all &= (words[k] & ~255u) == mark;
      }
      spin();
    } while (!all);
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
    if (tid == 0) {
      s.first = share_begin(active * S);
      s.count = share_end(active * S) - s.first;
      arrive(s.routed);
    }
    team_sync();
  }

  DEVICE void neurons(const Layer& l, int layer) {
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
    long long* to = a.sums + (size_t)(layer & 1) * T * D;
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
      if (mine)
        each_column<SLICE, T>(sum, D - c - warp * SLICE, [&](int column, int t, float y) {
          const int i = c + warp * SLICE + column;
          if (blockIdx.x == 0 && l.down_bias != nullptr) y += to_float(l.down_bias[i]);
          add_relaxed(to + t * D + i, to_fixed(y * (1 / FIXED)));
        });
    }
  }

  DEVICE void clear_sums(int layer) {
    long long* to = a.sums + (size_t)(layer & 1) * T * D;
    const int end = share_end(T * D);
    for (int i = share_begin(T * D) + tid; i < end; i += THREADS) to[i] = 0;
  }
  DEVICE void fetch_layer(int layer) {
    constexpr int WORDS = sizeof(Layer) / 4;
    if (layer < a.num_layers && tid < WORDS) ((u32*)&s.layers[layer & 1])[tid] = ((const u32*)(a.layers + layer))[tid];
  }

  DEVICE void run() {
    int at = 1;  // which half of the residual is the newest
    float* halves[2] = {a.residual, a.residual + T * D};
    stamp();
    fetch_layer(0);
    clear_sums(0);
    clear_sums(1);
    team_sync();
#pragma unroll 1
    for (int i = 0; i < a.num_layers; i++) {
      const Layer& l = s.layers[i & 1];
      const long long* sums = a.sums + (size_t)((i - 1) & 1) * T * D;
      add_and_norm(i > 0 ? halves[at] : nullptr, sums, i > 0 ? s.layers[(i - 1) & 1].post2 : nullptr, halves[1 - at], l.norm1);
      at = 1 - at;
      stamp();
      matrix(NQKV, D,
             [&](int r) {
               const elem* bias = r < OUT ? l.q_bias : r < OUT + HKV * HD ? l.k_bias : l.v_bias;
               const int i = r < OUT ? r : r < OUT + HKV * HD ? r - OUT : r - OUT - HKV * HD;
               return bias == nullptr ? 0 : to_float(bias[i]);
             },
             [&](int r, int t, float sum) { a.qkv[t * NQKV + r] = sum; });
      arrive_at_grid();
      attention(l);
      // All have read what the last layer added.
      if (i > 0) clear_sums(i - 1);
      grid_sync();
      output(l);
      fetch_layer(i + 1);
      grid_sync();
      add_and_norm(halves[at], nullptr, l.post1, halves[1 - at], l.norm2);
      at = 1 - at;
      stamp();
      route(l, i);
      stamp();
      neurons(l, i);
      grid_sync();
    }
    const int last = a.num_layers - 1;
    add_and_norm(halves[at], a.sums + (size_t)(last & 1) * T * D, s.layers[last & 1].post2, nullptr, a.final_norm);
    matrix(V, D, [&](int r) { return a.head_bias == nullptr ? 0 : to_float(a.head_bias[r]); },
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

#ifndef LTE_ON_CPU
extern "C" __device__ int shared_bytes = sizeof(Shared);
#endif

extern "C" KERNEL void decode_step(const Args a) {
  SHARED_MEMORY(Shared, s);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      start_barrier(s.full[i], 1);
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
}
extern "C" int launch(const Args* a, int grid, unsigned seed) {
  launched = a;
  return run_grid(grid, THREADS + 32 * FETCHERS, THREADS, seed);
}
#endif
