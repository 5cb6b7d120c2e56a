// Networks that look at every element of a tensor by itself: their channels, layers and heads, over blocks of elements.
// The formulas restated here are those of l2o/ops: statistics.py, factored.py and coordinatewise.py.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "vector.h"

extern "C" {
// Mirrored field by field in coordinatewise_cpu.py, which compares sizes and offsets before it uses them.

// How one tensor lies in a lane.
struct Field {
    int64_t entries, inner;  // of a lane; entries that share their scales
    int64_t axes[5];         // a, p, b, q, c: rows and columns lack either q or p
    int64_t factored, row_lacks_q;
    double count;  // what sums of squares are divided by
};
void l2o_layout_Field(int64_t* out) {
    layout(out, &Field::entries, &Field::inner, &Field::axes, &Field::factored, &Field::row_lacks_q, &Field::count);
}

// Where it is: each lane contiguous, with an axis of decays after that of lanes in m, v, row and col. Without factors,
// `row` is the second moment of each element; with them, `row_mean` are the means of rows over the axis that they have.
struct Addresses {
    const float *grad, *param, *m, *v, *row, *col, *row_mean;
    float* sums;    // of squares [lanes, channels, entries / inner]: written by the first pass, read by the second
    float* update;  // [lanes, entries], or null
};

struct Work {
    int64_t lanes, tensors, groups, m_decays, v_decays, factors, layers, activation, head, threads;
    const int64_t* codes;         // [groups], of `Group`
    const int64_t* widths;        // [layers + 1]
    const int64_t* lane_strides;  // [2 layers]: from lane to lane of the weights; 0 where lanes share them
    const int64_t* net_strides;   // [2 layers]: from tensor to tensor; 0 where tensors share theirs
    const Field* fields;          // [tensors]
    const float* constants;       // of the head
    const Addresses* addresses;   // [tensors]
    const float* const* weights;  // w0, b0, w1, ...
    const float* gains;           // [lanes, tensors]
    const float* means;           // [lanes, tensors, outputs], or null
    float* output_sums;           // [lanes, tensors, outputs], or null
    const float* decays;          // of moments that each gradient is still to be averaged into, of one lane, or null:
                                  // [m_decays + v_decays + factors]
    float rms_eps, diag_eps, scale_eps, clip;
};
void l2o_layout_Work(int64_t* out) {
    layout(out, &Work::lanes, &Work::tensors, &Work::groups, &Work::m_decays, &Work::v_decays, &Work::factors,
           &Work::layers, &Work::activation, &Work::head, &Work::threads, &Work::codes, &Work::widths,
           &Work::lane_strides, &Work::net_strides, &Work::fields, &Work::constants, &Work::addresses, &Work::weights,
           &Work::gains, &Work::means, &Work::output_sums, &Work::decays, &Work::rms_eps, &Work::diag_eps, &Work::scale_eps,
           &Work::clip);
}
}

namespace {

struct Tensor : Field, Addresses {};

struct Call : Work {
    std::vector<Tensor> all;

    explicit Call(const Work& work) : Work(work) {
        for (int64_t t = 0; t < tensors; t++) all.push_back({fields[t], addresses[t]});
    }
};

// In the order of `GROUPS` in statistics.py.
enum Group { GRAD, CLIPPED_GRAD, PARAM, M, V, M_OVER_RMS, INV_RMS, FACTORED_GRAD, GRAD_OVER_RMS, ROW, COL, INV_ROOT_ROW,
             INV_ROOT_COL, FACTORED_M, LOG_PARAM };

constexpr int64_t BLOCK = 24 * WIDTH;     // elements whose activations are in the cache at once
constexpr int64_t STRIDE = BLOCK + WIDTH;    // from channel to channel: an odd number of cache lines, to use all of the cache
constexpr int64_t PIECE = 16 * BLOCK;  // elements that one thread works on at once
constexpr float EPS = 1e-9f, ROOT_EPS = 1e-8f;
constexpr float LEAST_SQUARE = 1e-30f;  // added to squares that are factored

inline float inverse_root(float x) { return 1.0f / std::sqrt(x); }

template <class F> inline void each(int64_t n, F f) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) f(i);
}

// As torch.lerp has it.
inline void average(const float* old, const float* x, float d, int64_t n, float* to) {
    const float rest = 1.0f - d;
    if (d < 0.5f) each(n, [=](int64_t i) { to[i] = x[i] + d * (old[i] - x[i]); });
    else each(n, [=](int64_t i) { to[i] = old[i] - rest * (old[i] - x[i]); });
}

// Elements [begin, begin + count) that lie side by side in a block: either one row's, or along both.
struct Run {
    int64_t begin, count, left, right;  // where in the tables [a, p, b, c] and [a, b, q, c] they begin
};

