// From logits to tokens, without sorting the vocabulary.
#pragma once
#include "vectors.h"

struct Sampling {
    int64_t vocabulary;
    double temperature;  // 0: the likeliest token
    int64_t top_k;       // 0: all
    double top_p;        // 1: all
    double penalty;      // 1: none
    const int64_t* ends;
    int64_t end_count;
};

constexpr int BLOCK = 512;
constexpr double LARGEST_ZERO = 1e-20;  // as in sampling.py: tokens of probability 0 together stay below it

// Relative probabilities exp(x / temperature - largest) into e; returns their sum; `moment`: sum of e * exponent.
static double exponentials(const float* x, int64_t count, float temperature, float largest, float* e, double* moment) {
    wide total{}, first{};
    const vec inverse = splat(1.0f / temperature);
    auto add = [&](const float* from, float* to) {
        const vec raw = load(from), shifted = (raw - largest) * inverse;
        const vec value = shifted < -87.0f ? vec{} : exp_of(shifted);
        store(to, value);
        total += __builtin_convertvector(value, wide);
        first += __builtin_convertvector(value == 0.0f ? vec{} : value * shifted, wide);
    };
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) add(x + i, e + i);
    if (i < count) {
        float rest[LANES], out[LANES];
        std::fill(rest, rest + LANES, -std::numeric_limits<float>::infinity());
        std::memcpy(rest, x + i, (count - i) * sizeof(float));
        add(rest, out);
        std::memcpy(e + i, out, (count - i) * sizeof(float));
    }
    double sum = 0, sum_of_first = 0;
    for (int j = 0; j < LANES; j++) sum += total[j], sum_of_first += first[j];
    if (moment) *moment = sum_of_first;
    return sum;
}

static float largest_of(const float* x, int64_t count) {
    float largest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < count; i++) largest = std::max(largest, x[i]);
    return largest;
}

// First index whose cumulative sum exceeds the target.
static int64_t search(const float* e, int64_t count, double target) {
    double before = 0;
    int64_t last = 0;
    for (int64_t start = 0; start < count; start += BLOCK) {
        const int64_t end = std::min(start + BLOCK, count);
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = start; i < end; i++) sum += e[i];
        if (before + sum > target) {
            double reached = before;
            for (int64_t i = start; i < end; i++) {
                reached += e[i];
                if (e[i] > 0) last = i;
                if (e[i] > 0 && reached > target) return i;
            }
        }
        before += sum;
    }
    return last;  // only rounding leads here
}

// The value of the last element that is kept when the largest are kept until their sum reaches `mass`.
static float mass_threshold(std::vector<float>& values, double mass) {
    auto first = values.begin(), last = values.end();
    double above = 0;
    while (true) {
        const float a = *first, b = first[(last - first) / 2], c = last[-1];
        const float pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
        const auto larger = std::partition(first, last, [=](float value) { return value > pivot; });
        const auto equal = std::partition(larger, last, [=](float value) { return value == pivot; });
        double mass_larger = 0;
        for (auto i = first; i < larger; i++) mass_larger += *i;
        const double with_equal = above + mass_larger + (double)pivot * (equal - larger);
        if (above + mass_larger >= mass) {
            last = larger;
        } else if (with_equal >= mass || equal == last) {
            return pivot;
        } else {
            above = with_equal;
            first = equal;
        }
    }
}

// Apply everything that shapes the distribution, in the order of transformers' processors, to one row of logits.
static void shape(std::vector<float>& x, const Sampling& how, const uint8_t* seen, bool forbids_end) {
    const float none = -std::numeric_limits<float>::infinity();
    const int64_t count = how.vocabulary;
    if (seen)
        for (int64_t i = 0; i < count; i++)
            if (seen[i]) x[i] = x[i] > 0 ? x[i] / (float)how.penalty : x[i] * (float)how.penalty;
    if (forbids_end)
        for (int64_t i = 0; i < how.end_count; i++) x[how.ends[i]] = none;
    if (how.temperature == 0) return;
    std::vector<float> values;
    if (how.top_k > 0 && how.top_k < count) {
        values = x;
        std::nth_element(values.begin(), values.begin() + how.top_k - 1, values.end(), std::greater<float>());
        const float smallest = values[how.top_k - 1];
        for (float& value : x) value = value < smallest ? none : value;
    }
    if (how.top_p < 1) {
        values.resize(count);
        const double total = exponentials(x.data(), count, how.temperature, largest_of(x.data(), count), values.data(), nullptr);
        const std::vector<float> e = values;
        const float smallest = mass_threshold(values, how.top_p * total);
        for (int64_t i = 0; i < count; i++) x[i] = e[i] < smallest ? none : x[i];
    }
}

// One token of one row; its log-probability and the entropy are those of softmax(logits / temperature) before shaping.
static int64_t sample_row(const float* logits, const Sampling& how, const uint8_t* seen, bool forbids_end, double uniform,
                          std::vector<float>& shaped, std::vector<float>& e, float* log_prob, float* entropy) {
    const int64_t count = how.vocabulary;
    const float largest = largest_of(logits, count), temperature = how.temperature == 0 ? 1.0f : (float)how.temperature;
    double moment;
    e.resize(count);
    const double plain = exponentials(logits, count, temperature, largest, e.data(), &moment);
    double total = plain;
    int64_t token;
    const bool reshapes = seen || forbids_end || how.top_k > 0 || how.top_p < 1;
    const float* from = logits;
    if (reshapes) {
        shaped.assign(logits, logits + count);
        shape(shaped, how, seen, forbids_end);
        from = shaped.data();
    }
    if (how.temperature == 0) {
        token = std::max_element(from, from + count) - from;
    } else {
        if (reshapes) total = exponentials(from, count, temperature, largest_of(from, count), e.data(), nullptr);
        token = search(e.data(), count, std::max(uniform * total, LARGEST_ZERO * total));
    }
    *log_prob = (float)((logits[token] - largest) / temperature - std::log(plain));
    *entropy = (float)(std::log(plain) - moment / plain);
    return token;
}
