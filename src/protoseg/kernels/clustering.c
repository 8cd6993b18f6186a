/* Eq. (4) and (8) on the CPU: what clustering.py says in PyTorch, fused where PyTorch writes a tensor only to read it.

   The file includes itself once for float and once for double. Every sum has one order, whatever the number of threads:
   a class is cut into blocks of a fixed size whose sums are added in order, a prototype's pixels are not cut. */

#ifndef REAL

#include "native.h"

enum { CONSTANT, BIAS_CORRECTED, COUNT_AWARE }; /* rules of the momentum */

#define BLOCK 512 /* pixels whose K numbers stay in the first cache */

/* Counting sort of the pixels by class (or by prototype), those without one left out.
   classes: (n) below C, negative for none. order: (n) pixels. starts: (C+1) where a class begins in it. */
int group_by_class(const int64_t *classes, int64_t n, int64_t C, int32_t *order, int64_t *starts) {
  memset(starts, 0, (C + 1) * sizeof *starts);
  for (int64_t i = 0; i < n; i++) {
    if (classes[i] >= C) return OUT_OF_RANGE;
    if (classes[i] >= 0) starts[classes[i] + 1]++;
  }
  for (int64_t c = 0; c < C; c++) starts[c + 1] += starts[c];
  for (int64_t i = 0; i < n; i++) /* each class's start walks to its end ... */
    if (classes[i] >= 0) order[starts[classes[i]]++] = (int32_t)i;
  for (int64_t c = C; c > 0; c--) starts[c] = starts[c - 1]; /* ... which is the next one's start */
  starts[0] = 0;
  return DONE;
}

typedef struct {
  int64_t class, start, end;
} Block;

/* The blocks of all classes, and their number. A block holds pixels of one class. */
static Block *blocks_of(const int64_t *starts, int64_t C, int64_t *count) {
  Block *blocks = malloc(((starts[C] / BLOCK) + C + 1) * sizeof *blocks);
  *count = 0;
  for (int64_t c = 0; blocks && c < C; c++)
    for (int64_t s = starts[c]; s < starts[c + 1]; s += BLOCK)
      blocks[(*count)++] = (Block){c, s, s + BLOCK < starts[c + 1] ? s + BLOCK : starts[c + 1]};
  return blocks;
}

#define LINE 64 /* bytes of a line of the cache */
#define AHEAD 8 /* rows: a processor foresees lines in a row, not where the next one is */
#ifdef __GNUC__
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define PREFETCH(address)
#endif

#define REAL float
#include "clustering.c"
#undef REAL
#define REAL double
#include "clustering.c"

#else

/* A class's factors for its prototypes, relative to their mean. */
static void NAME(factors)(const REAL *sums, int64_t K, REAL *factor) {
  REAL mean = 0;
  for (int64_t k = 0; k < K; k++) mean += sums[k];
  mean /= K;
  for (int64_t k = 0; k < K; k++) factor[k] = mean / sums[k];
}

/* Blocks' sums (blocks, K), added in order -> (C, stride), whose first K columns are filled. */
static void NAME(gathered)(const Block *blocks, int64_t count, const REAL *partial, int64_t C, int64_t K,
                           int64_t stride, REAL *sums) {
  for (int64_t c = 0; c < C; c++)
    for (int64_t k = 0; k < K; k++) sums[c * stride + k] = 0;
  for (int64_t b = 0; b < count; b++)
    for (int64_t k = 0; k < K; k++) sums[blocks[b].class * stride + k] += partial[b * K + k];
}

/* Brings the kernel into the order of classes and sums it.
   kernel: (n, K) with the given strides. sorted: (K, n). table: (C, K+1) sums, and number of pixels last. */
int NAME(first_sums)(const REAL *kernel, int64_t row, int64_t column, int64_t n, int64_t K, int64_t C,
                     const int32_t *order, const int64_t *starts, REAL *sorted, REAL *table, int64_t threads) {
  int64_t count;
  Block *blocks = blocks_of(starts, C, &count);
  REAL *partial = malloc((count * K + 1) * sizeof *partial);
  if (!blocks || !partial) return free(blocks), free(partial), NO_MEMORY;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < count; b++)
    for (int64_t k = 0; k < K; k++) {
      const REAL *from = kernel + k * column;
      REAL *to = sorted + k * n, sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = blocks[b].start; i < blocks[b].end; i++) {
        to[i] = from[order[i] * row];
        sum += to[i];
      }
      partial[b * K + k] = sum;
    }
  NAME(gathered)(blocks, count, partial, C, K, K + 1, table);
  for (int64_t c = 0; c < C; c++) table[c * (K + 1) + K] = (REAL)(starts[c + 1] - starts[c]);
  return free(blocks), free(partial), DONE;
}

