// Momentum over the root of second moments, of entries or in the basis of gradients, and directions brought to size.
#pragma once

#include <limits>

#include "steered.h"

// Matrices one after the other in memory, [matrices, entries].
// weigh: in the basis, seen is the gradient; m and v are written, and scaled.
struct Weigh {
    int64_t matrices, entries;
    double momentum, memory, cautious, least;
    const float* seen;
    float *m, *v, *scaled;
};

// settle: direction and grad as they are, d the direction of the step before, which is written.
struct Settle {
    int64_t matrices, entries;
    double sized, power;
    const float *direction, *grad;
    float* d;
};

namespace {

constexpr double USUAL = 0.3;    // as in l2o.ops.scales
constexpr double LEAST = 1e-10;  // as in l2o.ops.eigenbasis

struct Weighing {
    double momentum, memory, cautious, least;
};

// Of n entries momentum, second moments, whose sum is returned, and what goes over their root, in the place of scaled.
// RESTS: scaled is also the direction of the step before, and stays 0 where there was no gradient.
template <bool RESTS>
float advance(const Weighing& how, const float* g, float* m, float* v, float* scaled, int64_t n) {
    const float b = how.momentum, a = 1 - how.momentum, old = how.memory, fresh = 1 - how.memory;
    const float against = how.cautious ? 0 : 1;
    float all = 0;
#pragma omp simd reduction(+ : all)
    for (int64_t i = 0; i < n; i++) {
        m[i] = b * m[i] + a * g[i];
        v[i] = old * v[i] + fresh * (g[i] * g[i]);
        const float ahead = b * m[i] + a * g[i];
        const float sign = g[i] > 0 ? 1.f : -1.f;  // a product of the two may be too small for a number
        const float own = (ahead * sign < 0) & (g[i] != 0) ? against * ahead : ahead;
        if constexpr (RESTS)
            scaled[i] = (scaled[i] == 0) & (g[i] == 0) ? 0.f : own;
        else
            scaled[i] = own;
        all += v[i];
    }
    return all;
}

// Of n entries, and the sum of their squares.
inline float over_roots(const float* v, float least, float* scaled, int64_t n) {
    float all = 0;
#pragma omp simd reduction(+ : all)
    for (int64_t i = 0; i < n; i++) {
        scaled[i] /= std::sqrt(v[i] + least);
        all += scaled[i] * scaled[i];
    }
    return all;
}

// See l2o.ops.eigenbasis: scaled is written, and the sum of its squares returned.
template <bool RESTS>
double weigh(const Rows& rows, const Weighing& how, const float* g, float* m, float* v, float* scaled) {
    const double moments = total(rows, [=](int64_t from, int64_t to) {
        return advance<RESTS>(how, g + from, m + from, v + from, scaled + from, to - from);
    });
    const float least = std::max(float(how.least * moments / rows.entries()), std::numeric_limits<float>::min());
    return total(rows, [=](int64_t from, int64_t to) { return over_roots(v + from, least, scaled + from, to - from); });
}

// Of the mean square of a direction, what brings it to its size.
inline float to_size(double power, double square) {
    if (!power) return inverse_root(square);
    const double least = std::numeric_limits<float>::min();
    return float(std::pow(std::max(square, least), (power - 1) / 2) * std::pow(USUAL, -power));
}

// Of n entries those that had a gradient, of which here and before are 0 where there was none; the sum of squares.
inline float chosen(const float* direction, const float* here, const float* before, float* d, int64_t n) {
    float all = 0;
#pragma omp simd reduction(+ : all)
    for (int64_t i = 0; i < n; i++) {
        d[i] = (here[i] != 0) | (before[i] != 0) ? direction[i] : 0.f;
        all += d[i] * d[i];
    }
    return all;
}

// d is the direction but for entries that never had a gradient, brought to size.
inline void settle(const Rows& rows, const float* direction, const float* here, const float* before, float* d,
                   bool sized, double power) {
    const double squares = total(rows, [=](int64_t from, int64_t to) {
        return chosen(direction + from, here + from, before + from, d + from, to - from);
    });
    if (!sized) return;
    const float size = to_size(power, squares / rows.entries());
    blocks(rows, [=](int64_t, int64_t first, int64_t last) {
        float* own = d;
#pragma omp simd
        for (int64_t i = first * rows.cols; i < last * rows.cols; i++) own[i] *= size;
    });
}

// Of parameters, once the direction is at its size.
inline void move(const Step& s, Tensor& t) {
    const float keep = t.keep, scale = t.scale;
    blocks({s, t}, [&](int64_t, int64_t first, int64_t last) {
        const float* d = t.d;
        float* p = t.param;
#pragma omp simd
        for (int64_t i = first * t.cols; i < last * t.cols; i++) p[i] = keep * p[i] + scale * d[i];
    });
}

// f(rows, at) of each matrix, at its first entry. By one thread: between products of torch, whose own threads still spin,
// to wake others takes a hundred times as long as the pass.
template <class W, class F> int each(const W& w, F f) {
    for (int64_t i = 0; i < w.matrices; i++) f(Rows(1, w.entries, 1), i * w.entries);
    return 0;
}
}  // namespace
