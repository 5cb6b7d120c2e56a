// One step of l2o.rules.Steered in place: first the sums of its controller, then moments, scales and parameters.
// What is a product of large matrices is left to others between the two calls of a step.
//
// Large tensors are cut into blocks of rows, the same whatever the number of threads, and sums over blocks are taken in
// their order: results do not depend on threads.
#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "controller.h"
#include "eigenbasis.h"
#include "steered_layouts.h"
#include "whitened.h"

namespace {

constexpr int64_t PIECE = 1 << 12;  // entries of a sum in single precision
constexpr double SMALL = 0.01;      // as in l2o.ops.orthogonal

// 1 - (1 - fresh) ** count
inline double correction(double fresh, double count) { return -std::expm1(count * std::log1p(-fresh)); }

// Adam's direction is m / sqrt(v) times this.
inline float adam_scale(const Step& s, double count) {
    return float(std::sqrt(correction(s.fresh2, count)) / correction(s.fresh1, count));
}

inline float over_root(float x, float squares) { return squares > 0 ? x / std::sqrt(squares) : 0.f; }

// Adds the sums of n entries; the direction is factor * direction(i). In double precision over pieces.
template <class F> void add_sums(const float* g, const float* p, int64_t n, double factor, double* sums, F direction) {
    for (int64_t from = 0; from < n; from += PIECE) {
        float dot = 0, gg = 0, dd = 0, pp = 0;
#pragma omp simd reduction(+ : dot, gg, dd, pp)
        for (int64_t i = from; i < std::min(n, from + PIECE); i++) {
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
}

void look_rows(const Step& s, const Tensor& t, int64_t first, int64_t last, double* sums) {
    const int64_t from = first * t.cols, n = (last - first) * t.cols;
    const float *g = t.grad + from, *p = t.param + from;
    if (t.path >= DIAGONAL)
        return add_sums(g, p, n, 1, sums, [d = t.d + from](int64_t i) { return d[i]; });
    const float* m = t.m + from;
    if (t.path == ADAM) {
        const double scale = adam_scale(s, std::max(1.f, *t.count));
        return add_sums(g, p, n, scale, sums, [=, v = t.v + from](int64_t i) { return over_root(m[i], v[i]); });
    }
    for (int64_t r = first, at = 0; r < last; r++, at += t.cols) {
        const float *row = m + at, *col = t.col;
        add_sums(g + at, p + at, t.cols, t.row[r], sums, [=](int64_t i) { return row[i] * col[i]; });
    }
}

void look(const Step& s, Tensor& t) {
    std::vector<double> parts(SUMS * Rows(s, t).blocks());
    blocks({s, t}, [&](int64_t i, int64_t first, int64_t last) { look_rows(s, t, first, last, &parts[SUMS * i]); });
    std::fill(t.sums, t.sums + SUMS, 0.0);
    for (size_t i = 0; i < parts.size(); i++) t.sums[i % SUMS] += parts[i];
    if (!t.near) return;
    t.momenta = total({s, t}, [&](int64_t first, int64_t last) {
        double squares = 0;
        for (int64_t i = first; i < last; i++) squares += double(t.m[i]) * t.m[i];
        return squares;
    });
}

void adam(const Step& s, Tensor& t) {
    const float b1 = 1 - s.fresh1, a1 = s.fresh1, b2 = 1 - s.fresh2, a2 = s.fresh2;
    *t.count += 1;
    const float keep = t.keep, scale = float(t.scale) * adam_scale(s, *t.count);
    blocks({s, t}, [&](int64_t, int64_t first, int64_t last) {
        const float* g = t.grad;
        float *p = t.param, *m = t.m, *v = t.v;
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
    blocks({s, t}, [&](int64_t, int64_t first, int64_t last) {
        const float* g = t.grad;
        float *m = t.m, *n = t.d;
#pragma omp simd
        for (int64_t i = first * t.cols; i < last * t.cols; i++) {
            m[i] = b * m[i] + a * g[i];
            n[i] = b * m[i] + a * g[i];
        }
    });
}

// Momentum of n entries, and the sum of its squares.
float advance_row(const Step& s, const float* g, float* m, int64_t n) {
    const float b = s.momentum, a = 1 - s.momentum;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < n; i++) {
        m[i] = b * m[i] + a * g[i];
        squares += m[i] * m[i];
    }
    return squares;
}

// Squared norms to factors that make the norms one, but for small ones; gives what is left of all squares together.
double scales(float* squares, int64_t n) {
    const double small = SMALL * sum(squares, n) / n;
    double total = 0;
    for (int64_t i = 0; i < n; i++) {
        const float scale = inverse_root(squares[i] + small);
        total += double(squares[i]) * scale * scale;
        squares[i] = scale;
    }
    return total;
}

void normalized(const Step& s, Tensor& t) {
    blocks({s, t}, [&](int64_t, int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) t.row[r] = advance_row(s, t.grad + r * t.cols, t.m + r * t.cols, t.cols);
    });
    scales(t.row, t.rows);
    std::vector<float> parts(Rows(s, t).blocks() * t.cols);
    blocks({s, t}, [&](int64_t block, int64_t first, int64_t last) {
        float* columns = &parts[block * t.cols];
        for (int64_t r = first; r < last; r++) {
            const float *m = t.m + r * t.cols, row = t.row[r];
#pragma omp simd
            for (int64_t i = 0; i < t.cols; i++) columns[i] += (m[i] * row) * (m[i] * row);
        }
    });
    std::fill(t.col, t.col + t.cols, 0.f);
    for (size_t at = 0; at < parts.size(); at += t.cols)
        for (int64_t i = 0; i < t.cols; i++) t.col[i] += parts[at + i];
    const double total = scales(t.col, t.cols);
    const float size = total > 0 ? std::sqrt(double(t.rows) * t.cols / total) : 0.0;
    for (int64_t i = 0; i < t.cols; i++) t.col[i] *= size;
    blocks({s, t}, [&](int64_t, int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) {
            const float keep = t.keep, scale = float(t.scale) * t.row[r];
            const float *m = t.m + r * t.cols, *col = t.col;
            float* p = t.param + r * t.cols;
#pragma omp simd
            for (int64_t i = 0; i < t.cols; i++) p[i] = keep * p[i] + scale * (m[i] * col[i]);
        }
    });
}

// Nesterov's momentum over the root of second moments, at its size.
void diagonal(const Step& s, Tensor& t) {
    const Weighing how{s.momentum, s.memory, s.cautious, LEAST};
    const double squares = weigh<true>({s, t}, how, t.grad, t.m, t.v, t.d);
    const float size = to_size(s.by_signal, squares / Rows(s, t).entries()), keep = t.keep, scale = t.scale;
    blocks({s, t}, [&](int64_t, int64_t first, int64_t last) {
        float *d = t.d, *p = t.param;
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

template <class F> int each_lane(const Lanes* l, F f) {
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(l->threads) reduction(| : failed)
    for (int64_t i = 0; i < l->lanes; i++) failed |= f(l->step + i);
    return failed;
}

void take(const Step& s, Tensor& t) {
    switch (t.path) {
        case ADAM: return adam(s, t);
        case NORMALIZED: return normalized(s, t);
        case DIAGONAL: return diagonal(s, t);
        case ORTHOGONAL: return orthogonal(s, t);
        case EIGENBASIS: return eigenbasis(s, t);
    }
}
}  // namespace

// The controller, and of every tensor moments, scales and counts; parameters but those of orthogonal matrices and given
// directions. Returns 2, with nothing written but scales and sums, where something is not as usual, see `steer`.
extern "C" int l2o_steered_begin(const Step* step) {
    if (const int failed = step->looked ? 0 : each(step, look)) return failed;
    Shared now;
    if (!steer(*step, now)) return 2;
    now.keep(*step);
    return each(step, take);
}

// The sums of tensors alone, of lanes.
extern "C" int l2o_steered_look(const Lanes* l) {
    return each_lane(l, [](Step* step) {
        step->looked = 1;
        return each(static_cast<const Step*>(step), look);
    });
}

// The same as `begin` of lanes, whatever their numbers are; none has orthogonal matrices or given directions.
extern "C" int l2o_steered_lanes(const Lanes* l) {
    return each_lane(l, [l](const Step* step) {
        const int failed = step->looked ? 0 : each(step, look);
        Shared now;
        steer(*step, now);
        now.keep(*step);
        // Seen by now; zero times what is not finite would not be zero.
        for (int64_t j = 0; l->moves && j < step->tensors; j++) {
            const Tensor& t = step->tensor[j];
            std::fill_n(t.param, t.rows * t.cols, 0.f);
        }
        return failed | each(step, take);
    });
}

// Once directions are in their place: those of orthogonal matrices brought to size, and parameters of these and given
// ones.
extern "C" int l2o_steered_finish(const Step* step) {
    return each(step, [](const Step& s, Tensor& t) {
        if (t.path == ORTHOGONAL) settle({s, t}, t.d, t.m, t.m, t.d, true, 0);  // momentum: had a gradient
        if (t.path == ORTHOGONAL || t.path == GIVEN) move(s, t);
    });
}

// Of every matrix, see `weigh` and `settle`.
extern "C" int l2o_steered_weigh(const Weigh* w) {
    return each(*w, [&](const Rows& r, int64_t at) {
        weigh<false>(r, {w->momentum, w->memory, w->cautious, w->least}, w->seen + at, w->m + at, w->v + at,
                     w->scaled + at);
    });
}

extern "C" int l2o_steered_settle(const Settle* w) {
    return each(*w, [&](const Rows& r, int64_t at) {
        settle(r, w->direction + at, w->grad + at, w->d + at, w->d + at, w->sized, w->power);
    });
}

// Of every matrix, see `follow_bases`.
extern "C" int l2o_steered_follow(const Follow* w) {
    const FlushDenormals flush;
    const int64_t rows = w->rows, cols = w->cols;
    try {
        for (int64_t i = 0; i < w->matrices; i++) {
            const auto own = [i](auto* of, int64_t n) { return of ? of + i * n : of; };
            const int64_t left = rows * rows, right = cols * cols, entries = rows * cols;
            Scratch scratch(follow_room(rows, cols));
            follow_bases(rows, cols, own(w->left, left), own(w->right, right), own(w->row_basis, left),
                         own(w->column_basis, right), w->m + i * entries, w->v + i * entries, w->carried, scratch);
        }
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
