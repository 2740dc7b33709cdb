// Products of sixteen rows of weights in shared memory with the inputs of up to eight tokens, by one warp.
//
// Inputs lie as [T][pitch]; tokens from T on are read as token 0, and nobody reads what becomes of them.

// Row r of sixteen lies r % 8 * PITCH + r / 8 * HALF bytes behind the first: one after the other, or, where HALF is less than
// PITCH, pairs of rows that follow each other are the rows r and r + 8.
template <int PITCH, int HALF> DEVICE int offset_of(int row) { return row % 8 * PITCH + row / 8 * HALF; }
template <int PITCH, int HALF> DEVICE int rank_of(int row) { return HALF < PITCH ? row % 8 * 2 + row / 8 : row; }

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

// Which column the sum i of the square k belongs to: products of weights in 8 and 4 bits take them in another order.
template <int BITS> DEVICE int column_of(int k, int i) {
  const int lane = threadIdx.x % 32;
  if (BITS == 8) return k * 16 + lane / 4 * 2 + i / 2;
  if (BITS == 4) return k / 2 * 32 + lane / 4 * 4 + k % 2 * 2 + i / 2;
  return k * 16 + lane / 4 + i / 2 * 8;
}

// Calls emit(column, token, sum) for the `width` columns that count.
template <int WIDTH, int TOKENS, int BITS = 16, class Emit> DEVICE void each_column(const Columns<WIDTH>& columns, int width, Emit emit) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < (WIDTH + 15) / 16; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int column = column_of<BITS>(k, i), token = lane % 4 * 2 + i % 2;
      if (token < TOKENS && column < WIDTH && column < width) emit(column, token, columns.c[k][i]);
    }
}

#if LTE_ELEM != 32
template <int TOKENS> DEVICE const elem* token_row(const elem* inputs, int pitch) {
  const int lane = threadIdx.x % 32, token = lane % 8;
  return inputs + (token < TOKENS ? token : 0) * pitch + lane / 8 * 8;
}

// tile += rows [16, WIDTH] at `weights` times inputs [T, WIDTH], of which `width` columns count, a multiple of 32.
template <int WIDTH, int PITCH, int TOKENS = T, int HALF = 8 * PITCH>
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
      load_matrices(a, weights + offset_of<PITCH, HALF>(lane % 16) + (k + half * 16 + lane / 16 * 8) * sizeof(elem));
      multiply(tile.c, a, b[2 * half], b[2 * half + 1]);
    }
  }
}

// columns += transposed rows [16, WIDTH] at `weights`, of which the first `rows` count, times inputs [T, 16].
template <int WIDTH, int PITCH, int TOKENS = T, int HALF = 8 * PITCH>
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
    keep[half] = (rank_of<PITCH, HALF>(row) < rows ? 0xffffu : 0) | (rank_of<PITCH, HALF>(row + 1) < rows ? 0xffff0000u : 0);
  }
#pragma unroll
  for (int k = 0; k < WIDTH; k += 16) {
    unsigned a[4];
    // Four squares of 8: the columns of neurons 0 to 7, then those of 8 to 15.
    load_matrices_transposed(a, weights + offset_of<PITCH, HALF>(lane / 16 * 8 + lane % 8) + (k + lane / 8 % 2 * 8) * sizeof(elem));
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] &= keep[i / 2];
    multiply(columns.c[k / 16], a, b[0], b[1]);
  }
}
#else
// The same in fp32 without tensor cores, for checks: each lane computes its own elements.
template <int WIDTH, int PITCH, int TOKENS = T, int HALF = 8 * PITCH>
DEVICE void tile_product(Tile& tile, const char* weights, const elem* inputs, int pitch, int width) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, token = lane % 4 * 2 + i % 2;
    const float *w = (const float*)(weights + offset_of<PITCH, HALF>(row)), *x = inputs + (token < TOKENS ? token : 0) * pitch;
    for (int k = 0; k < WIDTH && k < width; k++) tile.c[i] = fma_(w[k], x[k], tile.c[i]);
  }
}
template <int WIDTH, int PITCH, int TOKENS = T, int HALF = 8 * PITCH>
DEVICE void columns_product(Columns<WIDTH>& columns, const char* weights, const elem* inputs, int pitch, int rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < (WIDTH + 15) / 16; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int column = k * 16 + lane / 4 + i / 2 * 8, token = lane % 4 * 2 + i % 2;
      if (column < WIDTH)
        for (int r = 0; r < 16; r++)
          if (rank_of<PITCH, HALF>(r) < rows)
            columns.c[k][i] = fma_(((const float*)(weights + offset_of<PITCH, HALF>(r)))[column],
                                   inputs[(token < TOKENS ? token : 0) * pitch + r], columns.c[k][i]);
    }
}
#endif

