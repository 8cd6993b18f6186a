/* Eq. (1), (2), (5), (6) of a band on the CPU, between and after the two products: what similarity.py, contrast.py and
   upsampling.py say in PyTorch, fused where PyTorch writes a table only to read it.

   The file includes itself once for float and once for double. Tables are (prototypes or classes, pixels): loops run
   over a block of pixels, so that sums over prototypes need no order of vectors and a block stays in the first cache.
   Blocks are of a fixed size and their sums are added in order, whatever the number of threads. */

#ifndef REAL

#include "native.h"

#define BLOCK 128 /* pixels */

/* e^x for x <= 0 or little more. 2^n e^r with |r| <= ln(2) / 2: the sum with MAGIC rounds to n, which its lowest bits
   then hold; no branch and no call, so loops over it become vectors. Below the smallest normal number it stays there:
   as good as 0 in a sum whose largest term is 1. nan stays nan. */
static inline float exp_float(float x) {
  const float magic = 12582912.0f; /* 1.5 * 2^23 */
  x = x < -87.0f ? -87.0f : x;
  float shifted = x * 1.44269504f + magic, n = shifted - magic;
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f; /* minimax of (e^r - 1 - r) / r^2, Cephes */
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23; /* the bits of MAGIC above n fall out */
  float power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

static inline double exp_double(double x) {
  const double magic = 6755399441055744.0; /* 1.5 * 2^52 */
  x = x < -708.0 ? -708.0 : x;
  double shifted = x * 1.4426950408889634 + magic, n = shifted - magic;
  double r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  double p = 1.0 / 6227020800.0; /* Taylor, to r^13 / 13!: the rest is below 1e-17 */
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + (r + 1.0);
  uint64_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023) << 52;
  double power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

#define REAL float
#include "similarity.c"
#undef REAL
#define REAL double
#include "similarity.c"

#else

/* Rows of unit length: (n, D) -> (n, D). */
int NAME(unit_rows)(const REAL *raw, int64_t n, int64_t D, REAL *unit, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; i++) {
    const REAL *x = raw + i * D;
    REAL sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; d++) sum += x[d] * x[d];
    REAL length = (REAL)sqrt(sum);
    length = length < (REAL)HELD ? (REAL)HELD : length;
    REAL *to = unit + i * D;
#pragma omp simd
    for (int64_t d = 0; d < D; d++) to[d] = x[d] / length;
  }
  return DONE;
}

/* Cosines of a band -> the nearest prototype of every class, those with the own class, and log-sum-exp of cosine / tau.
   table: (C*K, n), rows `stride` apart. classes: (n) or -1 for void. target: (n) prototype where the own class's others
   are left out of the sum, or NULL. slope: 1 / tau. best: (C, n). own: (K, n), rows `own_stride` apart.
   log_sum: (n), or NULL. one_sweep: whether e^(-2 / tau) is a number, so that the largest cosine need not be known. */
