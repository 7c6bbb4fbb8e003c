// Matrix products of few rows over weights that were packed into panels of PANEL columns.
#pragma once
#include "vectors.h"

enum Finish { STORE, ADD, SWIGLU };

// R rows by one panel, with the sums in registers. SWIGLU: a panel holds LANES gates, then their LANES partners.
template <int R, Finish F>
static void tile(const float* x, int64_t depth, const float* panel, const float* bias, float* out, int64_t stride, int width) {
    vec sums[R][2];
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = vec{};
    for (int64_t k = 0; k < depth; k++) {
        const vec a = load(panel + k * PANEL), b = load(panel + k * PANEL + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            const vec s = splat(x[r * depth + k]);
            sums[r][0] += s * a;
            sums[r][1] += s * b;
        }
    }
    for (int r = 0; r < R; r++) {
        float* to = out + r * stride;
        float row[PANEL];
        if (F == SWIGLU) {
            store(row, sums[r][0] / (1.0f + exp_of(-sums[r][0])) * sums[r][1]);
        } else {
            store(row, sums[r][0]);
            store(row + LANES, sums[r][1]);
            if (bias)
                for (int j = 0; j < width; j++) row[j] += bias[j];
            if (F == ADD)
                for (int j = 0; j < width; j++) row[j] += to[j];
        }
        std::memcpy(to, row, width * sizeof(float));
    }
}

template <Finish F, int R = TILE>
static void tile_of(int rows, const float* x, int64_t depth, const float* panel, const float* bias, float* out,
                    int64_t stride, int width) {
    if (rows == R)
        tile<R, F>(x, depth, panel, bias, out, stride, width);
    else if constexpr (R > 1)
        tile_of<F, R - 1>(rows, x, depth, panel, bias, out, stride, width);
}

// out [rows, columns] = x [rows, depth] times a packed matrix, finished as F says.
template <Finish F>
static void product(const float* x, int64_t rows, int64_t depth, const float* packed, const float* bias, float* out,
                    int64_t columns, int threads) {
    const int broad = F == SWIGLU ? LANES : PANEL;
    const int64_t panels = (columns + broad - 1) / broad, tiles = (rows + TILE - 1) / TILE;
    const int64_t blocks = (tiles + 3) / 4;  // a thread takes up to four tiles of rows by one panel at a time
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t work = 0; work < panels * blocks; work++) {
        const int64_t n = work / blocks, block = work % blocks;
        const int width = (int)std::min<int64_t>(broad, columns - n * broad);
        for (int64_t t = tiles * block / blocks; t < tiles * (block + 1) / blocks; t++) {
            const int64_t first = rows * t / tiles, last = rows * (t + 1) / tiles;
            tile_of<F>((int)(last - first), x + first * depth, depth, packed + n * depth * PANEL,
                       bias ? bias + n * broad : nullptr, out + first * columns + n * broad, columns, width);
        }
    }
}
