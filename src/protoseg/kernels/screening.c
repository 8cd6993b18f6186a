/* The nearest class of every pixel by products of 16 bit codes, where the codes can tell: what screening.py explains.

   A vector holds one number for each of LANES classes, and consecutive vectors are consecutive prototypes of the same
   classes, so the largest of a class is a maximum of whole vectors and any number of prototypes will do. Two codes lie
   side by side in 32 bits, as the instruction wants them that multiplies two pairs and adds them. */

#include "native.h"

#if defined __AVX512BW__
#include <immintrin.h>
enum { LANES = 16, PIXELS = 12 };
#elif defined __AVX2__
#include <immintrin.h>
enum { LANES = 8, PIXELS = 6 };
#else
enum { LANES = 0 };
#endif

/* How many classes a vector holds; 0 where this machine has no such instruction. */
int64_t lanes(void) { return LANES; }

#if defined __AVX512BW__ || defined __AVX2__

#define GROUPS 8                /* of pixels that meet two units of prototypes while these are in the first cache */
#define CHUNK (GROUPS * PIXELS) /* pixels */
#define LARGEST_BIAS 536870912.0f /* 2^29, in code units */

typedef int32_t Lanes __attribute__((vector_size(4 * LANES), may_alias, aligned(4)));
typedef float Reals __attribute__((vector_size(4 * LANES), may_alias, aligned(4)));

