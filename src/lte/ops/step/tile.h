// Products of sixteen rows of weights in shared memory with the inputs of up to eight tokens, by one warp.
//
// Inputs lie as [T][pitch]; tokens from T on are read as token 0, and nobody reads what becomes of them.

// 16 rows by 8 tokens: element (row, token) is c[i] of lane 4 (row % 8) + token / 2, i = 2 (row / 8) + token % 2.
struct Tile { float c[4]; };
DEVICE void clear(Tile& tile) { for (int i = 0; i < 4; i++) tile.c[i] = 0; }

// `WIDTH` columns of the output, for each of 8 tokens.
template <int WIDTH> struct Columns { float c[(WIDTH + 15) / 16][4]; };
template <int WIDTH> DEVICE void clear(Columns<WIDTH>& columns) {
#pragma unroll
  for (int i = 0; i < (WIDTH + 15) / 16; i++)
    for (int j = 0; j < 4; j++) columns.c[i][j] = 0;
}

template <int TOKENS, int PITCH> DEVICE void store_tile(const Tile& tile, float* to) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, token = lane % 4 * 2 + i % 2;
    if (token < TOKENS) to[row * PITCH + token] = tile.c[i];
  }
}

// Calls emit(column, token, sum) for the `width` columns that count.
template <int WIDTH, int TOKENS, class Emit> DEVICE void each_column(const Columns<WIDTH>& columns, int width, Emit emit) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < (WIDTH + 15) / 16; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int column = k * 16 + lane / 4 + i / 2 * 8, token = lane % 4 * 2 + i % 2;
      if (token < TOKENS && column < WIDTH && column < width) emit(column, token, columns.c[k][i]);
    }
}

#if LTE_ELEM != 32
template <int TOKENS> DEVICE const elem* token_row(const elem* inputs, int pitch) {
  const int lane = threadIdx.x % 32, token = lane % 8;
  return inputs + (token < TOKENS ? token : 0) * pitch + lane / 8 * 8;
}

// tile += rows [16, WIDTH] at `weights` times inputs [T, WIDTH], of which `width` columns count, a multiple of 32.
template <int WIDTH, int PITCH, int TOKENS = T>
DEVICE void tile_product(Tile& tile, const char* weights, const elem* inputs, int pitch, int width) {
  // Two products of 16 columns share a load of the inputs.
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < WIDTH; k += 32) {
    if (k >= width) break;
    unsigned b[4], a[4];
    load_matrices(b, token_row<TOKENS>(inputs + k, pitch));
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (k + half * 16 >= WIDTH) break;
      load_matrices(a, weights + lane % 16 * PITCH + (k + half * 16 + lane / 16 * 8) * sizeof(elem));
      multiply(tile.c, a, b[2 * half], b[2 * half + 1]);
    }
  }
}

// columns += transposed rows [16, WIDTH] at `weights`, of which `rows` count, times inputs [T, 16].
template <int WIDTH, int PITCH, int TOKENS = T>
DEVICE void columns_product(Columns<WIDTH>& columns, const char* weights, const elem* inputs, int pitch, int rows) {
  const int lane = threadIdx.x % 32;
  unsigned b[4];
  // The lanes from 16 on ask for what is not used.
  load_matrices(b, token_row<TOKENS>(inputs, pitch) - lane / 16 * 16);
  // Rows that were not fetched hold anything, NaN too.
  unsigned keep[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = half * 8 + lane % 4 * 2;
    keep[half] = (row < rows ? 0xffffu : 0) | (row + 1 < rows ? 0xffff0000u : 0);
  }
#pragma unroll
  for (int k = 0; k < WIDTH; k += 16) {
    unsigned a[4];
    // Four squares of 8: the columns of neurons 0 to 7, then those of 8 to 15.
    load_matrices_transposed(a, weights + (lane / 16 * 8 + lane % 8) * PITCH + (k + lane / 8 % 2 * 8) * sizeof(elem));
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] &= keep[i / 2];
    multiply(columns.c[k / 16], a, b[0], b[1]);
  }
}
#else
// The same in fp32 without tensor cores, for checks: each lane computes its own elements.
template <int WIDTH, int PITCH, int TOKENS = T>
DEVICE void tile_product(Tile& tile, const char* weights, const elem* inputs, int pitch, int width) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, token = lane % 4 * 2 + i % 2;
    const float *w = (const float*)(weights + row * PITCH), *x = inputs + (token < TOKENS ? token : 0) * pitch;
    for (int k = 0; k < WIDTH && k < width; k++) tile.c[i] = fma_(w[k], x[k], tile.c[i]);
  }
}
template <int WIDTH, int PITCH, int TOKENS = T>
DEVICE void columns_product(Columns<WIDTH>& columns, const char* weights, const elem* inputs, int pitch, int rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < (WIDTH + 15) / 16; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int column = k * 16 + lane / 4 + i / 2 * 8, token = lane % 4 * 2 + i % 2;
      if (column < WIDTH)
        for (int r = 0; r < 16 && r < rows; r++)
          columns.c[k][i] = fma_(((const float*)(weights + r * PITCH))[column], inputs[(token < TOKENS ? token : 0) * pitch + r], columns.c[k][i]);
    }
}
#endif