inline int64_t lefts(const Field& f) { return f.axes[0] * f.axes[1] * f.axes[2] * f.axes[4]; }
inline int64_t rights(const Field& f) { return f.axes[0] * f.axes[2] * f.axes[3] * f.axes[4]; }

// The elements [begin, begin + n) of a tensor with rows and columns.
inline void find_runs(const Field& field, int64_t begin, int64_t n, std::vector<Run>& found) {
    const auto [a_, p_, b_, q_, c_] = field.axes;
    const int64_t length = c_ == 1 ? q_ : c_;
    found.clear();
    for (int64_t done = 0; done < n;) {
        int64_t e = begin + done;
        const int64_t c = e % c_, j = (e /= c_) % q_, b = (e /= q_) % b_, i = (e /= b_) % p_, a = e / p_;
        const int64_t count = std::min(n - done, length - (c_ == 1 ? j : c));
        found.push_back({done, count, ((a * p_ + i) * b_ + b) * c_ + c, ((a * b_ + b) * q_ + j) * c_ + c});
        done += count;
    }
}

// What rows and columns give each element: tables of one tensor in one lane, [factors, lefts] and [factors, rights].
struct Tables {
    const float *left, *right;                                     // the second moments
    float *left_root, *right_root, *left_factor, *right_factor;  // their inverse roots, and the factors of gradients
    // What the channels that are a row's or a column's give to the first layer, [units, lefts] and [units, rights], its
    // bias included, and the weights of the others [channels, units]; only where all elements share their scales.
    float *left_start, *right_start, *weights;

    static int64_t size(const Call& w, const Tensor& f, bool starts) {
        if (!f.factored) return 0;
        const int64_t values = 2 * w.factors + (starts ? w.widths[1] : 0);
        return values * (lefts(f) + rights(f)) + (starts ? w.widths[0] * w.widths[1] + WIDTH : 0);
    }

    Tables(const Call& w, const Tensor& f, int64_t lane, float* memory) {
        const int64_t l = w.factors * lefts(f), r = w.factors * rights(f);
        left = f.row_lacks_q ? f.row + lane * l : f.col + lane * l;
        right = f.row_lacks_q ? f.col + lane * r : f.row + lane * r;
        left_root = memory, left_factor = memory + l;
        right_root = memory + 2 * l, right_factor = memory + 2 * l + r;
        left_start = right_factor + r;
        if (w.layers) right_start = left_start + w.widths[1] * lefts(f), weights = right_start + w.widths[1] * rights(f);
    }

    // Of a group that has one: the d-th table, and whether it is the left one.
    std::pair<const float*, bool> table(const Tensor& f, int64_t group, int64_t d) const {
        const bool root = group == INV_ROOT_ROW || group == INV_ROOT_COL;
        if ((group == ROW || group == INV_ROOT_ROW) == bool(f.row_lacks_q))
            return {(root ? left_root : left) + d * lefts(f), true};
        return {(root ? right_root : right) + d * rights(f), false};
    }

    // The factor of columns, and of rows, `n` of which have a mean in common and lie `stride` apart.
    static void column_factors(const float* col, int64_t size, float* factor) {
        each(size, [=](int64_t i) { factor[i] = inverse_root(std::max(col[i], EPS)); });
    }
    static void row_factors(const float* row, const float* mean, int64_t size, int64_t n, int64_t stride, float* factor) {
        for (int64_t start = 0; start < size; start += stride, start % (n * stride) ? mean : mean += stride)
            each(stride, [=](int64_t i) {
                factor[start + i] = inverse_root(std::max(row[start + i] / (mean[i] + EPS), EPS));
            });
    }

    void make(const Call& w, const Tensor& f, int64_t lane) const {
        const int64_t l = w.factors * lefts(f), r = w.factors * rights(f);
        const float *from_left = left, *from_right = right;
        const float* mean = f.row_mean + lane * w.factors * f.axes[0] * f.axes[2] * f.axes[4];
        float *to_left = left_root, *to_right = right_root;
        each(l, [=](int64_t i) { to_left[i] = inverse_root(from_left[i] + ROOT_EPS); });
        each(r, [=](int64_t i) { to_right[i] = inverse_root(from_right[i] + ROOT_EPS); });
        if (f.row_lacks_q) {
            if (f.row_mean) row_factors(left, mean, l, f.axes[1], f.axes[2] * f.axes[4], left_factor);
            column_factors(right, r, right_factor);
        } else {
            column_factors(left, l, left_factor);
            if (f.row_mean) row_factors(right, mean, r, f.axes[3], f.axes[4], right_factor);
        }
    }
};

}  // namespace
