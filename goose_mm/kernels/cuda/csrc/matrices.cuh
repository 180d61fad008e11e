// The matrices that a launch multiplies: all have the same number of columns.
#pragma once
#include "step.cuh"

enum Kind { PLAIN, TANH, SIGMOID, SQUARED_RELU, FLOAT };

// y[b, row] = sum over k of weight[row, k] x[b, k]
struct Matrix {
  const IO* weight;  // [rows, K]
  const IO* x;       // [B, K]
  void* y;           // [B, stride] of IO, or [parts, B, stride] of float
  i64 rows, stride, kind;

  METHOD float activated(float sum) const {
    if (kind == TANH) return tanhf(sum);
    if (kind == SIGMOID) return sigmoid(sum);
    if (kind == SQUARED_RELU) return sum > 0 ? sum * sum : 0;
    return sum;
  }
  // `part_rows` lie before this part of the sums.
  METHOD void store(i64 row, i64 b, float sum, i64 part_rows) const {
    if (row >= rows) return;
    if (kind == FLOAT) ((float*)y)[(part_rows + b) * stride + row] = sum;
    else store_one((IO*)y + b * stride + row, activated(sum));
  }
  // Of this row, which is even, and the next.
  METHOD void store(i64 row, i64 b, float sum, float next, i64 part_rows) const {
    if (row + 1 >= rows || stride % 2) store(row, b, sum, part_rows), store(row + 1, b, next, part_rows);
    else if (kind == FLOAT) store_pair((float*)y + (part_rows + b) * stride + row, sum, next);
    else store_pair((IO*)y + b * stride + row, activated(sum), activated(next));
  }
};

constexpr int MOST = 7;
struct Matrices {
  i64 count, tiles, K;  // tiles of the rows of all
  Matrix of[MOST];

  // The matrix of a tile of `height` rows, and which of its tiles that is; false behind the last.
  METHOD bool find(int tile, int height, Matrix& matrix, int& at) const {
    at = tile;
#pragma unroll
    for (int i = 0; i < MOST; i++)
      if (i < count) {
        int its = (of[i].rows + height - 1) / height;
        if (at < its) {
          matrix = of[i];
          return true;
        }
        at -= its;
      }
    return false;
  }
};
