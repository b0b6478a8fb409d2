/* Decoding on a CPU: the network of decoder.py, and sampling as in sampling.py. Compiled and called by kernels.py.

   All numbers are float32, or weights are int8 with a scale for each of their rows; then each row of inputs is rounded
   to int8, too, with a scale of its own, for products that many processors have instructions for. Keys and values may
   be bfloat16, the upper half of a float32, which halves the time in which they arrive from memory. What becomes of one
   sequence has the same bits however many others and threads there are: sums of int8 products are exact, and float32
   is always added in the same order. */

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
#define BLOCK (VECTORS * LANES)
#define NEXT_PAGE 4096 /* bytes: the next page of memory, from which processors do not fetch by themselves */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));

/* In memory, weights lie in blocks of BLOCK rows: for each column, the BLOCK numbers of its rows. In int8, for each
   four columns (with zeros after the last), the four numbers of each row. */
const int block_rows = BLOCK;

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

/* A row of numbers as int8, filled up with zeros to a multiple of four; their scale, and the sum of the int8. */
static void round_row(const float *x, int size, int8_t *out, float *scale, int32_t *sum)
{
    float largest = 0;
    int32_t total = 0;
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < size; i++)
        largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
    float inverse = largest > 1e-30f ? 127 / largest : 0;
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < size; i++) {
        float n = x[i] * inverse + 12582912; /* rounds, as in exponential() */
        int32_t bits;
        memcpy(&bits, &n, 4);
        out[i] = (int8_t)bits;
        total += out[i];
    }
    memset(out + size, 0, FOURS(size) - size);
    *scale = largest / 127;
    *sum = total;
}

/* Vectors v to v + count of the outputs of each of `rows` rows of x. All but the pointers and `in` are constants, so
   that the sums stay in registers. */
static ALWAYS_INLINE void multiply_tile(const float *block, int v, int count, const float *x, int rows, int in,
                                        floats out[TILE][VECTORS])
{
    floats sums[TILE][VECTORS], w[VECTORS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < count; i++)
            sums[r][i] = (floats){0};
    for (int k = 0; k < in; k++) {
        UNROLL for (int i = 0; i < count; i++)
            memcpy(&w[i], block + (size_t)k * BLOCK + (v + i) * LANES, sizeof w[i]);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int i = 0; i < count; i++)
                sums[r][i] += x[(size_t)r * in + k] * w[i];
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < count; i++)
            out[r][v + i] = sums[r][i];
}

/* sums + for each lane, the products of the four int8 of w (-127 to 127) with those of x. Where OFFSET is 128, the
   processor has only an instruction for unsigned w, and the result is larger by 128 times the four of x. */
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define OFFSET 128
#else
#define OFFSET 0
#endif
static ALWAYS_INLINE ints add_products(ints sums, ints w, ints x)
{
#if defined(__AVX512VNNI__)
    return (ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)(w ^ (int32_t)0x80808080), (__m512i)x);
#elif defined(__AVXVNNI__)
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)(w ^ (int32_t)0x80808080), (__m256i)x);
#elif defined(__AVX2__)
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)x), _mm256_sign_epi8((__m256i)w, (__m256i)x));
    return sums + (ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__aarch64__)
    int32x4_t halves[2];
    int8x16_t a[2], b[2];
    memcpy(halves, &sums, sizeof sums), memcpy(a, &w, sizeof w), memcpy(b, &x, sizeof x);
    UNROLL for (int i = 0; i < 2; i++) {
#ifdef __ARM_FEATURE_DOTPROD
        halves[i] = vdotq_s32(halves[i], a[i], b[i]);
#else
        int16x8_t low = vmull_s8(vget_low_s8(a[i]), vget_low_s8(b[i])), high = vmull_high_s8(a[i], b[i]);
        halves[i] = vaddq_s32(halves[i], vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
    }
    memcpy(&sums, halves, sizeof sums);
    return sums;
#else
    UNROLL for (int byte = 0; byte < 4; byte++)
        sums += (w << (24 - 8 * byte) >> 24) * (x << (24 - 8 * byte) >> 24);
    return sums;
#endif
}

