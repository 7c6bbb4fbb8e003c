// What a decoder layer does between its matrix products, and the gradients of it; a thread takes whole rows.
#pragma once
#include "vectors.h"

// Root-mean-square normalisation of each row (Zhang and Sennrich 2019, arXiv:1910.07467).
// scales: NULL, or [rows], what each row was multiplied by.
static void normalize(const float* x, int64_t rows, int64_t width, const float* weight, float epsilon, float* out,
                      float* scales, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float* row = x + r * width;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) squares += row[i] * row[i];
        const float scale = 1.0f / std::sqrt(squares / width + epsilon);
        for (int64_t i = 0; i < width; i++) out[r * width + i] = row[i] * scale * weight[i];
        if (scales) scales[r] = scale;
    }
}

extern "C" {

void rms_norm(const float* x, int64_t rows, int64_t width, const float* weight, float epsilon, float* out, float* scales,
              int threads) {
    normalize(x, rows, width, weight, epsilon, out, scales, threads);
}

// Gradients of x and of the weight; every thread's part of the latter is added in the threads' order.
void rms_norm_grad(const float* x, int64_t rows, int64_t width, const float* weight, const float* scales,
                   const float* out_grad, float* x_grad, float* weight_grad, int threads) {
    std::vector<float> parts(threads * width, 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < threads; part++) {
        float* own = parts.data() + part * width;
        for (int64_t r = rows * part / threads; r < rows * (part + 1) / threads; r++) {
            const float *row = x + r * width, *grad = out_grad + r * width, scale = scales[r];
            float dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < width; i++) dot += grad[i] * weight[i] * row[i];
            const float shrink = dot * scale * scale * scale / width;
            for (int64_t i = 0; i < width; i++) {
                x_grad[r * width + i] = scale * grad[i] * weight[i] - shrink * row[i];
                own[i] += grad[i] * row[i] * scale;
            }
        }
    }
    std::memset(weight_grad, 0, width * sizeof(float));
    for (int part = 0; part < threads; part++)
        for (int64_t i = 0; i < width; i++) weight_grad[i] += parts[part * width + i];
}

// out = gate * sigmoid(gate) * up, all [count] (Shazeer 2020, arXiv:2002.05202).
void swiglu(const float* gate, const float* up, int64_t count, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i += LANES) {
        const vec g = load_some(gate + i, count - i), u = load_some(up + i, count - i);
        store_some(out + i, g / (1.0f + exp_of(-g)) * u, count - i);
    }
}

void swiglu_grad(const float* gate, const float* up, const float* out_grad, int64_t count, float* gate_grad,
                 float* up_grad, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i += LANES) {
        const vec g = load_some(gate + i, count - i), u = load_some(up + i, count - i);
        const vec grad = load_some(out_grad + i, count - i), sigmoid = 1.0f / (1.0f + exp_of(-g));
        store_some(up_grad + i, grad * g * sigmoid, count - i);
        store_some(gate_grad + i, grad * u * sigmoid * (1.0f + g * (1.0f - sigmoid)), count - i);
    }
}

// Rotary embedding of x [rows, heads, size] by tables [positions, size] (Su et al. 2021, arXiv:2104.09864), whose
// halves are alike. direction: 1, or -1 to turn back, which is also the gradient.
void rotate(const float* x, int64_t rows, int64_t heads, int64_t size, const int64_t* positions, const float* cos,
            const float* sin, float direction, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float *c = cos + positions[r] * size, *s = sin + positions[r] * size;
        for (int64_t h = r * heads; h < (r + 1) * heads; h++) {
            const float *low = x + h * size, *high = low + size / 2;
            float *to = out + h * size, *to_high = to + size / 2;
            for (int64_t i = 0; i < size / 2; i++) {
                to[i] = low[i] * c[i] - direction * high[i] * s[i];
                to_high[i] = high[i] * c[i] + direction * low[i] * s[i];
            }
        }
    }
}

// weights = softmax(scale * scores + mask) over the last axis: scores [batch, heads, width, length], mask [batch, width,
// length].
void masked_softmax(const float* scores, const float* mask, int64_t batch, int64_t heads, int64_t width, int64_t length,
                    float scale, float* weights, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < batch * heads * width; r++) {
        const float *row = scores + r * length, *added = mask + (r / (heads * width) * width + r % width) * length;
        float *out = weights + r * length, largest = -std::numeric_limits<float>::infinity(), total = 0;
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < length; i++) largest = std::max(largest, scale * row[i] + added[i]);
        for (int64_t i = 0; i < length; i += LANES) {
            const vec below = scale * load_some(row + i, length - i) + load_some(added + i, length - i) - largest;
            const vec e = exp_of(below);
            store_some(out + i, below < -87.0f ? vec{} : e, length - i);  // no denormal numbers for the matrix product
        }
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < length; i++) total += out[i];
        const float share = 1.0f / total;
        for (int64_t i = 0; i < length; i++) out[i] *= share;
    }
}

// Gradient of the scores, rows of `length`.
void masked_softmax_grad(const float* weights, const float* weights_grad, int64_t rows, int64_t length, float scale,
                         float* scores_grad, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float *weight = weights + r * length, *grad = weights_grad + r * length;
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < length; i++) dot += weight[i] * grad[i];
        for (int64_t i = 0; i < length; i++) scores_grad[r * length + i] = scale * weight[i] * (grad[i] - dot);
    }
}
}
