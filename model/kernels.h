/* What the parts of kernels.c share: vectors, and the structures that kernels.py fills in. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifdef __AVX512VNNI__
#define LANES 16 /* numbers in a vector register */
#define TILE 12  /* rows of x at once: their sums in two vectors of outputs take three quarters of the registers */
#define INT8_TILE 12
#else
#define LANES 8
#define TILE 6
#define INT8_TILE 4
#endif
#define VECTORS 4
#define NEXT_PAGE 4096 /* bytes: the next page of memory, from which processors do not fetch by themselves */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));

/* In memory, weights lie in blocks of BLOCK rows: for each column, the BLOCK numbers of its rows. In int8, for each
   four columns (with zeros after the last), the four numbers of each row. */
#define BLOCK (VECTORS * LANES)

#define FOURS(size) (((size) + 3) / 4 * 4) /* up to a multiple of four */
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

enum prepare { NOTHING, RMS_NORM, LAYER_NORM, SWIGLU, GELU }; /* in the order of kernels.PREPARATIONS */

typedef struct { /* x -> prepare(x) @ weights.T + bias, from `in` to `out` numbers */
    const void *weights;
    const float *scales, *bias; /* NULL: float32 weights; no bias */
    int out, in, prepare;
} Linear;

typedef struct {
    Linear qkv, project, up, down;
    const float *cos, *sin; /* (2, positions, size), for queries and for keys; NULL: no rotation */
    void *keys, *values;    /* (batch, heads, capacity, size), float32 or bfloat16; keys as described below */
} Block;

/* Within a head, keys lie in blocks of LANES positions: for each of their `size` numbers, those of all positions. */

typedef struct { /* `new` tokens of each sequence at the positions from `start` on, with attention's heads */
    int batch, new, start, heads, size;
    int capacity, positions; /* of the keys and values, a multiple of LANES; of the tables cos and sin */
    int narrow;              /* whether keys and values are bfloat16 */
} Shape;

typedef struct { /* how a token is drawn: from the `count` likeliest, after top-k (0: off), top-p and min-p */
    int count, top_k;
    float temperature, top_p, min_p;
} Filters;

typedef struct { /* sequences that write_tokens() continues */
    const float *embedding, *places; /* (vocabulary, width), and (positions, width) or NULL */
    int64_t *tokens;                 /* (batch, total) */
    const int64_t *lengths;          /* (batch): where each prompt ends; up to there, tokens stay */
    const float *uniforms;           /* (batch, draws), in [0, 1) */
    int total, draws;
    int position, steps; /* the first position to be written, and how many */
} Sequences;

/* What a call to decode works with: the number of threads, and memory for the inputs of a matrix (rows, deepest), also
   in int8, with the scale and the sum of each row. */
typedef struct {
    int threads;
    float *inputs, *scales;
    int8_t *bytes;
    int32_t *sums;
} Scratch;
