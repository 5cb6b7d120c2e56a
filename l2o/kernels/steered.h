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

enum Path : int64_t { ADAM, NORMALIZED, DIAGONAL, ORTHOGONAL, GIVEN };

// A tensor as a matrix.  grad, param, m, d, v: [rows, cols].
// A given one has no m: its direction comes from elsewhere before `finish`, at its size.
// row, col: scales of a normalized one.  count: updates before this one, on Adam's path.
// param <- keep param + scale direction.  sums, written: gradient times direction, and squares of gradient, direction
// and parameter.
constexpr int64_t SUMS = 4;
struct Tensor {
    int64_t path, rows, cols;
    const float* grad;
    float *param, *m, *d, *v, *row, *col, *count;
    double keep, scale;
    double sums[SUMS];
};

struct Step {
    int64_t tensors, threads;
    double momentum, beta1, beta2, memory;
    double cautious, power;  // of diagonal ones: see l2o.ops.eigenbasis.whiten; tempered, or 0: of size one
    Tensor* tensor;
};

constexpr int64_t BLOCK = 1 << 15, MOST = 32;  // entries of a block, or more where there would be more blocks

int64_t block_rows(const Tensor& t) {
    return std::max((t.rows + MOST - 1) / MOST, std::max<int64_t>(1, BLOCK / std::max<int64_t>(1, t.cols)));
}

int64_t block_count(const Tensor& t) { return (t.rows + block_rows(t) - 1) / block_rows(t); }

// Momentum of entries without gradients ends at 0, not among denormal numbers, which are slow.
struct FlushDenormals {
#if defined(__SSE__)
    const unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
#endif
};

// f(block, first, last) over blocks of rows, in parallel where there are several.
template <class F> void blocks(const Step& s, const Tensor& t, F f) {
    const int64_t rows = block_rows(t), count = block_count(t);
#pragma omp parallel for num_threads(s.threads) if (count > 1)
    for (int64_t i = 0; i < count; i++) {
        const FlushDenormals flush;
        f(i, i * rows, std::min(t.rows, (i + 1) * rows));
    }
}

inline float inverse_root(double x) { return x > 0 ? float(1 / std::sqrt(x)) : 0.f; }

template <class T> double sum(const T* x, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; i++) total += x[i];
    return total;
}

// f(first, last) of the entries of a block, which returns a sum over them; the sum over blocks.
template <class F> double total(const Step& s, const Tensor& t, F f) {
    std::vector<double> parts(block_count(t));
    blocks(s, t, [&](int64_t i, int64_t first, int64_t last) { parts[i] = f(first * t.cols, last * t.cols); });
    return sum(parts.data(), int64_t(parts.size()));
}
}  // namespace
