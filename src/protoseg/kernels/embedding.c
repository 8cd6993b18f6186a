/* What embedding.py says in PyTorch, an image row at a time: a row's numbers are read and written once, and what comes
   of them stays in the second cache. The file includes itself once for float and once for double. */

#ifndef REAL

#include "native.h"

#define REAL float
#include "embedding.c"
#undef REAL
#define REAL double
#include "embedding.c"

#else

/* (w, D) numbers of an image row -> their lengths: of each channel along the width (D), or of each pixel (w). */
static void NAME(lengths_of)(const REAL *x, int64_t w, int64_t D, int64_t along_width, REAL *lengths) {
  if (along_width)
    for (int64_t d = 0; d < D; d++) lengths[d] = 0;
  for (int64_t i = 0; i < w; i++) {
    const REAL *from = x + i * D;
    if (along_width) {
#pragma omp simd
      for (int64_t d = 0; d < D; d++) lengths[d] += from[d] * from[d];
    } else {
      REAL sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < D; d++) sum += from[d] * from[d];
      lengths[i] = sum;
    }
  }
  for (int64_t j = 0; j < (along_width ? D : w); j++) {
    REAL length = (REAL)sqrt(lengths[j]);
    lengths[j] = length < (REAL)HELD ? (REAL)HELD : length;
  }
}

/* Pixel i of the row at unit length. */
static void NAME(at_unit)(const REAL *x, const REAL *lengths, int64_t i, int64_t D, int64_t along_width, REAL *unit) {
  const REAL *from = x + i * D;
  if (along_width) {
#pragma omp simd
    for (int64_t d = 0; d < D; d++) unit[d] = from[d] / lengths[d];
  } else {
#pragma omp simd
    for (int64_t d = 0; d < D; d++) unit[d] = from[d] / lengths[i];
  }
}

/* features, out: (rows, w, D). lengths: (rows, D) along the width, or (rows, w). moments: (2, rows * w) mean and one over
   the deviation, with weight and bias (D); all three NULL where there is no LayerNorm. */
int NAME(normed_rows)(const REAL *features, int64_t rows, int64_t w, int64_t D, int64_t along_width,
                      const REAL *weight, const REAL *bias, double eps, REAL *out, REAL *lengths, REAL *moments,
                      int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < rows; r++) {
    const REAL *x = features + r * w * D;
    REAL *length = lengths + r * (along_width ? D : w);
    NAME(lengths_of)(x, w, D, along_width, length);
    for (int64_t i = 0; i < w; i++) {
      REAL *to = out + (r * w + i) * D;
      NAME(at_unit)(x, length, i, D, along_width, to);
      if (!weight) continue;
      REAL mean = 0, square = 0;
#pragma omp simd reduction(+ : mean)
      for (int64_t d = 0; d < D; d++) mean += to[d];
      mean /= D;
#pragma omp simd reduction(+ : square)
      for (int64_t d = 0; d < D; d++) square += (to[d] - mean) * (to[d] - mean);
      const REAL steep = 1 / (REAL)sqrt(square / D + (REAL)eps);
#pragma omp simd
      for (int64_t d = 0; d < D; d++) to[d] = (to[d] - mean) * steep * weight[d] + bias[d];
      moments[r * w + i] = mean;
      moments[rows * w + r * w + i] = steep;
    }
  }
  return DONE;
}

/* The adjoint. gradient, back: (rows, w, D). learned: (2, D) gradients of weight and bias, or NULL with them. */
int NAME(normed_rows_backward)(const REAL *features, int64_t rows, int64_t w, int64_t D, int64_t along_width,
                               const REAL *weight, const REAL *lengths, const REAL *moments, const REAL *gradient,
                               REAL *back, REAL *learned, int64_t threads) {
  REAL *partial = weight ? calloc(rows * 2 * D + 1, sizeof *partial) : NULL; /* a sum for each row, added in order */
  REAL *scratch = malloc((threads * 2 * D + 1) * sizeof *scratch);
  if ((weight && !partial) || !scratch) return free(partial), free(scratch), NO_MEMORY;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < rows; r++) {
    const REAL *x = features + r * w * D, *length = lengths + r * (along_width ? D : w);
    REAL *unit = scratch + THREAD * 2 * D, *along = unit + D;
    for (int64_t d = 0; along_width && d < D; d++) along[d] = 0;
    for (int64_t i = 0; i < w; i++) {
      const REAL *g = gradient + (r * w + i) * D;
      REAL *to = back + (r * w + i) * D;
      NAME(at_unit)(x, length, i, D, along_width, unit);
      if (weight) {
        const REAL mean = moments[r * w + i], steep = moments[rows * w + r * w + i];
        REAL *of_weight = partial + r * 2 * D, *of_bias = of_weight + D, plain = 0, turned = 0;
#pragma omp simd reduction(+ : plain, turned)
        for (int64_t d = 0; d < D; d++) {
          REAL hat = (unit[d] - mean) * steep;
          of_weight[d] += g[d] * hat;
          of_bias[d] += g[d];
          to[d] = g[d] * weight[d];
          plain += to[d];
          turned += to[d] * hat;
        }
        plain /= D, turned /= D;
#pragma omp simd
        for (int64_t d = 0; d < D; d++) to[d] = steep * (to[d] - plain - (unit[d] - mean) * steep * turned);
      } else
        memcpy(to, g, D * sizeof *to);
      if (along_width) {
#pragma omp simd
        for (int64_t d = 0; d < D; d++) along[d] += to[d] * unit[d];
        continue;
      }
      REAL radial = 0;
#pragma omp simd reduction(+ : radial)
      for (int64_t d = 0; d < D; d++) radial += to[d] * unit[d];
      const REAL shrink = length[i] <= (REAL)HELD ? 0 : 1 / length[i]; /* a length that is held has no gradient */
#pragma omp simd
      for (int64_t d = 0; d < D; d++) to[d] = (to[d] - unit[d] * radial) * shrink;
    }
    if (!along_width) continue;
    for (int64_t d = 0; d < D; d++) along[d] /= length[d];
    for (int64_t i = 0; i < w; i++) {
      REAL *to = back + (r * w + i) * D;
      const REAL *from = x + i * D;
#pragma omp simd
      for (int64_t d = 0; d < D; d++) to[d] = length[d] <= (REAL)HELD ? 0 : (to[d] - from[d] * along[d]) / length[d];
    }
  }
  for (int64_t j = 0; learned && j < 2 * D; j++) learned[j] = 0;
  for (int64_t r = 0; learned && r < rows; r++)
    for (int64_t j = 0; j < 2 * D; j++) learned[j] += partial[r * 2 * D + j];
  return free(partial), free(scratch), DONE;
}

#endif