// Weights in 8 and 4 bits.
//
// Bytes are numbers with a scale for each output, which comes later. Half bytes u stand for (u - 8) scale + zero: `Pair`,
// for each group of GROUP numbers along the input of a product.
struct alignas(2 * sizeof(elem)) Pair { elem scale, zero; };

#if LTE_ELEM != 32
#if LTE_ELEM == 16
constexpr unsigned ONES = 0x3c003c00;
// Two numbers of 8 bits, signed, from the low bytes of the halves of a word; the bits of x with an exponent are 1024 + x.
DEVICE unsigned from_bytes(unsigned x) { return multiply_add(((x ^ 0x00800080) & 0x00ff00ff) | 0x64006400, ONES, 0xe480e480); }
// The lowest four bits of the halves, less 8.
DEVICE unsigned from_half_bytes(unsigned x) { return multiply_add((x & 0x000f000f) | 0x64006400, ONES, 0xe408e408); }
#else
constexpr unsigned ONES = 0x3f803f80;
// bf16 has 7 bits: the sign is taken off on its own, as 128 or 256.
DEVICE unsigned from_bytes(unsigned x) {
  return multiply_add((x & 0x007f007f) | 0x43004300, ONES, (x & 0x00800080) | 0xc300c300);
}
DEVICE unsigned from_half_bytes(unsigned x) { return multiply_add((x & 0x000f000f) | 0x43004300, ONES, 0xc308c308); }
#endif
DEVICE unsigned twice(elem x) { return x_bits(x) * 0x10001u; }

// As `tile_product`, of bytes. A lane's four bytes are two pairs of the columns 4 (lane % 4) and on.
template <int WIDTH, int PITCH>
DEVICE void bytes_product(Tile& tile, const char* weights, const elem* inputs, int pitch, int width) {
  const int lane = threadIdx.x % 32;
  const elem* x = inputs + (lane / 4 < T ? lane / 4 : 0) * pitch + lane % 4 * 4;
#pragma unroll
  for (int k = 0; k < WIDTH; k += 32) {
    if (k >= width) break;
    unsigned rows[4];
    load_matrices(rows, weights + lane % 16 * PITCH + k + lane / 16 * 16);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const unsigned low = rows[2 * half], high = rows[2 * half + 1];
      const unsigned a[4] = {from_bytes(spread(low, 0)), from_bytes(spread(high, 0)), from_bytes(spread(low, 2)),
                             from_bytes(spread(high, 2))};
      const uint2 b = *(const uint2*)(x + k + half * 16);
      multiply(tile.c, a, b.x, b.y);
    }
  }
}

// As `tile_product`, of half bytes, with the row's pairs. In a word lie the columns 0, 2, 4, 6, 1, 3, 5, 7, so that each
// product takes what a shift and a mask give.
template <int WIDTH, int PITCH, int GROUP>
DEVICE void half_bytes_product(Tile& tile, const char* weights, const char* pairs, const elem* inputs, int pitch, int width) {
  const int lane = threadIdx.x % 32;
  const elem* x = inputs + (lane / 4 < T ? lane / 4 : 0) * pitch + lane % 4 * 8;
  unsigned rows[4], scale[2], zero[2];
#pragma unroll
  for (int k = 0; k < WIDTH; k += 32) {
    if (k >= width) break;
    if (k % 64 == 0) load_matrices(rows, weights + lane % 16 * PITCH + k / 2 + lane / 16 * 16);
#pragma unroll
    for (int r = 0; r < 2; r++)
      if (k % GROUP == 0) {
        const Pair pair = *(const Pair*)(pairs + (lane / 4 + r * 8) * PITCH + k / GROUP * sizeof(Pair));
        scale[r] = twice(pair.scale), zero[r] = twice(pair.zero);
      }
    const uint4 b = *(const uint4*)(x + k);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      unsigned a[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        a[i] = multiply_add(from_half_bytes(rows[k % 64 / 32 * 2 + i % 2] >> (half * 8 + i / 2 * 4)), scale[i % 2], zero[i % 2]);
      multiply(tile.c, a, half == 0 ? b.x : b.z, half == 0 ? b.y : b.w);
    }
  }
}