int NAME(nearest)(const REAL *table, int64_t stride, int64_t C, int64_t K, int64_t n, const int64_t *classes,
                  const int64_t *target, double slope, REAL *best, REAL *own, int64_t own_stride, REAL *log_sum,
                  int64_t one_sweep, int64_t threads) {
  const REAL a = (REAL)slope;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t length = n - start < BLOCK ? n - start : BLOCK;
    const int64_t *mine = classes + start, *given = target ? target + start : NULL;
    REAL shift[BLOCK], mass[BLOCK] = {0};
    int32_t class[BLOCK];
    for (int64_t i = 0; i < length; i++) class[i] = (int32_t)mine[i];
    for (int64_t i = 0; i < length; i++) shift[i] = one_sweep ? a : -INFINITY;
    for (int64_t c = 0; c < C; c++) {
      const REAL *first = table + c * K * stride + start;
      REAL top[BLOCK], part[BLOCK] = {0};
      memcpy(top, first, length * sizeof *top);
      for (int64_t k = 1; k < K; k++) {
        const REAL *row = first + k * stride;
#pragma omp simd
        for (int64_t i = 0; i < length; i++) top[i] = row[i] > top[i] ? row[i] : top[i];
      }
      memcpy(best + c * n + start, top, length * sizeof *top);
      if (!log_sum) continue;
      if (!one_sweep) { /* of those that count: a class left out may be nearer than all others */
#pragma omp simd
        for (int64_t i = 0; i < length; i++) {
          REAL peak = given && class[i] == (int32_t)c ? -INFINITY : top[i] * a;
          shift[i] = peak > shift[i] ? peak : shift[i];
        }
        continue;
      }
      for (int64_t k = 0; k < K; k++) {
        const REAL *row = first + k * stride;
#pragma omp simd
        for (int64_t i = 0; i < length; i++) part[i] += NAME(exp)(row[i] * a - a);
      }
#pragma omp simd
      for (int64_t i = 0; i < length; i++) mass[i] += given && class[i] == (int32_t)c ? 0 : part[i];
    }
    if (log_sum) {
      if (given)
        for (int64_t i = 0; i < length; i++) {
          REAL pull = given[i] < 0 ? -INFINITY : table[given[i] * stride + start + i] * a;
          if (!one_sweep && pull > shift[i]) shift[i] = pull;
        }
      for (int64_t p = 0; !one_sweep && p < C * K; p++) {
        const REAL *row = table + p * stride + start;
        const int32_t c = (int32_t)(p / K);
#pragma omp simd
        for (int64_t i = 0; i < length; i++) {
          REAL e = NAME(exp)(row[i] * a - shift[i]);
          mass[i] += given && class[i] == c ? 0 : e;
        }
      }
      if (given)
        for (int64_t i = 0; i < length; i++)
          if (given[i] >= 0) mass[i] += NAME(exp)(table[given[i] * stride + start + i] * a - shift[i]);
      for (int64_t i = 0; i < length; i++) log_sum[start + i] = (REAL)log(mass[i]) + shift[i];
    }
    for (int64_t i = 0; i < length; i++) {
      const REAL *from = table + (class[i] < 0 ? 0 : class[i]) * K * stride + start + i;
      for (int64_t k = 0; k < K; k++) own[k * own_stride + start + i] = from[k * stride];
    }
  }
  return DONE;
}

/* Each prototype's weight in the gradient to the pixel, (C*K, n) from a band's cosines; `out` may be the table itself.
   best, rise: (C, n) what `nearest` gave and the gradient to it, shared equally by those that attain it.
   log_sum: (n) of `nearest`. share: (n) what its gradient is multiplied by, over tau; 0 for pixels outside the mean. */
