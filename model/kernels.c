/* Decoding on a CPU: the network of decoder.py, and sampling as in sampling.py. Compiled and called by kernels.py.

   All numbers are float32, or weights are int8 with a scale for each of their rows; then each row of inputs is rounded
   to int8, too, with a scale of its own, for products that many processors have instructions for. Keys and values may
   be bfloat16, the upper half of a float32, which halves the time in which they arrive from memory. What becomes of one
   sequence has the same bits however many others and threads there are: sums of int8 products are exact, and float32
   is always added in the same order. */

#include "attention.h"
#include "products.h"
#include "sampling.h"

const int block_rows = BLOCK;

/* The numbers that decode() needs memory for: rows = batch * new, attended = heads * size. */
size_t decode_memory(size_t rows, int deepest, int widest, int width, int attended)
{
    return rows * (deepest + widest + width + attended + 2 + FOURS(deepest) / 4);
}

/* logits (batch, vocabulary) after the last of `new` tokens of each sequence, for their embeddings x (batch, new,
   width), which are overwritten. memory holds decode_memory() numbers; deepest and widest: the inputs and outputs of
   the largest matrices, without the head's outputs. */
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
