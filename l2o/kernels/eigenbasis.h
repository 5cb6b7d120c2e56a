// A direction that a matrix has in the eigenbasis of its gradients: l2o.ops.eigenbasis, of matrices so small that to ask
// torch for their products takes longer than the products.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vector.h"

namespace {

constexpr float STAY = 1e-6f;  // as in l2o.ops.eigenbasis

// Arrays to work in that stay from call to call: fresh ones of this size cost more than what is done in them.
class Scratch {
    std::vector<float> memory;
    size_t used = 0;

public:
    // Room for n floats in all; what was taken before is lost.
    void reserve(int64_t n) {
        if (memory.size() < size_t(n)) memory.resize(n);
        used = 0;
    }
    float* take(int64_t n) {
        used += n;
        return memory.data() + used - n;
    }
};

inline void transpose(int64_t rows, int64_t cols, const float* x, float* out) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) out[j * rows + i] = x[i * cols + j];
}

// out [rows, cols] = a b, of a [rows, depth] with strides am and ak; finish(sum, at) gives what an entry is.
template <class F>
void product(int64_t rows, int64_t cols, int64_t depth, const float* a, int64_t am, int64_t ak, const float* b, float* out,
             F finish) {
    multiply<6, 2>(
        rows, cols, depth, a, am, ak, b, cols, out, cols, [](auto zero, int64_t, int64_t) { return zero; },
        [=](auto sum, int64_t m, int64_t n) { return finish(sum, m * cols + n); });
}

inline void product(int64_t rows, int64_t cols, int64_t depth, const float* a, int64_t am, int64_t ak, const float* b,
                    float* out) {
    product(rows, cols, depth, a, am, ak, b, out, [](auto sum, int64_t) { return sum; });
}

// The running mean [n, n] of what a and b, as in `product`, make.
inline void follow(int64_t n, int64_t depth, const float* a, int64_t am, int64_t ak, const float* b, double keep,
                   float* mean) {
    const float fresh = 1 - keep;
    product(n, n, depth, a, am, ak, b, mean, [=](auto sum, int64_t at) {
        const auto old = load<decltype(sum)>(mean + at);
        return old + fresh * (sum - old);
    });
}

inline float dot(const float* x, const float* y, int64_t n) {
    float all = 0;
#pragma omp simd reduction(+ : all)
    for (int64_t i = 0; i < n; i++) all += x[i] * y[i];
    return all;
}

// x <- x - tau (v . x) v, of a v whose first entry is one and not in memory; n entries behind it.
inline void reflect(float tau, const float* v, float* x, int64_t n) {
    const float by = tau * (x[0] + dot(v, x + 1, n));
    x[0] -= by;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[1 + i] -= by * v[i];
}

// The orthogonal factor of a matrix [n, n], signs as LAPACK's geqrf has them. Its columns are rows of x, which are
// written, and those of q.
inline void orthogonal_factor(int64_t n, float* x, float* tau, float* q) {
    for (int64_t k = 0; k < n; k++) {
        float *own = x + k * n + k, *v = own + 1;
        const int64_t below = n - k - 1;
        const float tail = dot(v, v, below), first = own[0];
        tau[k] = 0;
        if (tail > 0) {
            const float length = -std::copysign(std::sqrt(first * first + tail), first), scale = 1 / (first - length);
            tau[k] = (length - first) / length;
            for (int64_t i = 0; i < below; i++) v[i] *= scale;
        }
        for (int64_t j = k + 1; j < n; j++) reflect(tau[k], v, x + j * n + k, below);
    }
    std::fill(q, q + n * n, 0.f);
    for (int64_t k = n; k-- > 0;) {
        q[k * n + k] = 1;
        for (int64_t j = k; j < n; j++) reflect(tau[k], x + k * n + k + 1, q + j * n + k, n - k - 1);
    }
}

// One step of orthogonal iteration by the mean of products, all [n, n]; cosines: of the old columns and the new ones.
// next, columns [n, n], tau [n]: to work in.
inline void follow_basis(int64_t n, const float* mean, float* basis, float* cosines, float* next, float* columns,
                         float* tau) {
    float largest = 0;
    for (int64_t i = 0; i < n * n; i++) largest = std::max(largest, std::abs(mean[i]));
    const float size = largest > 0 ? 1 / largest : 1;
    product(n, n, n, mean, n, 1, basis, next,
            [=](auto sum, int64_t at) { return size * sum + STAY * load<decltype(sum)>(basis + at); });
    transpose(n, n, next, columns);
    orthogonal_factor(n, columns, tau, next);
    transpose(n, n, next, columns);
    product(n, n, n, basis, 1, n, columns, cosines);
    std::copy_n(columns, n * n, basis);
}

// A matrix [rows, cols] and what turns each side of it; null for a side that has nothing to turn.
struct Sides {
    int64_t rows, cols;
    const float *left, *right;

    // out = leftᵀ x right
    void into(const float* x, float* half, float* out) const {
        if (left) product(rows, cols, rows, left, 1, rows, x, right ? half : out);
        if (right) product(rows, cols, cols, left ? half : x, cols, 1, right, out);
    }

    // out = left x rightᵀ
    void out_of(const float* x, float* half, float* turned, float* out) const {
        if (left) product(rows, cols, rows, left, rows, 1, x, right ? half : out);
        if (!right) return;
        const float* rest = left ? half : x;
        if (rows == 1) {
            for (int64_t j = 0; j < cols; j++) out[j] = dot(rest, right + j * cols, cols);
            return;
        }
        transpose(cols, cols, right, turned);
        product(rows, cols, cols, rest, cols, 1, turned, out);
    }
};
}  // namespace
