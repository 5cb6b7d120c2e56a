// A direction that a matrix has in the eigenbasis of its gradients: l2o.ops.eigenbasis, of matrices so small that to ask
// torch for their products takes longer than the products, or of lanes; and of any how bases follow: torch is slow at it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "orthogonal_factor.h"
#include "whitened.h"

// follow: of every matrix in a basis, [matrices, *], see `follow_bases`; null for a side that has none.
struct Follow {
    int64_t matrices, rows, cols;
    double carried;
    const float *left, *right;
    float *row_basis, *column_basis, *m, *v;
};

namespace {

constexpr float STAY = 1e-6f;  // as in l2o.ops.eigenbasis

// Floats to work in, of a thread's own memory that stays from call to call: fresh arrays of this size cost more than what
// is done in them.
class Scratch {
    float* next;

public:
    // n floats in all; what was had of it before is lost.
    explicit Scratch(int64_t n) {
        static thread_local std::vector<float> memory;
        if (memory.size() < size_t(n)) memory.resize(n);
        next = memory.data();
    }
    float* take(int64_t n) { return (next += n) - n; }
};

inline void transpose(int64_t rows, int64_t cols, const float* x, float* out) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) out[j * rows + i] = x[i * cols + j];
}

// out [rows, cols] = a b, of a [rows, depth] with strides am and ak, and b in one piece.
// Of a large b, columns are copied to where their rows lie side by side: a page and a line of the cache for each is too
// many.
inline void product(int64_t rows, int64_t cols, int64_t depth, const float* a, int64_t am, int64_t ak, const float* b,
                    float* out) {
    constexpr int64_t PACK = 2 * WIDTH, DEPTH = 256, LARGE = 1 << 15;
    const auto zero = [](auto zero, int64_t, int64_t) { return zero; };
    const auto same = [](auto sum, int64_t, int64_t) { return sum; };
    if (cols >= PACK && cols * depth >= LARGE) {
        float packed[DEPTH * PACK];
        for (int64_t next = 0; next < cols; next += PACK) {
            const int64_t n = std::min(next, cols - PACK);  // the last columns, some of them once more
            const float* sums = out + n;
            const auto old = [=](auto zero, int64_t i, int64_t j) { return load<decltype(zero)>(sums + i * cols + j); };
            for (int64_t k = 0; k < depth; k += DEPTH) {
                const int64_t some = std::min(DEPTH, depth - k);
                for (int64_t i = 0; i < some; i++) std::copy_n(b + (k + i) * cols + n, PACK, packed + i * PACK);
                const float* own = a + k * ak;
                if (k == 0)
                    multiply<6, 2>(rows, PACK, some, own, am, ak, packed, PACK, out + n, cols, zero, same);
                else
                    multiply<6, 2>(rows, PACK, some, own, am, ak, packed, PACK, out + n, cols, old, same);
            }
        }
        return;
    }
    const int64_t whole = cols < WIDTH ? cols : cols / WIDTH * WIDTH;
    multiply<6, 2>(rows, whole, depth, a, am, ak, b, cols, out, cols, zero, same);
    if (whole < cols)  // the last vector, some of it once more
        strip<vec, 6, 1>(rows, cols - WIDTH, depth, a, am, ak, b, cols, out, cols, zero, same);
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

// One step of orthogonal iteration by the mean of products, all [n, n]; cosines: of the old columns and the new ones.
// room: basis_room(n) floats.
inline void follow_basis(int64_t n, const float* mean, float* basis, float* cosines, float* room) {
    const int64_t ld = padded(n);
    float largest = 0, *next = room;
    for (int64_t i = 0; i < n * n; i++) largest = std::max(largest, std::abs(mean[i]));
    // Brought to size before the product, which might not be finite, by a power of two, which rounds nothing.
    const float near = std::ldexp(1.f, -std::min(126, std::max(-126, largest > 0 ? std::ilogb(largest) : 0)));
    const float size = largest > 0 ? 1 / (largest * near) : 1;
    for (int64_t i = 0; i < n * n; i++) room[i] = near * mean[i];
    product(n, n, n, room, n, 1, basis, cosines);
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < n; j++) next[i * ld + j] = size * cosines[i * n + j] + STAY * basis[i * n + j];
        std::fill(next + i * ld + n, next + (i + 1) * ld, 0.f);
    }
    orthogonal_factor(n, next, room + n * ld);
    for (int64_t i = 0; i < n; i++) std::copy_n(next + i * ld, n, room + i * n);
    product(n, n, n, basis, 1, n, room, cosines);
    std::copy_n(room, n * n, basis);
}
inline int64_t basis_room(int64_t n) { return n * padded(n) + factor_room(n); }

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
// One step of orthogonal iteration of each side that has a basis; momentum and second moments follow, these by squares of
// cosines, where they are `carried`.
void follow_bases(int64_t rows, int64_t cols, const float* left, const float* right, float* row_basis,
                  float* column_basis, float* m, float* v, bool carried, Scratch& scratch) {
    const int64_t n = rows * cols;
    float *row_cosines = left ? scratch.take(rows * rows) : nullptr;
    float *column_cosines = right ? scratch.take(cols * cols) : nullptr, *half = scratch.take(n), *x = scratch.take(n);
    float* room = scratch.take(basis_room(std::max(rows, cols)));
    if (left) follow_basis(rows, left, row_basis, row_cosines, room);
    if (right) follow_basis(cols, right, column_basis, column_cosines, room);
    const Sides change{rows, cols, row_cosines, column_cosines};
    change.into(m, half, x);
    std::copy_n(x, n, m);
    if (!carried) return;
    for (int64_t i = 0; left && i < rows * rows; i++) row_cosines[i] *= row_cosines[i];
    for (int64_t i = 0; right && i < cols * cols; i++) column_cosines[i] *= column_cosines[i];
    change.into(v, half, x);
    std::copy_n(x, n, v);
}
inline int64_t follow_room(int64_t rows, int64_t cols) {
    return 2 * rows * cols + rows * rows + cols * cols + basis_room(std::max(rows, cols));
}

// In the basis of the gradients, which follows them where it is due. By one thread, as all of so few entries.
void eigenbasis(const Step& s, Tensor& t) {
    const FlushDenormals flush;
    const int64_t rows = t.rows, cols = t.cols, n = rows * cols, most = std::max(rows, cols);
    Scratch scratch(3 * n + most * most + (s.due ? follow_room(rows, cols) : 0));
    float *x = scratch.take(n), *y = scratch.take(n), *half = scratch.take(n), *square = scratch.take(most * most);
    transpose(rows, cols, t.grad, x);
    if (t.left) {
        product(rows, rows, cols, t.grad, cols, 1, x, square);
        follow(rows * rows, s.memory, square, t.left);
    }
    if (t.right) {
        product(cols, cols, rows, t.grad, 1, cols, t.grad, square);
        follow(cols * cols, s.memory, square, t.right);
    }
    if (s.due) follow_bases(rows, cols, t.left, t.right, t.row_basis, t.column_basis, t.m, t.v, s.carried, scratch);
    const Sides basis{rows, cols, t.row_basis, t.column_basis};
    const Rows entries(1, n, 1);
    basis.into(t.grad, half, x);
    weigh<false>(entries, {s.momentum, s.memory, s.cautious, LEAST}, x, t.m, t.v, y);
    basis.out_of(y, half, square, x);
    settle(entries, x, t.grad, t.d, t.d, t.is_matrix, s.by_signal);  // vectors keep their size
    move(s, t);
}
}  // namespace