int NAME(weights)(const REAL *table, int64_t stride, int64_t C, int64_t K, int64_t n, const int64_t *classes,
                  const int64_t *target, double slope, const REAL *best, int64_t best_stride, const REAL *rise,
                  int64_t rise_stride, const REAL *log_sum, const REAL *share, REAL *out, int64_t out_stride,
                  int64_t threads) {
  const REAL a = (REAL)slope;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t length = n - start < BLOCK ? n - start : BLOCK;
    const int64_t *given = target ? target + start : NULL;
    const REAL *lse = log_sum + start, *part = share + start;
    int32_t class[BLOCK];
    REAL pulled[BLOCK], any = 0;
    for (int64_t i = 0; i < length; i++) any += part[i] != 0;
    for (int64_t i = 0; given && i < length; i++) {
      class[i] = (int32_t)classes[start + i];
      pulled[i] = given[i] < 0 ? 0 : table[given[i] * stride + start + i];
    }
    for (int64_t c = 0; c < C; c++) {
      const REAL *first = table + c * K * stride + start;
      const REAL *top = best + c * best_stride + start;
      REAL tied[BLOCK] = {0}, each[BLOCK];
      for (int64_t k = 0; k < K; k++) {
        const REAL *row = first + k * stride;
#pragma omp simd
        for (int64_t i = 0; i < length; i++) tied[i] += row[i] == top[i] ? (REAL)1 : (REAL)0;
      }
      const REAL *g = rise + c * rise_stride + start;
#pragma omp simd
      for (int64_t i = 0; i < length; i++) each[i] = g[i] / (tied[i] < 1 ? 1 : tied[i]); /* none where they are nan */
      for (int64_t k = 0; k < K; k++) {
        const REAL *row = first + k * stride;
        REAL *to = out + (c * K + k) * out_stride + start;
        if (!any) {
#pragma omp simd
          for (int64_t i = 0; i < length; i++) to[i] = row[i] == top[i] ? each[i] : 0;
        } else if (!given) {
#pragma omp simd
          for (int64_t i = 0; i < length; i++) {
            REAL e = NAME(exp)(row[i] * a - lse[i]) * part[i];
            to[i] = e + (row[i] == top[i] ? each[i] : 0);
          }
        } else {
#pragma omp simd
          for (int64_t i = 0; i < length; i++) {
            REAL e = class[i] == (int32_t)c ? 0 : NAME(exp)(row[i] * a - lse[i]) * part[i];
            to[i] = e + (row[i] == top[i] ? each[i] : 0);
          }
        }
      }
    }
    for (int64_t i = 0; given && any && i < length; i++)
      if (given[i] >= 0) out[given[i] * out_stride + start + i] += NAME(exp)(pulled[i] * a - lse[i]) * part[i];
  }
  return DONE;
}

/* Of one class in a block: pixels by nearest prototype, the first of equal ones, without those whose own class it is.
   classes: (length). order: (BLOCK) pixels. starts: (K+2) where each prototype's begin in it; of none, last.
   places: (4, K+1) to work in. Quarters of the block are counted and placed side by side: a count waits for the one
   before it to be written. */
static void NAME(group_by_nearest)(const REAL *table, int64_t stride, int64_t K, int64_t length, const REAL *best,
                                   const int32_t *classes, int64_t c, uint8_t *order, int32_t *starts,
                                   int32_t *places) {
  enum { QUARTER = BLOCK / 4 };
  int32_t nearest[BLOCK], *a = places, *b = a + K + 1, *d = b + K + 1, *e = d + K + 1;
  for (int64_t i = 0; i < length; i++) nearest[i] = 0; /* where the cosines are nan */
  for (int64_t k = K - 1; k >= 0; k--) {
    const REAL *row = table + k * stride;
#pragma omp simd
    for (int64_t i = 0; i < length; i++) nearest[i] = row[i] == best[i] ? (int32_t)k : nearest[i];
  }
#pragma omp simd
  for (int64_t i = 0; i < length; i++) nearest[i] = classes[i] == (int32_t)c ? (int32_t)K : nearest[i];
  for (int64_t i = length; i < BLOCK; i++) nearest[i] = (int32_t)K;
  memset(places, 0, 4 * (K + 1) * sizeof *places);
  const int32_t *second = nearest + QUARTER, *third = second + QUARTER, *fourth = third + QUARTER;
  for (int64_t i = 0; i < QUARTER; i++) a[nearest[i]]++, b[second[i]]++, d[third[i]]++, e[fourth[i]]++;
  int32_t place = 0;
  for (int64_t k = 0; k <= K; k++) { /* counts become places, in the order of pixels */
    starts[k] = place;
    for (int32_t *count = places + k; count < places + 4 * (K + 1); count += K + 1) {
      const int32_t here = *count;
      *count = place, place += here;
    }
  }
  starts[K + 1] = place;
  for (int64_t i = 0; i < QUARTER; i++) {
    order[a[nearest[i]]++] = (uint8_t)i;
    order[b[second[i]]++] = (uint8_t)(QUARTER + i);
    order[d[third[i]]++] = (uint8_t)(2 * QUARTER + i);
    order[e[fourth[i]]++] = (uint8_t)(3 * QUARTER + i);
  }
}

#define PIECE ((int64_t)(256 / sizeof(REAL))) /* channels whose sums stay in registers: eight vectors */
typedef REAL NAME(vector) __attribute__((vector_size(32), aligned(sizeof(REAL)), may_alias)); /* of gcc and clang */

