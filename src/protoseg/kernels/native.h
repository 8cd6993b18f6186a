/* What the C files of this room share. Each includes itself once for float and once for double, as REAL. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define HELD 1e-12 /* a length is held at it, as in `method.similarity.unit` */

enum { DONE, NO_MEMORY, OUT_OF_RANGE }; /* what a function returns */

#ifdef _OPENMP
int omp_get_thread_num(void); /* without omp.h, which a compiler may lack */
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#define JOIN(a, b) a##_##b
#define NAMED(a, b) JOIN(a, b)
#define NAME(function) NAMED(function, REAL)