/* The same as multiply_tile() for int8 x with their scales and sums; the outputs lack the weights' scales. */
static ALWAYS_INLINE void multiply_tile_int8(const int8_t *block, int v, int count, const int8_t *x,
                                             const float *scales, const int32_t *x_sums, int rows, int in,
                                             floats out[TILE][VECTORS])
{
    ints sums[INT8_TILE][VECTORS], w[VECTORS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < count; i++)
            sums[r][i] = (ints){0} - OFFSET * x_sums[r];
    for (int k = 0; k < FOURS(in); k += 4) {
        UNROLL for (int i = 0; i < count; i++) {
            const int8_t *start = block + (size_t)k * BLOCK + (v + i) * sizeof w[i];
            memcpy(&w[i], start, sizeof w[i]);
            if (rows == 1) /* float32 arrives no faster so */
                __builtin_prefetch(start + NEXT_PAGE);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + (size_t)r * FOURS(in) + k, sizeof four);
            UNROLL for (int i = 0; i < count; i++)
                sums[r][i] = add_products(sums[r][i], w[i], (ints){0} + four);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < count; i++)
            out[r][v + i] = __builtin_convertvector(sums[r][i], floats) * scales[r];
}

/* out (rows, out) = residual + linear(x), for x (rows, in). residual: NULL, or elsewhere in memory than out. */
static void multiply(const Linear *linear, float eps, const float *x, const float *residual, float *out, int rows,
                     const Scratch *scratch)
{
    int n = linear->out, in = linear->in, how = linear->prepare;
    const float *scales = linear->scales, *bias = linear->bias;
    if (how != NOTHING || scales) {
#pragma omp parallel for num_threads(scratch->threads) if (rows > 1)
        for (int r = 0; r < rows; r++) {
            const float *row = x + (size_t)r * in * (how == SWIGLU ? 2 : 1);
            if (how != NOTHING) {
                prepare_row(how, row, scratch->inputs + (size_t)r * in, in, eps);
                row = scratch->inputs + (size_t)r * in;
            }
            if (scales)
                round_row(row, in, scratch->bytes + (size_t)r * FOURS(in), scratch->scales + r, scratch->sums + r);
        }
        x = how == NOTHING ? x : scratch->inputs;
    }
    int tile = scales ? INT8_TILE : TILE, count = rows < tile ? 1 : tile;
#pragma omp parallel for num_threads(scratch->threads)
    for (int first = 0; first < n; first += BLOCK) {
        int width = n - first < BLOCK ? n - first : BLOCK;
        const float *block = (const float *)linear->weights + (size_t)first * in;
        const int8_t *int8_block = (const int8_t *)linear->weights + (size_t)first * FOURS(in);
        for (int r = 0; r < rows; r += count) {
            floats sums[TILE][VECTORS];
            if (r + count > rows) /* the last tile overlaps the one before */
                r = rows - count;
            const float *start = x + (size_t)r * in, *x_scales = scratch->scales + r;
            const int8_t *bytes = scratch->bytes + (size_t)r * FOURS(in);
            const int32_t *x_sums = scratch->sums + r;
            if (count == 1 && scales)
                multiply_tile_int8(int8_block, 0, VECTORS, bytes, x_scales, x_sums, 1, in, sums);
            else if (count == 1)
                multiply_tile(block, 0, VECTORS, start, 1, in, sums);
            else
                for (int v = 0; v < VECTORS; v += 2)
                    if (scales)
                        multiply_tile_int8(int8_block, v, 2, bytes, x_scales, x_sums, INT8_TILE, in, sums);
                    else
                        multiply_tile(block, v, 2, start, TILE, in, sums);
            for (int t = 0; t < count; t++)
                for (int j = 0; j < width; j++) {
                    size_t place = (size_t)(r + t) * n + first + j;
                    float y = ((float *)sums[t])[j] * (scales ? scales[first + j] : 1);
                    out[place] = y + (bias ? bias[first + j] : 0) + (residual ? residual[place] : 0);
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

/* logits (batch, vocabulary) after the last of `new` tokens of each sequence, for their embeddings x (batch, new,
   width), which are overwritten. memory holds rows * (deepest + FOURS(deepest) / 4 + 2 + widest + width + heads * size)
   numbers for rows = batch * new; deepest and widest: the inputs and outputs of the largest matrices, without the
   head's outputs. */
void decode(const Block *blocks, int n_layer, const Linear *head, float eps, float *x, float *logits,
            const Shape *shape, float *memory, int deepest, int widest, int threads)
{
    int batch = shape->batch, new = shape->new;
    size_t rows = (size_t)batch * new, width = head->in;
    float *wide = memory + rows * deepest, *between = wide + rows * widest, *attended = between + rows * width;
    float *scales = attended + rows * shape->heads * shape->size;
    Scratch scratch = {threads, memory, scales, (int8_t *)(scales + 2 * rows), (int32_t *)(scales + rows)};
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

/* The `count` largest of n logits, largest first: their probabilities in softmax(logits / temperature), and places. */
static void find_top(const float *x, int n, int count, float temperature, float *best, int64_t *place)
{
    float total = 0;
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

/* p[i] /= their sum, for the first `count`. Sums as PyTorch has them: of doubles, each rounded to float. */
static void normalise(float *p, int count)
{
    double total = 0;
    for (int i = 0; i < count; i++)
        total += p[i];
    for (int i = 0; i < count; i++)
        p[i] /= (float)total;
}

/* A token drawn from n logits with a uniform number in [0, 1); -1 if more than filters->count may pass the filters. As
   filter_top() and draw() in sampling.py. */
static int64_t draw(const float *logits, int n, const Filters *filters, float uniform)
{
    int count = filters->count, top_k = filters->top_k, kept = top_k && top_k < count ? top_k : count;
    float p[count], top_p = filters->top_p, min_p = filters->min_p;
    int64_t place[count];
    find_top(logits, n, count, filters->temperature, p, place);
    if (top_k)
        normalise(p, kept);
    double before = 0;
    for (int i = 0; i < kept; i++) {
        double sum = before + p[i];
        if (i && ((top_p < 1 && (float)sum - p[i] >= top_p) || p[i] < min_p * p[0]))
            kept = i;
        before = sum;
    }
    if (kept == count && count != n && count != top_k)
        return -1;
    normalise(p, kept);
    double total = 0, sum = 0;
    for (int i = 0; i < kept; i++)
        total += p[i];
    float most = 1 - 1 / 4194304.f, target = (uniform < most ? uniform : most) * (float)total;
    int drawn = 0;
    while (drawn < kept - 1 && (float)(sum += p[drawn]) <= target)
        drawn++;
    return place[drawn];
}

/* draw() for each row of n logits. */
void sample(const float *logits, int rows, int n, const Filters *filters, const float *uniforms, int64_t *tokens)
{
#pragma omp parallel for if (rows > 8)
    for (int r = 0; r < rows; r++)
        tokens[r] = draw(logits + (size_t)r * n, n, filters, uniforms[r]);
}

/* Writes up to sequences->steps tokens of each sequence, each after one call of decode(), where the other arguments are
   described. Returns how many it has written: fewer if draw() cannot choose one of the next, of which `logits` then
   are. shape->start advances with each call of decode(). */
int write_tokens(const Block *blocks, int n_layer, const Linear *head, float eps, float *x, float *logits,
                 Shape *shape, float *memory, int deepest, int widest, int threads, const Sequences *sequences,
                 const Filters *filters)
{
    int width = head->in, n = head->out, total = sequences->total, draws = sequences->draws;
    const float *places = sequences->places;
    for (int step = 0; step < sequences->steps; step++) {
        int position = sequences->position + step, few = 0;
        for (int b = 0; b < shape->batch; b++) {
            float *row = x + (size_t)b * width;
            int64_t latest = sequences->tokens[(size_t)b * total + position - 1];
            memcpy(row, sequences->embedding + latest * width, sizeof(float) * width);
            if (places)
                for (int i = 0; i < width; i++)
                    row[i] += places[(size_t)shape->start * width + i];
        }
        decode(blocks, n_layer, head, eps, x, logits, shape, memory, deepest, widest, threads);
        shape->start++;
#pragma omp parallel for if (shape->batch > 8) reduction(+ : few)
        for (int b = 0; b < shape->batch; b++) {
            int turn = position - (int)sequences->lengths[b];
            if (turn < 0) /* still in its prompt */
                continue;
            float uniform = sequences->uniforms[(size_t)b * draws + (turn < draws ? turn : draws - 1)];
            int64_t token = draw(logits + (size_t)b * n, n, filters, uniform);
            sequences->tokens[(size_t)b * total + position] = token;
            few += token < 0;
        }
        if (few)
            return step;
    }
    return sequences->steps;
}