/* Some of the rows (., PIECE), each times its factor, are added to `sum`. A compiler keeps an array of sums in memory,
   which takes twice as long, so they have names. */
static void NAME(add_rows)(const REAL *rows, const uint8_t *order, int64_t count, const REAL *factor, REAL *sum) {
  NAME(vector) *s = (NAME(vector) *)sum;
  NAME(vector) s0 = s[0], s1 = s[1], s2 = s[2], s3 = s[3], s4 = s[4], s5 = s[5], s6 = s[6], s7 = s[7];
  for (int64_t j = 0; j < count; j++) {
    const NAME(vector) *x = (const NAME(vector) *)(rows + order[j] * PIECE);
    const REAL f = factor[order[j]];
    s0 += f * x[0], s1 += f * x[1], s2 += f * x[2], s3 += f * x[3];
    s4 += f * x[4], s5 += f * x[5], s6 += f * x[6], s7 += f * x[7];
  }
  s[0] = s0, s[1] = s1, s[2] = s2, s[3] = s3, s[4] = s4, s[5] = s5, s[6] = s6, s[7] = s7;
}

/* What the classes got wrong of a band. best: (C, n) of `nearest`. errors: (C, n). classes: (n) or -1 for none.
   rows: (n, D) unit rows. taken: (C*K, D), to which each pixel's row is added, times the errors of other classes, at the
   nearest prototype of each. lacking: (n) the error of the own class, or 0.
   Threads share out the classes, so a prototype's sum is in the order of pixels whatever their number. */
int NAME(errors)(const REAL *table, int64_t stride, int64_t C, int64_t K, int64_t n, const REAL *best,
                 int64_t best_stride, const REAL *errors, int64_t errors_stride, const int64_t *classes,
                 const REAL *rows, int64_t D, REAL *taken, REAL *lacking, int64_t threads) {
  uint8_t *orders = malloc(C * BLOCK + 1);
  int32_t *starts = malloc((C * (K + 2) + 1) * sizeof *starts), *places = malloc(threads * 4 * (K + 1) * sizeof *places);
  if (!orders || !starts || !places) return free(orders), free(starts), free(places), NO_MEMORY;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; i++) lacking[i] = classes[i] < 0 ? 0 : errors[classes[i] * errors_stride + i];
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t share = 0; share < threads; share++) {
    const int64_t first = share * C / threads, last = (share + 1) * C / threads;
    for (int64_t start = 0; start < n; start += BLOCK) {
      const int64_t length = n - start < BLOCK ? n - start : BLOCK;
      int32_t mine[BLOCK];
      for (int64_t i = 0; i < length; i++) mine[i] = (int32_t)classes[start + i];
      for (int64_t c = first; c < last; c++)
        NAME(group_by_nearest)(table + c * K * stride + start, stride, K, length, best + c * best_stride + start, mine,
                               c, orders + c * BLOCK, starts + c * (K + 2), places + share * 4 * (K + 1));
      for (int64_t d = 0; d < D; d += PIECE) {
        const int whole = D - d >= PIECE;
        REAL piece[BLOCK * PIECE]; /* a copy, since rows a power of two apart would share few lines of a cache */
        for (int64_t i = 0; whole && i < length; i++)
          memcpy(piece + i * PIECE, rows + (start + i) * D + d, PIECE * sizeof *piece);
        for (int64_t c = first; c < last; c++)
          for (int64_t k = 0; k < K; k++) {
            const int32_t *run = starts + c * (K + 2) + k, count = run[1] - run[0];
            const uint8_t *order = orders + c * BLOCK + run[0];
            const REAL *error = errors + c * errors_stride + start, *x = rows + start * D + d;
            REAL *to = taken + (c * K + k) * D + d;
            if (count && whole)
              NAME(add_rows)(piece, order, count, error, to);
            else
              for (int32_t j = 0; j < count; j++)
                for (int64_t i = 0; i < D - d; i++) to[i] += error[order[j]] * x[order[j] * D + i];
          }
      }
    }
  }
  return free(orders), free(starts), free(places), DONE;
}

