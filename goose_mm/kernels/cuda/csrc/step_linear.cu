// Products of some matrices with very few columns: y[b, row] = sum over k of weight[row, k] x[b, k].
//
// Time goes into reading the weights, once: AHEAD chunks of them are on their way, the first before the kernel ahead
// has ended. A tile is ROWS rows of a matrix; of every CHUNK columns each warp takes 64. A thread asks for the very numbers
// that it will multiply: within 32 columns a lane has 8 neighbours, and the product takes them as if they lay where the
// instruction wants them, since x is read in the same order. A row's sums do not depend on the other rows of x.
// Options: IO (bf16, f16), COLUMNS (1 to 8) rows of x that a block takes, CHUNKS of a part of the columns at most.
#include "matrices.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS, ROWS = 16, CHUNK = 64 * WARPS, AHEAD = 4;
// matrices that may be on their way, each with its x
constexpr int BUFFERS = AHEAD / (CHUNKS > 1 ? CHUNKS - 1 : 1) + 2;
// of x in shared memory: eight lanes that read 16 bytes each meet all banks once
constexpr int STRIDE = CHUNKS * CHUNK + 32;

struct Shared {
  uint4 weights[AHEAD][2][2][THREADS];  // rows 0 and 8 further, columns 0 and 32 further
  IO x[BUFFERS][COLUMNS][STRIDE];
  float sums[WARPS][COLUMNS][ROWS + 4];
};

// Chunk by chunk, tile by tile: a block's tiles are neighbours, so most of them share their x.
struct Walk {
  int tile, end, chunk, buffer;
  Matrix matrix;
  int at;           // which of the matrix's tiles
  METHOD bool inside() const { return tile < end; }
  METHOD bool enter(const Matrices& matrices) {  // whether x is another than that of the tile before
    const IO* before = matrix.x;
    if (!inside() || !matrices.find(tile, ROWS, matrix, at) || matrix.x == before) return false;
    buffer = buffer + 1 == BUFFERS ? 0 : buffer + 1;
    return true;
  }
  METHOD bool step(const Matrices& matrices, int chunks) {
    if (++chunk < chunks) return false;
    chunk = 0, tile++;
    return enter(matrices);
  }
};

KERNEL(THREADS, 2) wkv7_step_linear(const Matrices matrices, i64 B, i64 parts) {
  let_next_begin();
  Shared& shared = *(Shared*)shared_memory();
  const int warp = thread() / 32, lane = thread() % 32, group = lane / 4, pair = 2 * (lane % 4);
  const int K = matrices.K, tiles = matrices.tiles, blocks = blocks_x();
  const int all = (K + CHUNK - 1) / CHUNK, part = block_y() % parts, first_row = block_y() / parts * COLUMNS;
  const int first = part * all / parts, chunks = (part + 1) * all / parts - first, begin = first * CHUNK;
  const int columns = B - first_row < COLUMNS ? B - first_row : COLUMNS;
  const int width = K - begin < chunks * CHUNK ? K - begin : chunks * CHUNK;  // of this part

  Walk now{(int)((i64)block_x() * tiles / blocks), (int)((i64)(block_x() + 1) * tiles / blocks), 0, -1, {}, 0};
  now.enter(matrices);
  Walk ahead = now;
  const int lane_row = group, lane_k = begin + warp * 64 + lane % 4 * 8;
  auto request = [&](int place) {
    if (!ahead.inside()) return;
    int row = ahead.at * ROWS + lane_row, k = lane_k + ahead.chunk * CHUNK;
    const IO* from = ahead.matrix.weight + (i64)row * K + k;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int block = 0; block < 2; block++) {
        bool valid = k < K && row + 8 * half < ahead.matrix.rows;
        copy_async(&shared.weights[place][half][block][thread()],
                   valid ? from + 8 * half * K + 32 * block : matrices.of[0].weight, valid);
      }
  };
  auto fetch = [&](const Walk& walk, bool early) {  // its x, and wait for it unless it is early
    for (int i = thread(); i < columns * (width / 8); i += THREADS) {
      int row = i / (width / 8), k = i % (width / 8) * 8;
      void* to = &shared.x[walk.buffer][row][k];
      const IO* from = walk.matrix.x + (i64)(first_row + row) * K + begin + k;
      if (early) copy_async(to, from, true);
      else *(uint4*)to = *(const uint4*)from;
    }
  };
#pragma unroll
  for (int i = 0; i < AHEAD; i++) request(i), copy_commit(), ahead.step(matrices, chunks);
  wait_for_previous();

  for (Walk walk = now; walk.inside() && walk.tile <= ahead.tile; walk.tile++)
    if (walk.tile == now.tile || walk.enter(matrices)) fetch(walk, false);
  float sums[4] = {};
  for (int i = 0; now.inside(); i = i + 1 == AHEAD ? 0 : i + 1) {
    copy_wait<AHEAD - 1>();
    if (now.chunk == 0) sync_threads();  // x is here, and the sums before are written
    if (lane_k + now.chunk * CHUNK < K)
#pragma unroll
      for (int block = 0; block < 2; block++) {
        const int k = now.chunk * CHUNK + warp * 64 + 32 * block + lane % 4 * 8;
        const uint4 b = *(const uint4*)&shared.x[now.buffer][group < columns ? group : 0][k];
        const uint4 top = shared.weights[i][0][block][thread()], bottom = shared.weights[i][1][block][thread()];
        const u32 even[4] = {top.x, bottom.x, top.y, bottom.y}, odd[4] = {top.z, bottom.z, top.w, bottom.w};
        multiply_add(sums, even, b.x, b.y, IO());
        multiply_add(sums, odd, b.z, b.w, IO());
      }
    request(i);
    if (ahead.inside() && ahead.step(matrices, chunks)) fetch(ahead, true);
    copy_commit();
    if (now.chunk + 1 == chunks) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (pair + j % 2 < COLUMNS) shared.sums[warp][pair + j % 2][group + j / 2 * 8] = sums[j];
        sums[j] = 0;
      }
      sync_threads();
      if (thread() < ROWS * columns) {
        int row = thread() % ROWS, column = thread() / ROWS;
        float y = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) y += shared.sums[w][column][row];
        now.matrix.store(now.at * ROWS + row, first_row + column, y, part * B);
      }
    }
    now.step(matrices, chunks);
  }
}

SIZES(THREADS, sizeof(Shared));