/* A round: prototypes get their shares by the last sums, every pixel one unit, and its mass is summed anew.
   sums: (C, stride). next: (C, K). */
int NAME(next_sums)(const REAL *sorted, int64_t n, int64_t K, int64_t C, const int64_t *starts, const REAL *sums,
                    int64_t stride, REAL *next, int64_t threads) {
  int64_t count;
  Block *blocks = blocks_of(starts, C, &count);
  REAL *partial = malloc((count * K + 1) * sizeof *partial), *factor = malloc((C * K + 1) * sizeof *factor);
  if (!blocks || !partial || !factor) return free(blocks), free(partial), free(factor), NO_MEMORY;
  for (int64_t c = 0; c < C; c++) NAME(factors)(sums + c * stride, K, factor + c * K);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < count; b++) {
    const REAL *f = factor + blocks[b].class * K;
    int64_t start = blocks[b].start, length = blocks[b].end - start;
    REAL pixel[BLOCK] = {0};
    for (int64_t k = 0; k < K; k++) {
      const REAL *row = sorted + k * n + start;
#pragma omp simd
      for (int64_t i = 0; i < length; i++) pixel[i] += row[i] * f[k];
    }
#pragma omp simd
    for (int64_t i = 0; i < length; i++) pixel[i] = 1 / pixel[i];
    for (int64_t k = 0; k < K; k++) {
      const REAL *row = sorted + k * n + start;
      REAL sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < length; i++) sum += row[i] * pixel[i];
      partial[b * K + k] = sum;
    }
  }
  NAME(gathered)(blocks, count, partial, C, K, K, next);
  return free(blocks), free(partial), free(factor), DONE;
}

/* The prototype of largest mass in each pixel's row of the plan.
   own: (n, K) cosines with the given strides. counts: a class's pixels, strided too. few: below so many pixels a
   class takes its nearest prototypes. lone: whether a class's only pixel takes the first. chosen: (n), 0 where void. */
int NAME(largest_mass)(const REAL *sorted, int64_t n, int64_t K, int64_t C, const int32_t *order,
                       const int64_t *starts, const REAL *sums, int64_t stride, const REAL *counts,
                       int64_t counts_stride, const REAL *own, int64_t row, int64_t column, int64_t few, int64_t lone,
                       int64_t *chosen, int64_t threads) {
  int64_t count;
  Block *blocks = blocks_of(starts, C, &count);
  REAL *factor = malloc((C * K + 1) * sizeof *factor);
  if (!blocks || !factor) return free(blocks), free(factor), NO_MEMORY;
  for (int64_t c = 0; c < C; c++) NAME(factors)(sums + c * stride, K, factor + c * K);
  memset(chosen, 0, n * sizeof *chosen);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < count; b++) {
    REAL pixels = counts[blocks[b].class * counts_stride];
    const REAL *f = factor + blocks[b].class * K;
    int64_t start = blocks[b].start, length = blocks[b].end - start;
    if (lone && pixels == 1) continue;
    REAL best[BLOCK];
    int32_t which[BLOCK];
    for (int64_t k = 0; k < K; k++) {
      int nearest = pixels < few;
      const REAL *from = sorted + k * n + start;
      if (k == 0)
        for (int64_t i = 0; i < length; i++) {
          best[i] = nearest ? own[order[start + i] * row] : from[i] * f[0];
          which[i] = 0;
        }
      else if (nearest)
        for (int64_t i = 0; i < length; i++) {
          REAL value = own[order[start + i] * row + k * column];
          if (value > best[i]) best[i] = value, which[i] = (int32_t)k;
        }
      else
#pragma omp simd
        for (int64_t i = 0; i < length; i++) {
          REAL value = from[i] * f[k];
          int more = value > best[i];
          best[i] = more ? value : best[i];
          which[i] = more ? (int32_t)k : which[i];
        }
    }
    for (int64_t i = 0; i < length; i++) chosen[order[start + i]] = which[i];
  }
  return free(blocks), free(factor), DONE;
}