/* Logits (C, length) of a block, rows `stride` apart, become `share` times the gradient of their cross-entropy, whose sum
   is answered. peak: (length) their largest. wrong: counts labels that are no class. */
static double NAME(pixel_losses)(REAL *logits, int64_t stride, int64_t C, int64_t length, const int64_t *labels,
                                 int64_t ignored, const REAL *class_weights, REAL share, const REAL *peak,
                                 int64_t *wrong) {
  REAL rest[BLOCK] = {0}, picked[BLOCK], weight[BLOCK]; /* rest: mass of the classes that are not the label */
  int32_t own[BLOCK];
  double sum = 0;
  for (int64_t i = 0; i < length; i++) {
    const int64_t label = labels[i];
    const int here = label != ignored && label >= 0 && label < C;
    *wrong += label != ignored && !here;
    weight[i] = !here ? 0 : class_weights ? class_weights[label] : 1;
    own[i] = here ? (int32_t)label : -1;
    picked[i] = here ? logits[label * stride + i] - peak[i] : 0;
  }
  for (int64_t c = 0; c < C; c++) {
    REAL *row = logits + c * stride;
#pragma omp simd
    for (int64_t i = 0; i < length; i++) {
      row[i] = NAME(exp)(row[i] - peak[i]);
      rest[i] += own[i] == (int32_t)c ? 0 : row[i];
    }
  }
  REAL factor[BLOCK];
  for (int64_t i = 0; i < length; i++) {
    const REAL mass = own[i] < 0 ? rest[i] : rest[i] + logits[own[i] * stride + i];
    if (labels[i] != ignored) sum += weight[i] * (log(mass) - picked[i]);
    factor[i] = weight[i] * share / mass;
  }
  for (int64_t c = 0; c < C; c++) {
    REAL *row = logits + c * stride;
#pragma omp simd
    for (int64_t i = 0; i < length; i++) row[i] *= factor[i];
  }
  for (int64_t i = 0; i < length; i++) /* not P - 1, of which rounding leaves nothing, or anything, where P is near 1 */
    if (own[i] >= 0) logits[own[i] * stride + i] = -rest[i] * factor[i];
  return sum;
}

/* Eq. (2): (C, n) logits become `share` times the gradient of their summed, weighted cross-entropy.
   labels: (n) in [0, C) or `ignored`. class_weights: (C), or NULL. loss: the sum. */
int NAME(cross_entropy)(REAL *logits, int64_t C, int64_t n, const int64_t *labels, int64_t ignored,
                        const REAL *class_weights, const REAL *share, REAL *loss, int64_t threads) {
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
  double *losses = malloc((blocks + 1) * sizeof *losses);
  if (!losses) return NO_MEMORY;
  int64_t wrong = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : wrong)
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t start = b * BLOCK, length = n - start < BLOCK ? n - start : BLOCK;
    REAL peak[BLOCK];
    memcpy(peak, logits + start, length * sizeof *peak);
    for (int64_t c = 1; c < C; c++) {
      const REAL *row = logits + c * n + start;
#pragma omp simd
      for (int64_t i = 0; i < length; i++) peak[i] = row[i] > peak[i] ? row[i] : peak[i];
    }
    losses[b] = NAME(pixel_losses)(logits + start, n, C, length, labels + start, ignored, class_weights, *share, peak,
                                   &wrong);
  }
  double sum = 0;
  for (int64_t b = 0; b < blocks; b++) sum += losses[b];
  *loss = (REAL)sum;
  return free(losses), wrong ? OUT_OF_RANGE : DONE;
}

/* The same at label resolution: label row y mixes feature rows low[y] and the one after it, whose gradients are added to.
   widened, gradient: (C*G, R, W) of G images, R feature rows from `top` on. low: (H). mix: (H, 2) shares of the two rows.
   labels: (G, H, W), of which rows [first, last) are taken. */
