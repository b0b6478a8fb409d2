/* Attention over the keys and values of earlier positions. */

#pragma once

#include "products.h"

/* Normalise a query or key (size numbers) and turn it by its position's angles, with the tables of decoder.py. */
static void turn(const float *x, const float *cos, const float *sin, float *out, int size, float eps)
{
    float scale = 1 / sqrtf(dot(x, x, size) / size + eps);
    for (int i = 0; i < size; i++)
        out[i] = scale * (x[i] * cos[i] + x[i < size / 2 ? i + size / 2 : i - size / 2] * sin[i]);
}

/* Number i of x, in float32 or, if narrow, in bfloat16. */
static ALWAYS_INLINE float number(const void *x, int narrow, size_t i)
{
    if (!narrow)
        return ((const float *)x)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* The same for LANES numbers. */
static ALWAYS_INLINE floats numbers(const void *x, int narrow, size_t i)
{
    floats values;
    shorts upper;
    if (narrow) {
        memcpy(&upper, (const uint16_t *)x + i, sizeof upper);
        return (floats)(__builtin_convertvector(upper, ints) << 16);
    }
    memcpy(&values, (const float *)x + i, sizeof values);
    return values;
}

/* Copy a row to x, rounded to bfloat16 if narrow: number j to place i + j * apart. */
static void store(const float *row, int size, void *x, int narrow, size_t i, int apart)
{
    for (int j = 0; j < size; j++, i += apart) {
        uint32_t bits;
        memcpy(&bits, row + j, 4);
        if (narrow)
            ((uint16_t *)x)[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        else
            ((float *)x)[i] = row[j];
    }
}

/* Have `count` numbers from place i of x on brought from memory meanwhile. */
static ALWAYS_INLINE void fetch(const void *x, int narrow, size_t i, int count)
{
    const char *start = (const char *)x + i * (narrow ? 2 : 4);
    for (int byte = 0; byte < count * (narrow ? 2 : 4); byte += 64)
        __builtin_prefetch(start + byte);
}

/* out (size) = attention for a query (size) over the first `positions` keys and values of a head, which begin at place
   `first`; the keys that are needed after that, at `next`. share: memory for as many numbers as there are positions, in
   whole blocks of LANES. */
static ALWAYS_INLINE void look_up(int size, int narrow, const float *query, const void *keys, const void *values,
                                  size_t first, size_t next, int positions, float *share, float *out)
{
    float largest = -INFINITY, total = 0, scale = 1 / sqrtf(size);
    for (int p = 0; p < positions; p += LANES) {
        floats sums[4] = {{0}, {0}, {0}, {0}}; /* so that no addition has to wait for the one before */
        size_t block = first + (size_t)p * size;
        int i = 0;
        fetch(values, narrow, block, LANES * size);
        for (; i + 4 <= size; i += 4)
            UNROLL for (int j = 0; j < 4; j++)
                sums[j] += query[i + j] * numbers(keys, narrow, block + (i + j) * LANES);
        for (; i < size; i++)
            sums[0] += query[i] * numbers(keys, narrow, block + i * LANES);
        sums[0] = scale * ((sums[0] + sums[1]) + (sums[2] + sums[3]));
        memcpy(share + p, sums, sizeof *sums);
    }
#pragma omp simd reduction(max : largest)
    for (int p = 0; p < positions; p++)
        largest = share[p] > largest ? share[p] : largest;
    for (int p = 0; p < positions; p++)
        share[p] = exponential(share[p] - largest);
#pragma omp simd reduction(+ : total)
    for (int p = 0; p < positions; p++)
        total += share[p];
    if (size % LANES == 0 && size <= 128) { /* sums stay in registers, if size is a constant */
        floats sums[128 / LANES];
        UNROLL for (int i = 0; i < size / LANES; i++)
            sums[i] = (floats){0};
        for (int p = 0; p < positions; p++) {
            if (p % LANES == 0)
                fetch(keys, narrow, next + (size_t)p * size, LANES * size);
            UNROLL for (int i = 0; i < size / LANES; i++)
                sums[i] += share[p] * numbers(values, narrow, first + p * size + i * LANES);
        }
        memcpy(out, sums, size * sizeof *out);
    } else {
        memset(out, 0, size * sizeof *out);
        for (int p = 0; p < positions; p++)
            for (int i = 0; i < size; i++)
                out[i] += share[p] * number(values, narrow, first + p * size + i);
    }
    for (int i = 0; i < size; i++)
        out[i] /= total;
}

/* look_up() for any size; compiled for the usual ones, it takes a fraction of the time. */
static void look_up_any(int size, int narrow, const float *query, const void *keys, const void *values, size_t first,
                        size_t next, int positions, float *share, float *out)
{
#define CASE(n)                                                                                                        \
    case n:                                                                                                            \
        if (narrow)                                                                                                    \
            return look_up(n, 1, query, keys, values, first, next, positions, share, out);                             \
        return look_up(n, 0, query, keys, values, first, next, positions, share, out);
    switch (size) {
        CASE(32)
        CASE(48)
        CASE(64)
        CASE(128)
    default:
        look_up(size, narrow, query, keys, values, first, next, positions, share, out);
    }
}

/* out (batch, new, heads * size) = causal attention for qkv (batch, new, 3, heads, size). Extends the block's keys and
   values. */
static void attend(const Block *block, float eps, const float *qkv, float *out, const Shape *shape, int threads)
{
    int batch = shape->batch, new = shape->new, heads = shape->heads, size = shape->size, capacity = shape->capacity;
    int narrow = shape->narrow;
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int b = 0; b < batch; b++)
        for (int h = 0; h < heads; h++) {
            const float *cos = block->cos, *sin = block->sin;
            size_t head = ((size_t)b * heads + h) * capacity * size;
            float query[size], key[size], share[capacity];
            for (int t = 0; t < new; t++) {
                int here = shape->start + t;
                const float *q = qkv + ((((size_t)b * new + t) * 3) * heads + h) * size;
                const float *k = q + heads * size, *v = k + heads * size;
                if (cos) {
                    int place = here * size, key_place = (shape->positions + here) * size;
                    turn(q, cos + place, sin + place, query, size, eps);
                    turn(k, cos + key_place, sin + key_place, key, size, eps);
                    q = query, k = key;
                }
                store(k, size, block->keys, narrow, head + here / LANES * LANES * size + here % LANES, LANES);
                store(v, size, block->values, narrow, head + here * size, 1);
                float *y = out + (((size_t)b * new + t) * heads + h) * size;
                size_t next = t + 1 < new ? head : head + (size_t)capacity * size;
                look_up_any(size, narrow, q, block->keys, block->values, head, next, here + 1, share, y);
            }
        }
}
