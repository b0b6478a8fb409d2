/* Decoding on a CPU: the network of decoder.py, and the most likely tokens. Compiled and called by kernels.py.

   All numbers are float32, except that weights may be int8 with a scale for each of their rows. What becomes of one
   sequence has the same bits however many others and threads there are: additions are always in the same order. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#endif

#ifdef __AVX512F__
#define LANES 16 /* numbers in a vector register */
#define TILE 12  /* rows of x at once: their sums in two vectors of outputs take three quarters of the registers */
#else
#define LANES 8
#define TILE 6
#endif
#define VECTORS 4 /* as many as there are int8 in a lane */
#define BLOCK (VECTORS * LANES)
#define AHEAD 4096 /* bytes: the next page of memory, from which processors do not fetch by themselves */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

/* In memory, weights lie in blocks of BLOCK rows: for each column, the BLOCK numbers of its rows. In int8, each lane of
   a vector has four of them: byte v of lane l belongs to row v * LANES + l. */
const int block_rows = BLOCK;

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
    float *keys, *values;   /* (batch, heads, capacity, size) */
} Block;

typedef struct { /* `new` tokens of each sequence at the positions from `start` on, with attention's heads */
    int batch, new, start, heads, size;
    int capacity, positions; /* of the keys and values; of the tables cos and sin */
} Shape;

/* What a call to decode works with: the number of threads, and memory for the inputs of a matrix (rows, deepest) and
   for a block of each thread (deepest, BLOCK). */
typedef struct {
    int threads, deepest;
    float *inputs, *blocks;
} Scratch;

/* e^x, within 3e-7 of it (relative), for x cut to -87 .. 87: 2^n times a polynomial, in a form that compilers
   vectorise. */
static inline float exponential(float x)
{
    x = x < -87 ? -87 : x > 87 ? 87 : x;
    float n = x * 1.44269504f + 12582912; /* adding 1.5 * 2^23 rounds to a whole number and puts it in the low bits */
    uint32_t power, bits;
    memcpy(&power, &n, 4);
    float r = x - (n - 12582912) * 0.693359375f + (n - 12582912) * 2.12194440e-4f; /* ln 2 in two parts */
    float e = 1 + r * (1 + r * (0.5f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    memcpy(&bits, &e, 4);
    bits += power << 23;
    memcpy(&e, &bits, 4);
    return e;
}

static inline float sigmoid(float x)
{
    return 1 / (1 + exponential(-x));
}

static inline float dot(const float *a, const float *b, int size)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < size; i++)
        sum += a[i] * b[i];
    return sum;
}

/* What happens to a row of inputs before the matrix: size numbers, for SwiGLU from 2 * size. */
static void prepare_row(int how, const float *x, float *out, int size, float eps)
{
    if (how == RMS_NORM) {
        float scale = 1 / sqrtf(dot(x, x, size) / size + eps);
        for (int i = 0; i < size; i++)
            out[i] = scale * x[i];
    } else if (how == LAYER_NORM) {
        float mean = 0;
#pragma omp simd reduction(+ : mean)
        for (int i = 0; i < size; i++)
            mean += x[i] / size;
        for (int i = 0; i < size; i++)
            out[i] = x[i] - mean;
        float scale = 1 / sqrtf(dot(out, out, size) / size + eps);
        for (int i = 0; i < size; i++)
            out[i] *= scale;
    } else if (how == SWIGLU) {
        for (int i = 0; i < size; i++)
            out[i] = x[i] * sigmoid(x[i]) * x[size + i];
    } else { /* GELU with tanh: 0.5 (1 + tanh(u)) is sigmoid(2 u) */
        for (int i = 0; i < size; i++)
            out[i] = x[i] * sigmoid(1.59576912f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
    }
}

/* Vectors v to v + count of column k in a block of weights. */
static ALWAYS_INLINE void column(const void *block, int is_int8, int k, int v, int count, floats *w)
{
    ints four;
    if (is_int8)
        memcpy(&four, (const int8_t *)block + (size_t)k * BLOCK, sizeof four);
    UNROLL for (int i = 0; i < count; i++)
        if (is_int8)
            w[i] = __builtin_convertvector(four << (24 - 8 * (v + i)) >> 24, floats);
        else
            memcpy(&w[i], (const float *)block + (size_t)k * BLOCK + (v + i) * LANES, sizeof w[i]);
}

/* Vectors v to v + count of the outputs of each of `rows` rows of x. All but the pointers and `in` are constants, so
   that the sums stay in registers. */
static ALWAYS_INLINE void multiply_tile(const void *block, int is_int8, int v, int count, const float *x, int rows,
                                        int in, floats out[TILE][VECTORS])
{
    floats sums[TILE][VECTORS], w[VECTORS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < count; i++)
            sums[r][i] = (floats){0};
    for (int k = 0; k < in; k++) {
        if (rows == 1 && is_int8) /* float32 arrives no faster so */
            __builtin_prefetch((const int8_t *)block + (size_t)k * BLOCK + AHEAD);
        column(block, is_int8, k, v, count, w);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int i = 0; i < count; i++)
                sums[r][i] += x[(size_t)r * in + k] * w[i];
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < count; i++)
            out[r][v + i] = sums[r][i];
}

