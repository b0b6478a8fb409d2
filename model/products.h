/* Products of rows with a matrix, after what happens to the rows before: in float32, or in int8 with scales. */

#pragma once

#include "kernels.h"

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
