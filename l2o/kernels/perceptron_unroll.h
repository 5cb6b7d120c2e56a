// Whole unrolls of perceptrons that l2o.rules.MLP trains: what their forward and backward passes share.
#pragma once

#include "mlp_rule.h"
#include "perceptron.h"

extern "C" {
// Mirrored field by field in perceptron_unroll.py. Of the step and the perceptron that go with it, params and grads are
// the same arrays, m_old and m_new are, updates are scratch, and `time` is [steps, lanes, times]. Where steps are kept,
// for a derivative, these arrays have an axis more before the others: params and momenta of steps + 1, grads and scales
// of steps; else a step takes the place of the one before.
struct Unroll {
    int64_t steps, copies, n, kept;
    const float* x;       // [n, in]
    const int64_t* y;     // [n]
    const int64_t* rows;  // [steps, lanes / copies, batch], each under n
    const int64_t* left;  // [lanes]: steps until the lane stands still
    float* const* params;
    float* losses;  // [steps, lanes]; not read by the derivative
};
void l2o_layout_Unroll(int64_t* out) {
    layout(out, &Unroll::steps, &Unroll::copies, &Unroll::n, &Unroll::kept, &Unroll::x, &Unroll::y, &Unroll::rows,
           &Unroll::left, &Unroll::params, &Unroll::losses);
}
}

namespace {

// One step of an unroll, with the params after it.
struct Moment {
    std::vector<float*> grads, params, after, m_old, m_new;
    Step s;
    Perceptron p;

    Moment(const Unroll& u, const Step& all, const Perceptron& perceptron, int64_t t) : s(all), p(perceptron) {
        const int64_t now = u.kept ? t : 0, next = u.kept ? t + 1 : 0;
        for (int64_t i = 0; i < all.tensors; i++) {
            const int64_t n = all.lanes * all.entries[i];
            grads.push_back(perceptron.grads[i] + now * n);
            params.push_back(u.params[i] + now * n);
            after.push_back(u.params[i] + next * n);
            m_old.push_back(all.m_new[i] + now * n * all.decays);
            m_new.push_back(all.m_new[i] + next * n * all.decays);
        }
        s.grads = p.grads = grads.data();
        s.params = p.params = params.data();
        s.m_old = m_old.data();
        s.m_new = m_new.data();
        s.scales += now * all.lanes * all.tensors * all.widths[0];
        s.time += t * all.lanes * all.times;
    }
};

std::vector<Moment> moments(const Unroll& u, const Step& s, const Perceptron& p) {
    std::vector<Moment> all;
    for (int64_t t = 0; t < u.steps; t++) all.emplace_back(u, s, p, t);
    return all;
}

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
}  // namespace
