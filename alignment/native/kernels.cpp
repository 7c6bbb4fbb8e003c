// What alignment.ppo.rollout.native and alignment.ppo.models.operations call; structures are mirrored in the former.
#include "attention.h"
#include "elementwise.h"
#include "products.h"
#include "sampling.h"

struct Shape {
    int64_t hidden, heads, groups, size, inner;  // of this process's part
    float epsilon;
    int32_t threads;
};

struct Layer {
    const float *attention_norm, *qkv, *qkv_bias, *output, *mlp_norm, *gate_up, *down;
    float *keys, *values;  // [places, groups, size]
};

struct Scratch {
    float *normed, *qkv, *mixed, *inner;
};

extern "C" {

int panel_width() { return PANEL; }

// packed [panels, depth, PANEL]: columns [first, first + columns) of it become those of weight [depth, columns].
// interleave: 0, or which half of every panel (1 gates, 2 their partners) to fill, LANES columns at a time.
void pack(const float* weight, int64_t depth, int64_t columns, int64_t depth_stride, int64_t column_stride,
          int64_t first, int interleave, float* packed, int threads) {
    const int64_t step = interleave ? LANES : PANEL;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < columns; start += LANES) {
        const int count = (int)std::min<int64_t>(LANES, columns - start);
        float* to[LANES];
        for (int j = 0; j < count; j++) {
            const int64_t column = first + start + j;
            to[j] = packed + column / step * depth * PANEL + column % step + (interleave == 2 ? LANES : 0);
        }
        const bool together = column_stride == 1 && to[count - 1] == to[0] + count - 1;
        for (int64_t k = 0; k < depth; k++) {
            const float* from = weight + k * depth_stride + start * column_stride;
            if (together)
                std::memcpy(to[0] + k * PANEL, from, count * sizeof(float));
            else
                for (int j = 0; j < count; j++) to[j][k * PANEL] = from[j * column_stride];
        }
    }
}

// into [rows, hidden] += attention of normalised hidden [rows, hidden]
void attention(const Shape* shape, const Layer* layer, const Step* step, const Scratch* scratch, const float* hidden, float* into) {
    const int64_t rows = step->rows, heads = shape->heads, groups = shape->groups, size = shape->size;
    const int threads = shape->threads;
    normalize(hidden, rows, shape->hidden, layer->attention_norm, shape->epsilon, scratch->normed, nullptr, threads);
    product<STORE>(scratch->normed, rows, shape->hidden, layer->qkv, layer->qkv_bias, scratch->qkv, (heads + 2 * groups) * size, threads);
    rotate_and_keep(scratch->qkv, *step, heads, groups, size, layer->keys, layer->values, threads);
    attend(scratch->qkv, *step, heads, groups, size, layer->keys, layer->values, scratch->mixed, threads);
    product<ADD>(scratch->mixed, rows, heads * size, layer->output, nullptr, into, shape->hidden, threads);
}

// into [rows, hidden] += gated feed-forward layer of normalised hidden [rows, hidden]
void mlp(const Shape* shape, const Layer* layer, int64_t rows, const Scratch* scratch, const float* hidden, float* into) {
    const int threads = shape->threads;
    normalize(hidden, rows, shape->hidden, layer->mlp_norm, shape->epsilon, scratch->normed, nullptr, threads);
    product<SWIGLU>(scratch->normed, rows, shape->hidden, layer->gate_up, nullptr, scratch->inner, shape->inner, threads);
    product<ADD>(scratch->inner, rows, shape->inner, layer->down, nullptr, into, shape->hidden, threads);
}

// logits [rows, columns] of final hidden states [rows, hidden]
void head(const Shape* shape, const float* norm, const float* packed, int64_t rows, const Scratch* scratch,
          const float* hidden, float* logits, int64_t columns) {
    normalize(hidden, rows, shape->hidden, norm, shape->epsilon, scratch->normed, nullptr, shape->threads);
    product<STORE>(scratch->normed, rows, shape->hidden, packed, nullptr, logits, columns, shape->threads);
}

// Draw `count` tokens: number i from row rows[i] of the logits, by uniforms[i]. seen: NULL, or a row of bytes per slot.
void sample(const Sampling* how, const float* logits, int64_t count, const int64_t* rows, const int64_t* slots,
            const double* uniforms, const uint8_t* seen, const uint8_t* forbids_end, int64_t* tokens, float* log_probs,
            float* entropies, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> shaped, e;
#pragma omp for schedule(monotonic : dynamic, 1)
        for (int64_t i = 0; i < count; i++)
            tokens[i] = sample_row(logits + rows[i] * how->vocabulary, *how, seen ? seen + slots[i] * how->vocabulary : nullptr,
                                   forbids_end[i], uniforms[i], shaped, e, log_probs + i, entropies + i);
    }
}
}
