// What a step of l2o.rules.Steered is of: tensors, blocks of their rows, and sums over blocks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <omp.h>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace {

enum Path : int64_t { ADAM, NORMALIZED, DIAGONAL, ORTHOGONAL, GIVEN, EIGENBASIS };

// A tensor as a matrix.  grad, param, m, d, v: [rows, cols].
// A given one's direction comes from elsewhere before `finish`, at its size; it has an m only where a perceptron decides.
// row, col: scales of a normalized one.  count: updates before this one, on Adam's path.
// left, right, row_basis, column_basis: of one in a basis, those of sides that have one; its m is momentum there.
// free: whether it has no limit; null for no.  own: [4], its own log step and means, or null.
// param <- keep param + rate update, update = -scale direction, for which a tensor counts as a matrix (is_matrix), is
// sized as one (sized) of so many inputs (fan), looked up (table), has few gradients (rare), and a factor for its width.
// before, after: logarithms of its factor by l2o.ops.controller.decide, in the step before and in this one.
// near, far, factor: what a perceptron that decides remembers, or null; columns_in, rows_in: its inputs of the shape.
// Written: scale, with the rate; near_new, far_new and momenta, the squares of m, where a perceptron decides; and sums:
// gradient times direction, and squares of gradient, direction and parameter, once these are known what own is to be.
constexpr int64_t SUMS = 4;
struct Tensor {
    int64_t path, rows, cols;
    const float* grad;
    float *param, *m, *d, *v, *row, *col, *count, *left, *right, *row_basis, *column_basis, *free, *own;
    float *near, *far, *factor;
    double is_matrix, sized, fan, entries, table, rare, width, columns_in, rows_in;
    double before, after, near_new, far_new, momenta, keep, rate, scale;
    double sums[SUMS];
};

// looked: whether the sums of tensors are known.
// The constants of l2o.rules.Steered and of its controller, as values, not logarithms, but for log_lr.
// fresh1, fresh2: one minus beta1 and beta2, which may be too near one for their difference from it.
// cautious, by_signal: of directions over roots, see l2o.ops.eigenbasis.weighed and l2o.ops.scales.tempered.
// due, carried: of bases, see l2o.ops.eigenbasis.Whitening.  limit: of the norm of all gradients.
// decays, fall: whether the schedule has a decay, and its power.  longer: factor of what has few gradients.
// more: push of the controller from elsewhere.
// log_step and so on: what the controller keeps, 0-d; null without one, missing also without `deep`.
// long_mean, w0 [16, 16], b0 [16], w1 [16, 2], b1 [2]: of a perceptron that decides, or null.
struct Step {
    int64_t tensors, threads, looked;
    double momentum, fresh1, fresh2, memory, cautious, by_signal, due, carried;
    double step, total, limit;
    double log_lr, warmup, decays, fall, haste, matrix, fan_in, relative, by_gain, longer;
    double deep, gain, slope, band_up, band_down, fast, slow, sure, range, leak, own, more;
    float *log_step, *fast_mean, *slow_mean, *square_mean, *missing;
    float *long_mean, *w0, *b0, *w1, *b1;
    Tensor* tensor;
};

// Steps of lanes, each with its own constants.
struct Lanes {
    int64_t lanes, threads, moves;
    Step* step;
};

// What is cut into blocks of rows, and how many threads there are for it.
struct Rows {
    int64_t threads, rows, cols;
    Rows(int64_t threads, int64_t rows, int64_t cols) : threads(threads), rows(rows), cols(cols) {}
    Rows(const Step& s, const Tensor& t) : Rows(s.threads, t.rows, t.cols) {}

    static constexpr int64_t LEAST = 1 << 15, MOST = 32;  // entries of a block, or more where there would be more blocks
    int64_t size() const {
        return std::max((rows + MOST - 1) / MOST, std::max<int64_t>(1, LEAST / std::max<int64_t>(1, cols)));
    }
    int64_t blocks() const { return (rows + size() - 1) / size(); }
    double entries() const { return double(rows) * cols; }
};

// Momentum of entries without gradients ends at 0, not among denormal numbers, which are slow.
struct FlushDenormals {
#if defined(__SSE__)
    const unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
#endif
};

// f(block, first, last) over blocks of rows, in parallel where there are several.
template <class F> void blocks(const Rows& r, F f) {
    const int64_t rows = r.size(), count = r.blocks();
    const auto block = [&](int64_t i) {
        const FlushDenormals flush;
        f(i, i * rows, std::min(r.rows, (i + 1) * rows));
    };
    if (count == 1 || r.threads == 1) {  // a parallel region takes longer than many a tensor
        for (int64_t i = 0; i < count; i++) block(i);
        return;
    }
#pragma omp parallel for num_threads(r.threads)
    for (int64_t i = 0; i < count; i++) block(i);
}

inline float inverse_root(double x) { return x > 0 ? float(1 / std::sqrt(x)) : 0.f; }

template <class T> double sum(const T* x, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; i++) total += x[i];
    return total;
}

// f(first, last) of the entries of a block, which returns a sum over them; the sum over blocks.
template <class F> double total(const Rows& r, F f) {
    double parts[Rows::MOST] = {};
    blocks(r, [&](int64_t i, int64_t first, int64_t last) { parts[i] = f(first * r.cols, last * r.cols); });
    return sum(parts, Rows::MOST);
}
}  // namespace