/* Sum of some of the rows (., D), from the first to the last, each times its weight, or NULL. */
static void NAME(sum_of)(const REAL *rows, const REAL *weights, const int32_t *order, int64_t count, int64_t D,
                         REAL *sum) {
  for (int64_t d = 0; d < D; d++) sum[d] = 0;
  for (int64_t i = 0; i < count; i++) {
    const REAL weight = weights ? weights[order[i]] : 1;
    const REAL *row = rows + order[i] * D, *soon = rows + order[i + AHEAD < count ? i + AHEAD : i] * D;
    for (int64_t d = 0; d < D; d += LINE / sizeof(REAL)) PREFETCH(soon + d);
#pragma omp simd
    for (int64_t d = 0; d < D; d++) sum[d] += weight * row[d];
  }
}

/* Sum and number of the rows of each index.
   rows: (n, D), of which order and starts are those of group_by_class. weights: (n) of the rows, or NULL.
   sums: (count, D). counts: (count). */
int NAME(segment_sums)(const REAL *rows, const REAL *weights, const int32_t *order, const int64_t *starts, int64_t D,
                       int64_t count, REAL *sums, REAL *counts, int64_t threads) {
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
  for (int64_t p = 0; p < count; p++) {
    counts[p] = (REAL)(starts[p + 1] - starts[p]);
    NAME(sum_of)(rows, weights, order + starts[p], starts[p + 1] - starts[p], D, sums + p * D);
  }
  return DONE;
}

static REAL NAME(length)(const REAL *x, int64_t D) {
  REAL sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; d++) sum += x[d] * x[d];
  return (REAL)sqrt(sum);
}

static REAL NAME(at_least)(REAL x, REAL least) { return x < least ? least : x; }

/* Eq. (8) for one prototype that was hit `count` times, in place. See `prototypes.momentum_step`. */
static void NAME(move_one)(REAL *prototype, REAL *weight, REAL *length, const REAL *sum, REAL count, int64_t D,
                           double momentum, int64_t rule, double cap) {
  REAL size = NAME(length)(sum, D);
  if (!isfinite(size) || size < (REAL)HELD) return;
  REAL q = 1, old = 1, mean = 1 / size;
  if (rule == COUNT_AWARE) {
    q = count < cap ? count : (REAL)cap;
    old = *length;
    mean = 1 / count;
  }
  REAL held = (REAL)momentum * *weight + q, step = q / NAME(at_least)(held, (REAL)1e-12);
  if (rule == CONSTANT) step = *weight > 0 ? (REAL)(1 - momentum) : 1;
  old *= 1 - step, mean *= step;
  REAL square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t d = 0; d < D; d++) {
    REAL moved = old * prototype[d] + mean * sum[d];
    square += moved * moved;
  }
  REAL now = (REAL)sqrt(square);
  if (!(now >= (REAL)HELD)) return;
#pragma omp simd
  for (int64_t d = 0; d < D; d++) prototype[d] = (old * prototype[d] + mean * sum[d]) / now;
  *weight = held;
  if (rule == COUNT_AWARE) *length = now;
}

/* Eq. (8) from sums (count, D) and counts (count); only rows that were hit are touched. */
int NAME(momentum_step)(REAL *prototypes, REAL *weight, REAL *length, const REAL *sums, const REAL *counts,
                        const REAL *verdict, int64_t count, int64_t D, double momentum, int64_t rule, double cap,
                        int64_t threads) {
  if (!isfinite(*verdict)) return DONE;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t p = 0; p < count; p++)
    if (counts[p] > 0)
      NAME(move_one)(prototypes + p * D, weight + p, length + p, sums + p * D, counts[p], D, momentum, rule, cap);
  return DONE;
}

/* The same from the pixels themselves: no table of all sums, so that a large vocabulary costs what of it is seen.
   rows: (n, D), of which order and starts are those of group_by_class. counts: (count), filled here. */