/* out (rows, out) = residual + linear(x), for x (rows, in). residual: NULL, or elsewhere in memory than out. */
static void multiply(const Linear *linear, float eps, const float *x, const float *residual, float *out, int rows,
                     const Scratch *scratch)
{
    int n = linear->out, in = linear->in, how = linear->prepare;
    const float *scales = linear->scales, *bias = linear->bias;
    if (how != NOTHING) {
#pragma omp parallel for num_threads(scratch->threads) if (rows > 1)
        for (int r = 0; r < rows; r++)
            prepare_row(how, x + (size_t)r * in * (how == SWIGLU ? 2 : 1), scratch->inputs + (size_t)r * in, in, eps);
        x = scratch->inputs;
    }
    int tiled = rows >= TILE;
#pragma omp parallel num_threads(scratch->threads)
    {
        floats *expanded = (floats *)(scratch->blocks + (size_t)omp_get_thread_num() * scratch->deepest * BLOCK);
#pragma omp for schedule(static)
        for (int first = 0; first < n; first += BLOCK) {
            int width = n - first < BLOCK ? n - first : BLOCK;
            const void *block = (const char *)linear->weights + (size_t)first * in * (scales ? 1 : 4);
            if (tiled && scales) { /* int8 to float32, once for all rows */
                for (int k = 0; k < in; k++)
                    column(block, 1, k, 0, VECTORS, expanded + k * VECTORS);
                block = expanded;
            }
            for (int r = 0, count; r < rows; r += count) {
                floats sums[TILE][VECTORS];
                count = tiled ? TILE : 1;
                if (r + count > rows) /* the last tile overlaps the one before */
                    r = rows - count;
                const float *start = x + (size_t)r * in;
                if (tiled)
                    for (int v = 0; v < VECTORS; v += 2)
                        multiply_tile(block, 0, v, 2, start, TILE, in, sums);
                else if (scales)
                    multiply_tile(block, 1, 0, VECTORS, start, 1, in, sums);
                else
                    multiply_tile(block, 0, 0, VECTORS, start, 1, in, sums);
                for (int t = 0; t < count; t++)
                    for (int j = 0; j < width; j++) {
                        size_t place = (size_t)(r + t) * n + first + j;
                        float y = ((float *)sums[t])[j] * (scales ? scales[first + j] : 1);
                        out[place] = y + (bias ? bias[first + j] : 0) + (residual ? residual[place] : 0);
                    }
            }
        }
    }
}

/* Normalise a query or key (size numbers) and turn it by its position's angles, with the tables of decoder.py. */
static void turn(const float *x, const float *cos, const float *sin, float *out, int size, float eps)
{
    float scale = 1 / sqrtf(dot(x, x, size) / size + eps);
    for (int i = 0; i < size; i++)
        out[i] = scale * (x[i] * cos[i] + x[i < size / 2 ? i + size / 2 : i - size / 2] * sin[i]);
}

/* out (batch, new, heads * size) = causal attention for qkv (batch, new, 3, heads, size). Extends the block's keys and
   values. */
