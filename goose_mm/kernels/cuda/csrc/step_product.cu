// Products of some matrices with a batch of columns: y[b, row] = sum over k of weight[row, k] x[b, k].
//
// A block takes HEIGHT rows of the matrix and WIDTH of the batch. Of STEP columns at a time, which wait in shared
// memory, STAGES deep, each of SPLIT groups of warps takes 64, and their sums are added up at the end. Weights are asked for
// before the kernel ahead has ended.
// Options: IO (bf16, f16), HEIGHT, WIDTH, the warps of a group DOWN the rows and ACROSS the batch, SPLIT, STAGES.
#include "matrices.cuh"

constexpr int BLOCK = 64, STEP = BLOCK * SPLIT;
constexpr int GROUP = 32 * DOWN * ACROSS, THREADS = GROUP * SPLIT;
constexpr int MINE_WIDE = WIDTH / ACROSS / 16, MINE_HIGH = HEIGHT / DOWN / 8;  // pieces of 16 of the batch, of 8 rows
static_assert(MINE_HIGH % 2 == 0, "a warp loads two pieces of the weights at once");

union Shared {
  struct { IO weights[SPLIT][HEIGHT * BLOCK], x[SPLIT][WIDTH * BLOCK]; } stages[STAGES];
  float sums[SPLIT > 1 ? SPLIT - 1 : 1][MINE_WIDE * MINE_HIGH * 4][GROUP];
};

// Rows of BLOCK numbers, such that eight of them meet all banks: place of the eight at column k.
DEVICE int place(int row, int k) { return row * BLOCK + (k ^ (row & 7) << 3); }

KERNEL(THREADS, THREADS > 256 ? 1 : 2) wkv7_step_product(const Matrices matrices, i64 B, i64 parts) {
  let_next_begin();
  Shared& shared = *(Shared*)shared_memory();
  const int lane = thread() % 32, warp = thread() / 32 % (DOWN * ACROSS), split = thread() / GROUP;
  const int across = warp / DOWN * (WIDTH / ACROSS), down = warp % DOWN * (HEIGHT / DOWN);
  const int K = matrices.K, all = (K + STEP - 1) / STEP;
  const int part = block_y() % parts, first_row = block_y() / parts * WIDTH;
  const int begin = part * all / parts, steps = (part + 1) * all / parts - begin;
  Matrix matrix;
  int tile;
  matrices.find(block_x(), HEIGHT, matrix, tile);
  const int top = tile * HEIGHT, high = matrix.rows - top, wide = B - first_row;

  // a thread fetches the same column of every so many rows, step by step
  constexpr int LINES = THREADS / (STEP / 8);
  const int line = thread() / (STEP / 8), column = thread() % (STEP / 8) * 8, left = K - begin * STEP - column;
  const int to = column / BLOCK, at = place(line, column % BLOCK);  // the same bank of every LINES-th row
  static_assert(LINES % 8 == 0, "or else they lie in other banks");
  const IO* weight = matrix.weight + (i64)(top + line) * K + begin * STEP + column;
  const IO* x_row = matrix.x + (i64)(first_row + line) * K + begin * STEP + column;
  auto fetch_weights = [&](int step) {
    if (step >= steps) return;
    IO* stage = shared.stages[step % STAGES].weights[to] + at;
#pragma unroll
    for (int i = 0; i < HEIGHT / LINES; i++) {
      bool valid = line + i * LINES < high && step * STEP < left;
      copy_async(stage + i * LINES * BLOCK, valid ? weight + (i64)i * LINES * K + step * STEP : matrix.weight, valid);
    }
  };
  auto fetch_x = [&](int step) {
    if (step >= steps) return;
    IO* stage = shared.stages[step % STAGES].x[to] + at;
#pragma unroll
    for (int i = 0; i < (WIDTH + LINES - 1) / LINES; i++) {
      if (WIDTH % LINES && line + i * LINES >= WIDTH) break;
      bool valid = line + i * LINES < wide && step * STEP < left;
      copy_async(stage + i * LINES * BLOCK, valid ? x_row + (i64)i * LINES * K + step * STEP : matrix.x, valid);
    }
  };
  for (int i = 0; i < STAGES - 1; i++) fetch_weights(i);
  wait_for_previous();
  for (int i = 0; i < STAGES - 1; i++) fetch_x(i), copy_commit();

  float sums[MINE_WIDE][MINE_HIGH][4] = {};
  // where a lane points: rows down, then columns right, in x; columns right, then rows down, in the weights
  const int x_at = (across + lane % 16) * BLOCK, x_k = lane / 16 * 8, turn = (lane & 7) << 3;
  const int w_at = (down + lane % 8 + lane / 16 * 8) * BLOCK, w_k = lane & 8;
  for (int step = 0; step < steps; step++) {
    copy_wait<STAGES - 2>();
    sync_threads();
    fetch_weights(step + STAGES - 1), fetch_x(step + STAGES - 1), copy_commit();
    const f16* weights = (const f16*)shared.stages[step % STAGES].weights[split] + w_at;
    const f16* x = (const f16*)shared.stages[step % STAGES].x[split] + x_at;
#pragma unroll
    for (int k = 0; k < BLOCK; k += 16) {
      u32 a[MINE_WIDE][4], b[MINE_HIGH / 2][4];
#pragma unroll
      for (int i = 0; i < MINE_WIDE; i++) load_matrices(a[i], x + 16 * i * BLOCK + ((k + x_k) ^ turn));
#pragma unroll
      for (int j = 0; j < MINE_HIGH / 2; j++) load_matrices(b[j], weights + 16 * j * BLOCK + ((k + w_k) ^ turn));
#pragma unroll
      for (int i = 0; i < MINE_WIDE; i++)
#pragma unroll
        for (int j = 0; j < MINE_HIGH; j++)
          multiply_add(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], IO());
    }
  }
  float* flat = &sums[0][0][0];
  if (SPLIT > 1) {
    copy_wait<0>();
    sync_threads();  // the stages are no longer read
    if (split)
#pragma unroll
      for (int i = 0; i < MINE_WIDE * MINE_HIGH * 4; i++) shared.sums[split - 1][i][thread() % GROUP] = flat[i];
    sync_threads();
    if (split) return;
#pragma unroll
    for (int s = 0; s < SPLIT - 1; s++)
#pragma unroll
      for (int i = 0; i < MINE_WIDE * MINE_HIGH * 4; i++) flat[i] += shared.sums[s][i][thread()];
  }
#pragma unroll
  for (int i = 0; i < MINE_WIDE; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int b = across + 16 * i + lane / 4 + 8 * half;
      if (b < wide)
#pragma unroll
        for (int j = 0; j < MINE_HIGH; j++)
          matrix.store(top + down + 8 * j + 2 * (lane % 4), first_row + b, sums[i][j][2 * half],
                       sums[i][j][2 * half + 1], part * B);
    }
}

SIZES(THREADS, sizeof(Shared));
