// One step of l2o.rules.Steered in place: first the sums of its controller, then moments, scales and parameters.
//
// Large tensors are cut into blocks of rows, the same whatever the number of threads, and sums over blocks are taken in
// their order: results do not depend on threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>
#include <vector>

#include <omp.h>

namespace {

enum Path : int64_t { ADAM, NORMALIZED, ORTHOGONAL };

// A tensor as a matrix.  grad, param, m: [rows, cols].  second: d of an orthogonal one, v on Adam's path.
// row, col: scales of a normalized one.  count: updates before this one, on Adam's path.
// param <- keep param + scale direction; lr is for the caller.  sums, written: gradient times direction, and squares of gradient, direction and
// parameter.
constexpr int64_t SUMS = 4;
struct Tensor {
    int64_t path, rows, cols;
    const float* grad;
    float *param, *m, *second, *row, *col, *count;
    double lr, keep, scale;
    double sums[SUMS];
};

struct Step {
    int64_t tensors, threads;
    double momentum, beta1, beta2;
    Tensor* tensor;
};

constexpr int64_t BLOCK = 1 << 15;  // entries

// f(block, first, last) over blocks of rows, in parallel where there are several.
template <class F> void blocks(const Step& s, const Tensor& t, F f) {
    const int64_t rows = std::max<int64_t>(1, BLOCK / std::max<int64_t>(1, t.cols));
    const int64_t count = (t.rows + rows - 1) / rows;
#pragma omp parallel for num_threads(s.threads) if (count > 1)
    for (int64_t i = 0; i < count; i++) f(i, i * rows, std::min(t.rows, (i + 1) * rows));
}

int64_t block_count(const Tensor& t) {
    const int64_t rows = std::max<int64_t>(1, BLOCK / std::max<int64_t>(1, t.cols));
    return (t.rows + rows - 1) / rows;
}

inline float inverse_root(double x) { return x > 0 ? float(1 / std::sqrt(x)) : 0.f; }

// 1 - beta ** count
inline double correction(double beta, double count) { return -std::expm1(count * std::log(beta)); }

// Adam's direction is m / sqrt(v) times this.
inline float adam_scale(const Step& s, double count) {
    return float(std::sqrt(correction(s.beta2, count)) / correction(s.beta1, count));
}

inline float over_root(float x, float squares) { return squares > 0 ? x / std::sqrt(squares) : 0.f; }

// Adds the sums of n entries; the direction is factor * direction(i).
template <class F> void add_sums(const float* g, const float* p, int64_t n, double factor, double* sums, F direction) {
    float dot = 0, gg = 0, dd = 0, pp = 0;
#pragma omp simd reduction(+ : dot, gg, dd, pp)
    for (int64_t i = 0; i < n; i++) {
        const float d = direction(i);
        dot += g[i] * d;
        gg += g[i] * g[i];
        dd += d * d;
        pp += p[i] * p[i];
    }
    sums[0] += factor * dot;
    sums[1] += gg;
    sums[2] += factor * factor * dd;
    sums[3] += pp;
}

void look_rows(const Step& s, const Tensor& t, int64_t first, int64_t last, double* sums) {
    const double adam = t.path == ADAM ? adam_scale(s, std::max(1.f, *t.count)) : 0;
    for (int64_t r = first; r < last; r++) {
        const int64_t at = r * t.cols;
        const float *g = t.grad + at, *p = t.param + at, *m = t.m + at;
        if (t.path == NORMALIZED) {
            add_sums(g, p, t.cols, t.row[r], sums, [=, c = t.col](int64_t i) { return m[i] * c[i]; });
        } else if (t.path == ORTHOGONAL) {
            add_sums(g, p, t.cols, 1, sums, [d = t.second + at](int64_t i) { return d[i]; });
        } else {
            add_sums(g, p, t.cols, adam, sums, [=, v = t.second + at](int64_t i) { return over_root(m[i], v[i]); });
        }
    }
}

void look(const Step& s, Tensor& t) {
    std::vector<double> parts(SUMS * block_count(t));
    blocks(s, t, [&](int64_t i, int64_t first, int64_t last) { look_rows(s, t, first, last, &parts[SUMS * i]); });
    std::fill(t.sums, t.sums + SUMS, 0.0);
    for (size_t i = 0; i < parts.size(); i++) t.sums[i % SUMS] += parts[i];
}

void adam(const Step& s, Tensor& t) {
    const float b1 = s.beta1, a1 = 1 - s.beta1, b2 = s.beta2, a2 = 1 - s.beta2;
    *t.count += 1;
    const float keep = t.keep, scale = float(t.scale) * adam_scale(s, *t.count);
    blocks(s, t, [&](int64_t, int64_t first, int64_t last) {
        const float* g = t.grad;
        float *p = t.param, *m = t.m, *v = t.second;
#pragma omp simd
        for (int64_t i = first * t.cols; i < last * t.cols; i++) {
            m[i] = b1 * m[i] + a1 * g[i];
            v[i] = b2 * v[i] + a2 * (g[i] * g[i]);
            p[i] = keep * p[i] + scale * over_root(m[i], v[i]);
        }
    });
}

// The momentum, and in the place of the direction what will be orthogonalised: Nesterov's.
void orthogonal(const Step& s, Tensor& t) {
    const float b = s.momentum, a = 1 - s.momentum;
    blocks(s, t, [&](int64_t, int64_t first, int64_t last) {
        const float* g = t.grad;
        float *m = t.m, *n = t.second;
#pragma omp simd
        for (int64_t i = first * t.cols; i < last * t.cols; i++) {
            m[i] = b * m[i] + a * g[i];
            n[i] = b * m[i] + a * g[i];
        }
    });
}

// Momentum of a row, its scale, and its squares added to those of columns.
float advance_row(const Step& s, const float* g, float* m, int64_t n, float* columns) {
    const float b = s.momentum, a = 1 - s.momentum;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < n; i++) {
        m[i] = b * m[i] + a * g[i];
        squares += m[i] * m[i];
    }
    const float row = inverse_root(squares);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) columns[i] += (m[i] * row) * (m[i] * row);
    return row;
}