int NAME(move)(REAL *prototypes, REAL *weight, REAL *length, const REAL *rows, const int32_t *order,
               const int64_t *starts, const REAL *verdict, int64_t count, int64_t D, double momentum, int64_t rule,
               double cap, REAL *counts, int64_t threads) {
  for (int64_t p = 0; p < count; p++) counts[p] = (REAL)(starts[p + 1] - starts[p]);
  if (!isfinite(*verdict)) return DONE;
  REAL *sums = malloc((threads * D + 1) * sizeof *sums); /* one for each thread */
  if (!sums) return NO_MEMORY;
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
  for (int64_t p = 0; p < count; p++) {
    if (starts[p + 1] == starts[p]) continue;
    REAL *sum = sums + THREAD * D;
    NAME(sum_of)(rows, NULL, order + starts[p], starts[p + 1] - starts[p], D, sum);
    NAME(move_one)(prototypes + p * D, weight + p, length + p, sum, counts[p], D, momentum, rule, cap);
  }
  return free(sums), DONE;
}

/* The share of its class each prototype serves and how long it has been idle, in place. See `prototypes.usage_step`. */
int NAME(usage_step)(REAL *usage, REAL *idle, const REAL *counts, const REAL *verdict, int64_t C, int64_t K,
                      double decay, double dead) {
  if (!isfinite(*verdict)) return DONE;
  for (int64_t c = 0; c < C; c++) {
    REAL pixels = 0;
    for (int64_t k = 0; k < K; k++) pixels += counts[c * K + k];
    if (!(pixels > 0)) continue;
    for (int64_t p = c * K; p < (c + 1) * K; p++) {
      usage[p] = (REAL)decay * usage[p] + (REAL)(1 - decay) * (counts[p] / pixels);
      idle[p] = usage[p] < (REAL)dead ? idle[p] + 1 : 0;
    }
  }
  return DONE;
}

/* Sets the longest idle prototype of each class, where it is due, on the pixel that the others serve worst; in place.
   Looks at no pixel of a class where nothing is due. moving: (n) prototype each pixel moved, or -1. */
int NAME(reseed)(const REAL *embedding, const int64_t *moving, int64_t n, REAL *prototypes, REAL *weight, REAL *length,
                 REAL *usage, REAL *idle, const REAL *verdict, int64_t C, int64_t K, int64_t D, double after) {
  if (!isfinite(*verdict)) return DONE;
  int64_t due = 0, *longest = malloc((C + 1) * sizeof *longest), *worst = malloc((C + 1) * sizeof *worst);
  REAL *cosine = malloc((C + 1) * sizeof *cosine);
  if (!longest || !worst || !cosine) return free(longest), free(worst), free(cosine), NO_MEMORY;
  for (int64_t c = 0; c < C; c++) {
    longest[c] = c * K;
    for (int64_t p = c * K; p < (c + 1) * K; p++)
      if (idle[p] > idle[longest[c]]) longest[c] = p;
    if (idle[longest[c]] >= after) due++;
    else longest[c] = -1;
    worst[c] = -1;
  }
  for (int64_t i = 0; due && i < n; i++) {
    int64_t c = moving[i] < 0 ? -1 : moving[i] / K;
    if (c < 0 || longest[c] < 0) continue;
    const REAL *x = embedding + i * D, *p = prototypes + moving[i] * D;
    REAL near = 0;
#pragma omp simd reduction(+ : near)
    for (int64_t d = 0; d < D; d++) near += x[d] * p[d];
    if (!isfinite(near)) longest[c] = -1; /* nothing is known of this class */
    else if (worst[c] < 0 || near < cosine[c]) worst[c] = i, cosine[c] = near;
  }
  for (int64_t c = 0; due && c < C; c++) {
    if (longest[c] < 0 || worst[c] < 0) continue;
    const REAL *x = embedding + worst[c] * D;
    REAL *p = prototypes + longest[c] * D, shrink = 1 / NAME(at_least)(NAME(length)(x, D), (REAL)1e-12);
    for (int64_t d = 0; d < D; d++) p[d] = x[d] * shrink;
    weight[longest[c]] = length[longest[c]] = 1;
    usage[longest[c]] = (REAL)1 / K;
    idle[longest[c]] = 0;
  }
  return free(longest), free(worst), free(cosine), DONE;
}

#endif
