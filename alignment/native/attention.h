// Grouped-query attention of single tokens over a cache whose places a table gives token by token.
#pragma once
#include "vectors.h"

struct Step {  // the rows of one pass: tokens of different answers, each at its own position
    int64_t rows;
    const int64_t* positions;  // [rows]
    const int64_t* slots;      // [rows], whose table applies
    const int32_t* tables;     // [slots, table_width]: place in the cache of each position
    int64_t table_width;
    const float *cos, *sin;  // [positions, size]
};

// Rotate queries and keys of qkv [rows, (heads + 2 groups) * size] in place; put keys and values into the cache.
static void rotate_and_keep(float* qkv, const Step& step, int heads, int groups, int size, float* keys, float* values, int threads) {
    const int64_t stride = (int64_t)(heads + 2 * groups) * size, kept = (int64_t)groups * size;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < step.rows; r++) {
        float* row = qkv + r * stride;
        const float *cos = step.cos + step.positions[r] * size, *sin = step.sin + step.positions[r] * size;
        for (int h = 0; h < heads + groups; h++) {
            float* head = row + h * size;
            for (int i = 0; i < size / 2; i++) {
                const float a = head[i], b = head[i + size / 2];
                head[i] = a * cos[i] - b * sin[i];
                head[i + size / 2] = b * cos[i + size / 2] + a * sin[i + size / 2];
            }
        }
        const int64_t place = step.tables[step.slots[r] * step.table_width + step.positions[r]];
        std::memcpy(keys + place * kept, row + heads * size, kept * sizeof(float));
        std::memcpy(values + place * kept, row + (heads + groups) * size, kept * sizeof(float));
    }
}

// Softmax in place; returns nothing, weights sum to 1.
static void softmax(float* scores, int64_t count) {
    float largest = scores[0], total = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 1; i < count; i++) largest = std::max(largest, scores[i]);
    for (int64_t i = 0; i < count; i += LANES)
        store_some(scores + i, exp_of(load_some(scores + i, count - i) - largest), count - i);
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < count; j++) total += scores[j];
    const float scale = 1.0f / total;
    for (int64_t j = 0; j < count; j++) scores[j] *= scale;
}

// HEADS query heads of one row that share a key head, SIZE numbers each: the queries, then the sums, stay in registers.
template <int SIZE, int HEADS>
static void attend_heads(const float* query, const int32_t* table, int64_t length, const float* keys, const float* values,
                         int64_t kept, float* scores, float* mixed) {
    constexpr int VECTORS = SIZE / LANES;
    const float scale = 1.0f / std::sqrt((float)SIZE);
    for (int64_t t = 0; t < length; t++) {
        const float* key = keys + table[t] * kept;
        for (int h = 0; h < HEADS; h++) {
            vec dot{};
            for (int i = 0; i < VECTORS; i++) dot += load(query + h * SIZE + i * LANES) * load(key + i * LANES);
            scores[h * length + t] = sum_of(dot) * scale;
        }
    }
    for (int h = 0; h < HEADS; h++) softmax(scores + h * length, length);
    vec sums[HEADS][VECTORS] = {};
    for (int64_t t = 0; t < length; t++) {
        const float* value = values + table[t] * kept;
        for (int h = 0; h < HEADS; h++)
            for (int i = 0; i < VECTORS; i++) sums[h][i] += scores[h * length + t] * load(value + i * LANES);
    }
    for (int h = 0; h < HEADS; h++)
        for (int i = 0; i < VECTORS; i++) store(mixed + h * SIZE + i * LANES, sums[h][i]);
}

// The same for any size.
static void attend_head(const float* query, int size, const int32_t* table, int64_t length, const float* keys,
                        const float* values, int64_t kept, float* scores, float* mixed) {
    const float scale = 1.0f / std::sqrt((float)size);
    for (int64_t t = 0; t < length; t++) {
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int i = 0; i < size; i++) dot += query[i] * keys[table[t] * kept + i];
        scores[t] = dot * scale;
    }
    softmax(scores, length);
    std::memset(mixed, 0, sizeof(float) * size);
    for (int64_t t = 0; t < length; t++)
        for (int i = 0; i < size; i++) mixed[i] += scores[t] * values[table[t] * kept + i];
}

// All `heads` query heads that share a key head; how they are grouped depends on their number alone.
static void attend_group(const float* query, int heads, int size, const int32_t* table, int64_t length, const float* keys,
                         const float* values, int64_t kept, float* scores, float* mixed) {
    for (int h = 0; h < heads;) {
        const float* q = query + h * size;
        float* out = mixed + h * size;
        const int left = heads - h;
        if (size == 64 && left >= 3)
            attend_heads<64, 3>(q, table, length, keys, values, kept, scores, out), h += 3;
        else if (size == 64 && left == 2)
            attend_heads<64, 2>(q, table, length, keys, values, kept, scores, out), h += 2;
        else if (size == 64)
            attend_heads<64, 1>(q, table, length, keys, values, kept, scores, out), h += 1;
        else if (size == 128 && left >= 2)
            attend_heads<128, 2>(q, table, length, keys, values, kept, scores, out), h += 2;
        else if (size == 128)
            attend_heads<128, 1>(q, table, length, keys, values, kept, scores, out), h += 1;
        else
            attend_head(q, size, table, length, keys, values, kept, scores, out), h += 1;
    }
}

// mixed [rows, heads * size]: each row attends to its own and all earlier positions of its slot.
static void attend(const float* qkv, const Step& step, int heads, int groups, int size, const float* keys,
                   const float* values, float* mixed, int threads) {
    const int shared = heads / groups;
    const int64_t stride = (int64_t)(heads + 2 * groups) * size, kept = (int64_t)groups * size;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores;
#pragma omp for schedule(monotonic : dynamic, 1)
        for (int64_t r = 0; r < step.rows; r++) {
            const int64_t length = step.positions[r] + 1;
            scores.resize(std::max<size_t>(scores.size(), shared * length));
            for (int g = 0; g < groups; g++) {
                const int64_t first = (int64_t)g * shared * size;
                attend_group(qkv + r * stride + first, shared, size, step.tables + step.slots[r] * step.table_width, length,
                             keys + g * size, values + g * size, kept, scores.data(), mixed + r * heads * size + first);
            }
        }
    }
}
