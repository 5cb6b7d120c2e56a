// Whole unrolls of perceptrons: what is the same for every rule.
#pragma once

#include "perceptron.h"

extern "C" {
// Mirrored field by field in perceptron_unroll.py. Where steps are kept, for a derivative, parameters, gradients and the
// state of the rule have an axis of steps before the others; else a step takes the place of the one before.
struct Unroll {
    int64_t steps, copies, n, kept;
    const float* x;       // [n, in]
    const int64_t* y;     // [n]
    const int64_t* rows;  // [steps, lanes / copies, batch], each under n
    const int64_t* left;  // [lanes]: steps until the lane stands still
    float* const* params;  // the same arrays as the perceptron's
    float* losses;         // [steps, lanes]; not read by the derivative
};
void l2o_layout_Unroll(int64_t* out) {
    layout(out, &Unroll::steps, &Unroll::copies, &Unroll::n, &Unroll::kept, &Unroll::x, &Unroll::y, &Unroll::rows,
           &Unroll::left, &Unroll::params, &Unroll::losses);
}
}

namespace {

// A lane's images and labels of a step.
struct LaneBatch {
    std::vector<float> x;
    std::vector<int64_t> y;

    explicit LaneBatch(const Perceptron& p) : x(p.batch * p.widths[0]), y(p.batch) {}

    void gather(const Unroll& u, const Perceptron& p, int64_t t, int64_t lane) {
        const int64_t in = p.widths[0], *rows = u.rows + (t * (p.lanes / u.copies) + lane / u.copies) * p.batch;
        for (int64_t e = 0; e < p.batch; e++) {
            std::copy_n(u.x + rows[e] * in, in, &x[e * in]);
            y[e] = u.y[rows[e]];
        }
    }
};

// Whether labels are classes, and rows of the table.
bool is_readable(const Unroll& u, const Perceptron& p) {
    const auto end = u.rows + u.steps * (p.lanes / u.copies) * p.batch;
    return are_classes(p, u.y, u.n) && std::all_of(u.rows, end, [&](int64_t row) { return 0 <= row && row < u.n; });
}
}  // namespace