int NAME(strip_cross_entropy)(const REAL *widened, REAL *gradient, int64_t C, int64_t G, int64_t R, int64_t W,
                              int64_t top, const int64_t *low, const REAL *mix, int64_t first, int64_t last,
                              const int64_t *labels, int64_t H, int64_t ignored, const REAL *class_weights,
                              const REAL *share, REAL *loss, int64_t threads) {
  const int64_t across = (W + BLOCK - 1) / BLOCK, blocks = G * across; /* a block is some columns of all rows */
  double *losses = malloc((blocks + 1) * sizeof *losses);
  REAL *work = malloc((threads * C * BLOCK + 1) * sizeof *work);
  if (!losses || !work) return free(losses), free(work), NO_MEMORY;
  int64_t wrong = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : wrong)
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t g = b / across, start = b % across * BLOCK, length = W - start < BLOCK ? W - start : BLOCK;
    REAL *logits = work + THREAD * C * BLOCK;
    losses[b] = 0;
    for (int64_t y = first; y < last; y++) {
      const int64_t above = (low[y] - top) * W + start, below = low[y] - top + 1 < R ? above + W : above;
      const int64_t *truth = labels + (g * H + y) * W + start;
      const REAL upper = mix[2 * y], lower = mix[2 * y + 1];
      REAL peak[BLOCK];
      for (int64_t i = 0; i < length; i++) peak[i] = -INFINITY;
      for (int64_t c = 0; c < C; c++) {
        const REAL *plane = widened + (c * G + g) * R * W;
        REAL *row = logits + c * BLOCK;
#pragma omp simd
        for (int64_t i = 0; i < length; i++) {
          row[i] = upper * plane[above + i] + lower * plane[below + i];
          peak[i] = peak[i] > row[i] ? peak[i] : row[i];
        }
      }
      losses[b] += NAME(pixel_losses)(logits, BLOCK, C, length, truth, ignored, class_weights, *share, peak, &wrong);
      for (int64_t c = 0; c < C; c++) {
        REAL *plane = gradient + (c * G + g) * R * W;
        const REAL *row = logits + c * BLOCK;
#pragma omp simd
        for (int64_t i = 0; i < length; i++) plane[above + i] += upper * row[i];
#pragma omp simd
        for (int64_t i = 0; i < length; i++) plane[below + i] += lower * row[i];
      }
    }
  }
  double sum = 0;
  for (int64_t b = 0; b < blocks; b++) sum += losses[b];
  *loss = (REAL)sum;
  return free(losses), free(work), wrong ? OUT_OF_RANGE : DONE;
}

/* In place: the pull of each pixel's own prototype joins the gradient (n, D), which then goes back through the unit
   length. prototypes: (C*K, D). target: (n) or -1. near: (n) cosine with it. lengths: (n). contrast: share of Eq. (5)
   over tau. distance: share of Eq. (6). */
int NAME(finish)(REAL *gradient, const REAL *unit, const REAL *lengths, const REAL *prototypes, const int64_t *target,
                 const REAL *near, const REAL *contrast, const REAL *distance, int64_t n, int64_t D,
                 int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; i++) {
    REAL *g = gradient + i * D, along = 0;
    const int held = lengths[i] <= (REAL)HELD; /* a length that is held has no gradient */
    const REAL *x = unit + i * D;
    if (target[i] >= 0) {
      const REAL *p = prototypes + target[i] * D, pull = -*contrast - 2 * *distance * (1 - near[i]);
#pragma omp simd
      for (int64_t d = 0; d < D; d++) g[d] += pull * p[d];
    }
#pragma omp simd reduction(+ : along)
    for (int64_t d = 0; d < D; d++) along += g[d] * x[d];
    const REAL shrink = held ? 0 : 1 / lengths[i];
#pragma omp simd
    for (int64_t d = 0; d < D; d++) g[d] = (g[d] - along * x[d]) * shrink;
  }
  return DONE;
}

#endif