#if defined __AVX512BW__
static inline Lanes pairs(Lanes a, Lanes b) { return (Lanes)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
static inline Lanes all(int32_t x) { return (Lanes)_mm512_set1_epi32(x); }
#else
static inline Lanes pairs(Lanes a, Lanes b) { return (Lanes)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
static inline Lanes all(int32_t x) { return (Lanes)_mm256_set1_epi32(x); }
#endif

static inline Lanes pick(Lanes where, Lanes a, Lanes b) { return (where & a) | (~where & b); }
static inline Lanes larger(Lanes a, Lanes b) { return pick(a > b, a, b); }

/* What is known of a pixel, lane by lane. */
typedef struct {
  Lanes best, second, block; /* of the blocks so far: largest, second largest, which block has the largest */
  Lanes top;                 /* of this block so far */
} Seen;

/* Products of PIXELS pixels with two units of prototypes, added to `sum`. */
static inline void dots(const int32_t *pixel, int64_t words, const Lanes *first, const Lanes *second,
                        Lanes sum[2][PIXELS]) {
  Lanes held[2][PIXELS];
  memcpy(held, sum, sizeof held);
  for (int64_t w = 0; w < words; w++) {
    const Lanes one = first[w], two = second[w];
#pragma GCC unroll 16
    for (int p = 0; p < PIXELS; p++) {
      const Lanes x = all(pixel[p * words + w]);
      held[0][p] += pairs(x, one);
      held[1][p] += pairs(x, two);
    }
  }
  memcpy(sum, held, sizeof held);
}

/* Codes of a pixel: (D) -> 2 * words, at `length`, or less where a code would be above `limit` or the bias beside the
   product would not fit.
   Answers what its numbers were multiplied by, or 0 where they are not finite or vanish: such a pixel is certain of
   nothing. off: the length of what rounding took or gave. */
static float coded(const float *x, int64_t D, int64_t words, float length, float limit, float largest_bias,
                   int16_t *code, float *off) {
  float sum = 0, largest = 0, rest = 0;
#pragma omp simd reduction(+ : sum) reduction(max : largest)
  for (int64_t d = 0; d < D; d++) {
    const float size = fabsf(x[d]);
    sum += size * size;
    largest = size > largest ? size : largest;
  }
  *off = 0;
  memset(code, 0, 4 * words);
  if (!(sum > 1e-30f && sum < 1e30f)) return 0;
  const float whole = length / sqrtf(sum), most = limit / largest, beside = LARGEST_BIAS / largest_bias;
  float factor = whole < most ? whole : most;
  factor = factor < beside ? factor : beside;
#pragma omp simd reduction(+ : rest)
  for (int64_t d = 0; d < D; d++) {
    const float exact = x[d] * factor, near = rintf(exact);
    code[d] = (int16_t)(int32_t)near;
    rest += (exact - near) * (exact - near);
  }
  *off = sqrtf(rest);
  return factor;
}

/* rows: (n, D). codes: (units, words, LANES, 2), LANES classes each. bias: (units, LANES) over `worth`, or NULL.
   block: (units) which LANES classes. classes: (C) the id of each place, or NULL where they are in order.
   worth: of a unit of a prototype's codes. length: of a pixel's codes, none of them above `limit`. spread: of the
   prototypes, and own: what the best class must be ahead by: spread times what the pixel was rounded by, and own.
   label: (n) best class, or -1 where it is not certain. scores: (n, C) class maxima, and error: (n) what the difference
   of two may be wrong by; or both NULL. */
int screen(const float *rows, int64_t n, int64_t D, const int16_t *codes, const float *bias, const int32_t *block,
           int64_t units, const int64_t *classes, int64_t C, double worth, double length, double limit,
           double largest_bias, double spread, double own, int64_t *label, float *scores, float *error, int64_t threads) {
  const int64_t words = (D + 1) / 2, room = CHUNK * words + 16;
  int32_t *work = malloc(threads * room * sizeof *work);
  if (!work) return NO_MEMORY;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t start = 0; start < n; start += CHUNK) {
    const int64_t count = n - start < CHUNK ? n - start : CHUNK;
    int32_t *code = work + THREAD * room;
    float factor[CHUNK] = {0}, share[CHUNK] = {0}, off;
    double margin[CHUNK];
    Seen seen[CHUNK];
    for (int64_t i = 0; i < CHUNK; i++) {
      seen[i].best = seen[i].second = seen[i].top = all(INT32_MIN), seen[i].block = all(0);
      if (i >= count) {
        memset(code + i * words, 0, 4 * words);
        continue;
      }
      factor[i] = coded(rows + (start + i) * D, D, words, (float)length, (float)limit, (float)largest_bias,
                        (int16_t *)(code + i * words), &off);
      /* 1.001 and 0.003: `off` and what it was taken of are rounded themselves */
      margin[i] = spread * (1.001 * off + 0.003 * sqrt((double)D)) + own;
      share[i] = factor[i] > 0 ? (float)worth / factor[i] : 0;
      if (error) error[start + i] = (float)margin[i] * share[i];
    }
    for (int64_t u = 0; u < units; u += 2) {
      const int64_t both = u + 1 < units; /* else the last unit meets the pixels twice, and counts once */
      const Lanes *one = (const Lanes *)codes + u * words, *two = one + both * words;
      for (int64_t group = 0; group < count; group += PIXELS) {
        Lanes sum[2][PIXELS];
        for (int p = 0; p < PIXELS; p++)
          for (int64_t j = 0; j < 2; j++) {
            if (bias) {
              const Reals shift = ((const Reals *)bias)[u + (both & j)] * factor[group + p];
              sum[j][p] = __builtin_convertvector(shift, Lanes);
            } else
              sum[j][p] = all(0);
          }
        dots(code + group * words, words, one, two, sum);
        for (int64_t j = 0; j <= both; j++) {
          const int32_t b = block[u + j];
          const int first = u + j == 0 || block[u + j - 1] != b, last = u + j + 1 == units || block[u + j + 1] != b;
          const int64_t here = C - b * LANES < LANES ? C - b * LANES : LANES;
          for (int p = 0; p < PIXELS; p++) {
            Seen *s = seen + group + p;
            Lanes top = first ? sum[j][p] : larger(s->top, sum[j][p]);
            s->top = top;
            if (!last) continue;
            if (here < LANES)
              for (int64_t l = here; l < LANES; l++) top[l] = INT32_MIN; /* no class */
            const Lanes ahead = top > s->best;
            s->second = larger(s->second, pick(ahead, s->best, top));
            s->best = pick(ahead, top, s->best);
            s->block = pick(ahead, all(b), s->block);
            if (scores && group + p < count) {
              float *to = scores + (start + group + p) * C;
              for (int64_t l = 0; l < here; l++) {
                const int64_t place = b * LANES + l;
                to[classes ? classes[place] : place] = (float)top[l] * share[group + p];
              }
            }
          }
        }
      }
    }
    for (int64_t i = 0; i < count; i++) {
      const Seen *s = seen + i;
      int64_t best = INT32_MIN, second = INT32_MIN, place = 0;
      for (int64_t l = 0; l < LANES; l++) {
        const int64_t value = s->best[l], behind = s->second[l];
        if (value > best) {
          second = best > second ? best : second;
          best = value, place = s->block[l] * LANES + l;
        } else if (value > second)
          second = value;
        second = behind > second ? behind : second;
      }
      const int certain = factor[i] > 0 && (double)(best - second) > margin[i];
      label[start + i] = !certain ? -1 : classes ? classes[place] : place;
    }
  }
  return free(work), DONE;
}

#endif