static void attend(const Block *block, float eps, const float *qkv, float *out, const Shape *shape, int threads)
{
    int batch = shape->batch, new = shape->new, heads = shape->heads, size = shape->size, capacity = shape->capacity;
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int b = 0; b < batch; b++)
        for (int h = 0; h < heads; h++) {
            const float *cos = block->cos, *sin = block->sin;
            size_t head = ((size_t)b * heads + h) * capacity * size;
            float *k = block->keys + head, *v = block->values + head;
            float query[size], share[capacity], scale = 1 / sqrtf(size);
            for (int t = 0; t < new; t++) {
                int here = shape->start + t;
                const float *q = qkv + ((((size_t)b * new + t) * 3) * heads + h) * size;
                const float *new_k = q + heads * size, *new_v = new_k + heads * size;
                if (cos) {
                    int place = here * size, key_place = (shape->positions + here) * size;
                    turn(q, cos + place, sin + place, query, size, eps);
                    turn(new_k, cos + key_place, sin + key_place, k + place, size, eps);
                } else {
                    memcpy(query, q, sizeof query);
                    memcpy(k + here * size, new_k, sizeof query);
                }
                memcpy(v + here * size, new_v, sizeof query);
                float largest = -INFINITY, total = 0;
                for (int p = 0; p <= here; p++) {
                    share[p] = scale * dot(query, k + p * size, size);
                    largest = share[p] > largest ? share[p] : largest;
                }
                for (int p = 0; p <= here; p++)
                    share[p] = exponential(share[p] - largest);
#pragma omp simd reduction(+ : total)
                for (int p = 0; p <= here; p++)
                    total += share[p];
                float *y = out + (((size_t)b * new + t) * heads + h) * size;
                memset(y, 0, sizeof query);
                for (int p = 0; p <= here; p++)
                    for (int i = 0; i < size; i++)
                        y[i] += share[p] * v[p * size + i];
                for (int i = 0; i < size; i++)
                    y[i] /= total;
            }
        }
}

/* logits (batch, vocabulary) after the last of `new` tokens of each sequence, for their embeddings x (batch, new,
   width), which are overwritten. memory holds threads * BLOCK * deepest + rows * (deepest + widest + width +
   heads * size) numbers for rows = batch * new; deepest and widest: the inputs and outputs of the largest matrices,
   without the head's outputs. */
void decode(const Block *blocks, int n_layer, const Linear *head, float eps, float *x, float *logits,
            const Shape *shape, float *memory, int deepest, int widest, int threads)
{
    int batch = shape->batch, new = shape->new;
    size_t rows = (size_t)batch * new, width = head->in;
    Scratch scratch = {threads, deepest, memory + (size_t)threads * BLOCK * deepest, memory};
    float *wide = scratch.inputs + rows * deepest, *between = wide + rows * widest, *attended = between + rows * width;
    for (const Block *block = blocks; block < blocks + n_layer; block++) {
        multiply(&block->qkv, eps, x, NULL, wide, rows, &scratch);
        attend(block, eps, wide, attended, shape, threads);
        multiply(&block->project, eps, attended, x, between, rows, &scratch);
        multiply(&block->up, eps, between, NULL, wide, rows, &scratch);
        multiply(&block->down, eps, wide, between, x, rows, &scratch);
    }
    for (int b = 0; b < batch; b++)
        memcpy(between + b * width, x + ((size_t)b * new + new - 1) * width, sizeof(float) * width);
    multiply(head, eps, between, NULL, logits, batch, &scratch);
}

/* The `count` largest of each row's n logits, largest first: their probabilities (rows, count) in
   softmax(logits / temperature), and their places (rows, count). */
void top_probabilities(const float *logits, int rows, int n, int count, float temperature, float *probabilities,
                       int64_t *places)
{
#pragma omp parallel for if (rows > 8)
    for (int r = 0; r < rows; r++) {
        const float *x = logits + (size_t)r * n;
        float *best = probabilities + (size_t)r * count, total = 0;
        int64_t *place = places + (size_t)r * count;
        for (int c = 0; c < count; c++) {
            best[c] = -INFINITY;
            place[c] = 0;
        }
        for (int first = 0; first < n; first += 64) {
            int last = first + 64 < n ? first + 64 : n;
            float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
            for (int i = first; i < last; i++)
                largest = x[i] > largest ? x[i] : largest;
            if (largest <= best[count - 1]) /* nearly always */
                continue;
            for (int i = first; i < last; i++)
                if (x[i] > best[count - 1]) {
                    int c = count - 1;
                    for (; c > 0 && x[i] > best[c - 1]; c--) {
                        best[c] = best[c - 1];
                        place[c] = place[c - 1];
                    }
                    best[c] = x[i];
                    place[c] = i;
                }
        }
        float largest = best[0], scale = 1 / temperature;
#pragma omp simd reduction(+ : total)
        for (int i = 0; i < n; i++)
            total += exponential((x[i] - largest) * scale);
        for (int c = 0; c < count; c++)
            best[c] = exponential((best[c] - largest) * scale) / total;
    }
}
