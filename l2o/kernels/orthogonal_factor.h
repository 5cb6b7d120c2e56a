// The orthogonal factor of a square matrix by Householder reflections, a panel of columns at once (Schreiber and Van Loan
// 1989, compact WY): what is not in the panel is products of matrices.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vector.h"

namespace {

constexpr int64_t PANEL = WIDTH;  // columns: a row of a panel is one vector

inline ivec places() {
    ivec all{};
    for (int i = 0; i < WIDTH; i++) all[i] = i;
    return all;
}

// panel [rows, PANEL] becomes the reflections that make it triangular, I - tau v vᵀ: column k is v, one at row k and zero
// above it. Signs as LAPACK's geqrf has them. One pass for a column: what it does to a row, and to the products of the
// next column with all others, of what lies below that column's own row.
inline void reflections(int64_t rows, float* panel, float* tau) {
    const ivec place = places();
    vec products{};
    for (int64_t i = 1; i < rows; i++) products += panel[i * PANEL] * load<vec>(panel + i * PANEL);
    std::fill_n(tau, PANEL, 0.f);
    for (int64_t k = 0; k < std::min(PANEL, rows); k++) {
        float *row = panel + k * PANEL, scale = 0;
        const float tail = products[k], first = row[k];
        if (tail > 0) {  // else there is nothing to reflect
            const float length = -std::copysign(std::sqrt(first * first + tail), first);
            scale = 1 / (first - length);
            tau[k] = (length - first) / length;
        }
        const ivec own = place == int32_t(k), later = place > int32_t(k);
        const vec change = later ? tau[k] * (load<vec>(row) + scale * products) : vec{};
        const int64_t next = std::min(k + 1, PANEL - 1);
        const float ahead = change[next];
        const auto reflect = [&](float* x, vec& sum) {
            const float v = scale * x[k], weight = x[next] - v * ahead;
            const vec now = own ? vec{} + v : load<vec>(x) - v * change;
            store(x, now);
            sum += weight * now;
        };
        vec sums[2] = {}, unused{};
        int64_t i = k + 1;
        if (i < rows) reflect(panel + i++ * PANEL, unused);  // the next column's own row
        for (; i + 2 <= rows; i += 2) {
            reflect(panel + i * PANEL, sums[0]);
            reflect(panel + (i + 1) * PANEL, sums[1]);
        }
        if (i < rows) reflect(panel + i * PANEL, sums[0]);
        products = sums[0] + sums[1];
        const vec above = load<vec>(row);
        store(row, own ? vec{} + 1 : later ? vec{} : above);
    }
}

// t [PANEL, PANEL], lower triangular: all reflections of v [rows, PANEL] one after the other are I - v tᵀ vᵀ.
inline void joined(int64_t rows, const float* v, const float* tau, float* t) {
    const auto zero = [](auto zero, int64_t, int64_t) { return zero; };
    const auto same = [](auto sum, int64_t, int64_t) { return sum; };
    float gram[PANEL * PANEL];
    multiply<8, 1>(PANEL, PANEL, rows, v, 1, PANEL, v, PANEL, gram, PANEL, zero, same);
    for (int64_t j = 0; j < PANEL; j++) {
        vec row{};
        for (int64_t i = 0; i < j; i++) row -= tau[j] * gram[i * PANEL + j] * load<vec>(t + i * PANEL);
        row[j] = tau[j];
        store(t + j * PANEL, row);
    }
}

// x [rows, cols] <- (I - v t vᵀ) x, or of tᵀ; rows of x are ld apart.  work: [2, PANEL, cols].
inline void reflect(int64_t rows, int64_t cols, const float* v, const float* t, bool transposed, float* x, int64_t ld,
                    float* work) {
    const auto zero = [](auto zero, int64_t, int64_t) { return zero; };
    const auto same = [](auto sum, int64_t, int64_t) { return sum; };
    const auto minus = [](auto sum, int64_t, int64_t) { return -sum; };
    const auto old = [=](auto zero, int64_t i, int64_t j) { return load<decltype(zero)>(x + i * ld + j); };
    float *seen = work, *weighed = work + PANEL * cols;
    const int64_t tm = transposed ? 1 : PANEL, tk = transposed ? PANEL : 1;
    multiply<8, 2>(PANEL, cols, rows, v, 1, PANEL, x, ld, seen, cols, zero, same);
    multiply<8, 2>(PANEL, cols, PANEL, t, tm, tk, seen, cols, weighed, cols, zero, minus);
    multiply<6, 2>(rows, cols, PANEL, v, PANEL, 1, weighed, cols, x, ld, old, same);
}

// Floats that `orthogonal_factor` works in.
inline int64_t factor_room(int64_t n) { return padded(n) * (padded(n) + 3 * PANEL + 1); }

// The orthogonal factor of x [n, n] in its place. Rows are padded(n) apart, and zero from n on.
inline void orthogonal_factor(int64_t n, float* x, float* room) {
    const int64_t ld = padded(n), last = (n - 1) / PANEL * PANEL;
    float *v = room, *t = v + ld * ld, *work = t + ld * PANEL, *tau = work + 2 * ld * PANEL;
    for (int64_t k = 0; k <= last; k += PANEL) {
        float* own = v + k * ld;
        for (int64_t i = k; i < n; i++) std::copy_n(x + i * ld + k, PANEL, own + (i - k) * PANEL);
        reflections(n - k, own, tau);
        joined(n - k, own, tau, t + k * PANEL);
        if (k < last) reflect(n - k, ld - k - PANEL, own, t + k * PANEL, false, x + k * ld + k + PANEL, ld, work);
    }
    std::fill_n(x, n * ld, 0.f);
    for (int64_t i = 0; i < n; i++) x[i * ld + i] = 1;
    for (int64_t k = last; k >= 0; k -= PANEL)
        reflect(n - k, ld - k, v + k * ld, t + k * PANEL, true, x + k * ld + k, ld, work);
}
}  // namespace