void normalized(const Step& s, Tensor& t) {
    std::vector<float> parts(block_count(t) * t.cols);
    blocks(s, t, [&](int64_t i, int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++)
            t.row[r] = advance_row(s, t.grad + r * t.cols, t.m + r * t.cols, t.cols, &parts[i * t.cols]);
    });
    int64_t full = 0;  // columns that are not zero
    for (int64_t c = 0; c < t.cols; c++) {
        double squares = 0;
        for (int64_t at = c; at < int64_t(parts.size()); at += t.cols) squares += parts[at];
        t.col[c] = inverse_root(squares);
        full += squares > 0;
    }
    const float size = full ? std::sqrt(double(t.rows) * t.cols / full) : 0.0;
    for (int64_t c = 0; c < t.cols; c++) t.col[c] *= size;
    blocks(s, t, [&](int64_t, int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) {
            const float keep = t.keep, scale = float(t.scale) * t.row[r];
            const float *m = t.m + r * t.cols, *col = t.col;
            float* p = t.param + r * t.cols;
#pragma omp simd
            for (int64_t i = 0; i < t.cols; i++) p[i] = keep * p[i] + scale * (m[i] * col[i]);
        }
    });
}

// Entries that never had a gradient leave the direction, what is left is brought to a mean square of one and followed.
void finish(const Step& s, Tensor& t) {
    if (t.path != ORTHOGONAL) return;
    std::vector<double> parts(block_count(t));
    blocks(s, t, [&](int64_t block, int64_t first, int64_t last) {
        float squares = 0;
        float* d = t.second;
        const float* m = t.m;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = first * t.cols; i < last * t.cols; i++) {
            d[i] = m[i] != 0 ? d[i] : 0.f;
            squares += d[i] * d[i];
        }
        parts[block] = squares;
    });
    double squares = 0;
    for (double part : parts) squares += part;
    const float size = inverse_root(squares / (t.rows * t.cols)), keep = t.keep, scale = t.scale;
    blocks(s, t, [&](int64_t, int64_t first, int64_t last) {
        float *d = t.second, *p = t.param;
#pragma omp simd
        for (int64_t i = first * t.cols; i < last * t.cols; i++) {
            d[i] *= size;
            p[i] = keep * p[i] + scale * d[i];
        }
    });
}

template <class F> int each(const Step* s, F f) {
    try {
        for (int64_t i = 0; i < s->tensors; i++) f(*s, s->tensor[i]);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
}  // namespace

// The sums of every tensor; nothing else is written.
extern "C" int l2o_steered_look(const Step* step) { return each(step, look); }

// Moments, scales and counts of every tensor; parameters but those of orthogonal matrices.
extern "C" int l2o_steered_advance(const Step* step) {
    return each(step, [](const Step& s, Tensor& t) {
        t.path == ADAM ? adam(s, t) : t.path == NORMALIZED ? normalized(s, t) : orthogonal(s, t);
    });
}

// Once the directions of orthogonal matrices are in their place: those, and their parameters.
extern "C" int l2o_steered_finish(const Step* step) { return each(step, finish); }
