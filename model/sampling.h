/* The next token, drawn from logits. */

#pragma once

#include "products.h"

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
