// A direction that a matrix has in the eigenbasis of its gradients: l2o.ops.eigenbasis, of matrices so small that to ask
// torch for their products takes longer than the products, or of lanes, whose decompositions torch is slow at.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vector.h"
#include "whitened.h"

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

// out [rows, cols] = size a b, of a [rows, depth] with strides am and ak.
inline void product(int64_t rows, int64_t cols, int64_t depth, const float* a, int64_t am, int64_t ak, const float* b,
                    float* out, float size = 1) {
    const auto zero = [](auto zero, int64_t, int64_t) { return zero; };
    const auto sized = [=](auto sum, int64_t, int64_t) { return size * sum; };
    const int64_t whole = cols < WIDTH ? cols : cols / WIDTH * WIDTH;
    multiply<6, 2>(rows, whole, depth, a, am, ak, b, cols, out, cols, zero, sized);
    if (whole < cols)  // the last vector, some of it once more
        strip<vec, 6, 1>(rows, cols - WIDTH, depth, a, am, ak, b, cols, out, cols, zero, sized);
}

// mean [n] <- keep mean + (1 - keep) x
inline void follow(int64_t n, double keep, const float* x, float* mean) {
    const float fresh = 1 - keep;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) mean[i] += fresh * (x[i] - mean[i]);
}

inline float dot(const float* x, const float* y, int64_t n) {
    float all = 0;
#pragma omp simd reduction(+ : all)
    for (int64_t i = 0; i < n; i++) all += x[i] * y[i];
    return all;
}

// x <- x - tau v (vᵀ x) of rows from k on of x [n, n]: v[k] is one, and what columns before k are to be does not matter.
inline void reflect(int64_t n, int64_t k, float tau, const float* v, float* x, float* products) {
    const int64_t from = k / WIDTH * WIDTH;  // whole vectors
    std::copy(x + k * n + from, x + (k + 1) * n, products + from);
    int64_t below = k + 1;
    for (; below + 4 <= n; below += 4) {
        const float *w = v + below, *row = x + below * n;
#pragma omp simd
        for (int64_t j = from; j < n; j++)
            products[j] += (w[0] * row[j] + w[1] * row[n + j]) + (w[2] * row[2 * n + j] + w[3] * row[3 * n + j]);
    }
    for (; below < n; below++) {
        const float weight = v[below], *row = x + below * n;
#pragma omp simd
        for (int64_t j = from; j < n; j++) products[j] += weight * row[j];
    }
    for (int64_t i = k; i < n; i++) {
        const float weight = i == k ? tau : tau * v[i];
        float* row = x + i * n;
#pragma omp simd
        for (int64_t j = from; j < n; j++) row[j] -= weight * products[j];
    }
}

// The orthogonal factor of x [n, n] in its place, signs as LAPACK's geqrf has them.  v [n, n], tau and products [n]: to
// work in.
inline void orthogonal_factor(int64_t n, float* x, float* v, float* tau, float* products) {
    for (int64_t k = 0; k < n; k++) {
        float *own = v + k * n, tail = 0;
        for (int64_t i = k + 1; i < n; i++) {
            own[i] = x[i * n + k];
            tail += own[i] * own[i];
        }
        tau[k] = 0;
        if (tail == 0) continue;
        const float first = x[k * n + k], length = -std::copysign(std::sqrt(first * first + tail), first);
        const float scale = 1 / (first - length);
        tau[k] = (length - first) / length;
        for (int64_t i = k + 1; i < n; i++) own[i] *= scale;
        reflect(n, k, tau[k], own, x, products);
    }
    std::fill(x, x + n * n, 0.f);
    for (int64_t k = n; k-- > 0;) {
        x[k * n + k] = 1;
        if (tau[k] != 0) reflect(n, k, tau[k], v + k * n, x, products);
    }
}

// One step of orthogonal iteration by the mean of products, all [n, n]; cosines: of the old columns and the new ones.
// next, v [n, n], vectors [2, n]: to work in.
inline void follow_basis(int64_t n, const float* mean, float* basis, float* cosines, float* next, float* v,
                         float* vectors) {
    float largest = 0;
    for (int64_t i = 0; i < n * n; i++) largest = std::max(largest, std::abs(mean[i]));
    const float size = largest > 0 ? 1 / largest : 1;
    product(n, n, n, mean, n, 1, basis, next, size);
    for (int64_t i = 0; i < n * n; i++) next[i] += STAY * basis[i];
    orthogonal_factor(n, next, v, vectors, vectors + n);
    product(n, n, n, basis, 1, n, next, cosines);
    std::copy_n(next, n * n, basis);
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
// In the basis of the gradients, which follows them where it is due. By one thread, as all of so few entries.
void eigenbasis(const Step& s, Tensor& t) {
    static thread_local Scratch scratch;
    const FlushDenormals flush;
    const int64_t rows = t.rows, cols = t.cols, n = rows * cols, most = std::max(rows, cols);
    scratch.reserve(3 * n + rows * rows + cols * cols + 2 * most * most + 2 * most);
    float *x = scratch.take(n), *y = scratch.take(n), *half = scratch.take(n);
    float *left = t.left ? scratch.take(rows * rows) : nullptr, *right = t.right ? scratch.take(cols * cols) : nullptr;
    float *square = scratch.take(most * most), *other = scratch.take(most * most), *vectors = scratch.take(2 * most);
    transpose(rows, cols, t.grad, x);
    if (t.left) {
        product(rows, rows, cols, t.grad, cols, 1, x, square);
        follow(rows * rows, s.memory, square, t.left);
    }
    if (t.right) {
        product(cols, cols, rows, t.grad, 1, cols, t.grad, square);
        follow(cols * cols, s.memory, square, t.right);
    }
    if (s.due) {
        if (t.left) follow_basis(rows, t.left, t.row_basis, left, square, other, vectors);
        if (t.right) follow_basis(cols, t.right, t.column_basis, right, square, other, vectors);
        const Sides change{rows, cols, left, right};
        change.into(t.m, half, x);
        std::copy_n(x, n, t.m);
        if (s.carried) {
            for (int64_t i = 0; left && i < rows * rows; i++) left[i] *= left[i];
            for (int64_t i = 0; right && i < cols * cols; i++) right[i] *= right[i];
            change.into(t.v, half, x);
            std::copy_n(x, n, t.v);
        }
    }
    const Sides basis{rows, cols, t.row_basis, t.column_basis};
    const Rows entries(1, n, 1);
    basis.into(t.grad, half, x);
    weigh<false>(entries, {s.momentum, s.memory, s.cautious, LEAST}, x, t.m, t.v, y);
    basis.out_of(y, half, square, x);
    settle(entries, x, t.grad, t.d, t.d, t.is_matrix, s.by_signal);  // vectors keep their size
    move(s, t);
}
}  // namespace