// As `columns_product`, of bytes; the inputs of rows that do not count are zero.
template <int WIDTH, int PITCH>
DEVICE void bytes_columns(Columns<WIDTH>& columns, const char* weights, const elem* inputs, int pitch) {
  const int lane = threadIdx.x % 32;
  unsigned b[4];
  load_matrices(b, token_row<T>(inputs, pitch) - lane / 16 * 16);
#pragma unroll
  for (int k = 0; k < WIDTH; k += 32) {
    unsigned rows[4];
    load_matrices_transposed(rows, weights + lane % 16 * PITCH + k + lane / 16 * 16);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const unsigned low = rows[2 * half], high = rows[2 * half + 1];
      const unsigned a[4] = {from_bytes(low), from_bytes(low >> 8), from_bytes(high), from_bytes(high >> 8)};
      multiply(columns.c[k / 16 + half], a, b[0], b[1]);
    }
  }
}

// As `columns_product`, of half bytes in the order of the columns; `pairs` are those of this lane's columns, and the inputs
// begin at any even one.
template <int WIDTH, int PITCH>
DEVICE void half_bytes_columns(Columns<WIDTH>& columns, const char* weights, const Pair (&pairs)[WIDTH / 8],
                               const elem* inputs, int pitch, int rows) {
  const int lane = threadIdx.x % 32;
  const elem* x = inputs + (lane / 4 < T ? lane / 4 : 0) * pitch + lane % 4 * 2;
  // Inputs of rows that do not count are those of other groups.
  const unsigned b0 = lane % 4 * 2 < rows ? *(const unsigned*)x : 0, b1 = lane % 4 * 2 + 8 < rows ? *(const unsigned*)(x + 8) : 0;
#pragma unroll
  for (int k = 0; k < WIDTH; k += 64) {
    unsigned squares[4];
    load_matrices_transposed(squares, weights + lane % 16 * PITCH + (k + lane / 16 * 32) / 2);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      unsigned a[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const Pair& pair = pairs[k / 8 + j * 2 + i % 2];
        a[i] = multiply_add(from_half_bytes(squares[j / 2 * 2 + i / 2] >> (j % 2 * 8 + i % 2 * 4)), twice(pair.scale), twice(pair.zero));
      }
      multiply(columns.c[k / 16 + j], a, b0, b1);
    }
  }
}
#else
DEVICE float half_byte(const char* row, int k, bool mixed) {
  const int place = mixed ? k / 8 * 8 + k % 8 / 2 + k % 2 * 4 : k;
  return (float)((((const unsigned char*)row)[place / 2] >> place % 2 * 4 & 15) - 8);
}
template <int WIDTH, int PITCH>
DEVICE void bytes_product(Tile& tile, const char* weights, const elem* inputs, int pitch, int width) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, token = lane % 4 * 2 + i % 2;
    const float* x = inputs + (token < T ? token : 0) * pitch;
    for (int k = 0; k < WIDTH && k < width; k++) tile.c[i] = fma_((float)((const signed char*)weights)[row * PITCH + k], x[k], tile.c[i]);
  }
}
template <int WIDTH, int PITCH, int GROUP>
DEVICE void half_bytes_product(Tile& tile, const char* weights, const char* pairs, const elem* inputs, int pitch, int width) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, token = lane % 4 * 2 + i % 2;
    const float* x = inputs + (token < T ? token : 0) * pitch;
    for (int k = 0; k < WIDTH && k < width; k++) {
      const Pair pair = ((const Pair*)(pairs + row * PITCH))[k / GROUP];
      tile.c[i] = fma_(fma_(half_byte(weights + row * PITCH, k, true), pair.scale, pair.zero), x[k], tile.c[i]);
    }
  }
}
template <int WIDTH, int PITCH>
DEVICE void bytes_columns(Columns<WIDTH>& columns, const char* weights, const elem* inputs, int pitch) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < WIDTH / 16; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int column = column_of<8>(k, i), token = lane % 4 * 2 + i % 2;
      const float* x = inputs + (token < T ? token : 0) * pitch;
      for (int r = 0; r < 16; r++)
        columns.c[k][i] = fma_((float)((const signed char*)weights)[r * PITCH + column], x[r], columns.c[k][i]);
    }
}
template <int WIDTH, int PITCH>
DEVICE void half_bytes_columns(Columns<WIDTH>& columns, const char* weights, const Pair (&pairs)[WIDTH / 8],
                               const elem* inputs, int pitch, int rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < WIDTH / 16; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int token = lane % 4 * 2 + i % 2;
      const float* x = inputs + (token < T ? token : 0) * pitch;
      const Pair& pair = pairs[k * 2 + i / 2];
      for (int r = 0; r < 16 && r < rows; r++) {
        const float weight = fma_(half_byte(weights + r * PITCH, column_of<4>(k, i), false), pair.scale, pair.zero);
        columns.c[k][i] = fma_(weight, x[r], columns.c[k][i]);
      }
    }
}
#endif
