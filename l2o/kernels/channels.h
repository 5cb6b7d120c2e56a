// The channels that a network sees of a block of elements: `l2o/ops/statistics.py`.
#pragma once

#include "coordinatewise.h"

namespace {

// What a thread works in: a block's activations by layer, [width, STRIDE], and what several channels are made of.
struct Scratch {
    std::unique_ptr<float[]> memory;
    std::vector<float*> h;
    std::vector<Run> runs;  // of a block
    float *grad, *spare, *inv_rms, *factor, *m_factor;  // [STRIDE] twice, [v_decays, STRIDE], [factors, STRIDE] twice
    float* moments;  // with a block's gradients averaged in, where there are `decays`: [m_decays + v_decays + factors, STRIDE]

    explicit Scratch(const Call& w) {
        const int64_t averages = w.decays ? w.m_decays + w.v_decays + w.factors : 0;
        int64_t rows = 2 + w.v_decays + 2 * w.factors + averages;
        for (int64_t l = 0; l <= w.layers; l++) rows += w.widths[l];
        memory.reset(new float[rows * STRIDE + 16]());
        float* next = memory.get();
        while (reinterpret_cast<uintptr_t>(next) % 64) next++;  // vectors across cache lines take twice as long
        const auto take = [&](int64_t count) { return std::exchange(next, next + count * STRIDE); };
        for (int64_t l = 0; l <= w.layers; l++) h.push_back(take(w.widths[l]));
        grad = take(1), spare = take(1), inv_rms = take(w.v_decays), factor = take(w.factors), m_factor = take(w.factors);
        moments = take(averages);
    }
};

// One block of elements of one tensor in one lane.
struct Block {
    const Call& w;
    const Tensor& f;
    const Tables& tables;
    int64_t lane, begin, n;

    const float* row(const float* source, int64_t decays, int64_t d) const {
        return source + (lane * decays + d) * f.entries + begin;
    }
    const float* m(const Scratch& work, int64_t d) const {
        return w.decays ? work.moments + d * STRIDE : row(f.m, w.m_decays, d);
    }
    const float* v(const Scratch& work, int64_t d) const {
        return w.decays ? work.moments + (w.m_decays + d) * STRIDE : row(f.v, w.v_decays, d);
    }
    const float* diag(const Scratch& work, int64_t d) const {
        return w.decays ? work.moments + (w.m_decays + w.v_decays + d) * STRIDE : row(f.row, w.factors, d);
    }

    // The moments, of what is in work.grad.
    void average_in(Scratch& work) const {
        const float *g = work.grad, *decay = w.decays;
        float *x = work.spare, *to = work.moments;
        const auto averages = [&](const float* old, int64_t count, const float* value) {
            for (int64_t d = 0; d < count; d++, to += STRIDE) average(row(old, count, d), value, *decay++, n, to);
        };
        averages(f.m, w.m_decays, g);
        each(n, [=](int64_t i) { x[i] = g[i] * g[i]; });
        averages(f.v, w.v_decays, x);
        if (f.factored || !w.factors) return;
        each(n, [=](int64_t i) { x[i] += LEAST_SQUARE; });
        averages(f.row, w.factors, x);
    }

    // to[i] = g(value of the left table, of the right)
    template <class G> void spread(const Scratch& work, const float* left, const float* right, float* to, G g) const {
        for (const Run& run : work.runs) {
            const float *l = left + run.left, *r = right + run.right;
            float* out = to + run.begin;
            if (f.axes[4] > 1) {
                each(run.count, [=](int64_t i) { out[i] = g(l[i], r[i]); });
            } else {
                const float still = *l;
                each(run.count, [=](int64_t i) { out[i] = g(still, r[i]); });
            }
        }
    }

    bool in_one_row(const Scratch& work) const { return work.runs.size() == 1 && f.axes[4] == 1; }

    // Asks for the next block, while this one is worked on.
    void fetch_next() const {
        const auto ask = [&](const float* x) {
            for (int64_t i = n; i < std::min(2 * n, f.entries - begin); i += 64 / sizeof(float)) __builtin_prefetch(x + i);
        };
        ask(row(f.grad, 1, 0)), ask(row(f.param, 1, 0));
        for (int64_t d = 0; d < w.m_decays; d++) ask(row(f.m, w.m_decays, d));
        for (int64_t d = 0; d < w.v_decays; d++) ask(row(f.v, w.v_decays, d));
    }

    // What several channels share.
    void prepare(bool seconds, bool factors, Scratch& work) const {
        const float *g = f.grad + lane * f.entries + begin, clip = w.clip, eps = w.rms_eps, diag_eps = w.diag_eps;
        float* grad = work.grad;
        each(n, [=](int64_t i) { grad[i] = std::min(std::max(g[i], -clip), clip); });
        if (w.decays) average_in(work);
        fetch_next();
        if (f.factored) find_runs(f, begin, n, work.runs);
        for (int64_t d = 0; seconds && d < w.v_decays; d++) {
            const float* x = v(work, d);
            float* to = work.inv_rms + d * STRIDE;
            each(n, [=](int64_t i) { to[i] = inverse_root(x[i] + eps); });
        }
        for (int64_t d = 0; factors && d < w.factors; d++) {
            float *to = work.factor + d * STRIDE, *to_m = work.m_factor + d * STRIDE;
            if (f.factored) {
                spread(work, tables.left_factor + d * lefts(f), tables.right_factor + d * rights(f), to,
                       [](float l, float r) { return l * r; });
            } else {
                const float* x = diag(work, d);
                each(n, [=](int64_t i) {
                    to[i] = inverse_root(std::max(x[i] + EPS, EPS)), to_m[i] = inverse_root(x[i] + diag_eps);
                });
            }
        }
    }

    // use(f), f(i) the i-th element of the d-th channel of a group; false where it is not a simple function of i.
    template <class Use> bool as_function(int64_t group, int64_t d, const Scratch& work, Use use) const {
        const float *g = work.grad, *p = f.param + lane * f.entries + begin;
        const float* rms = work.inv_rms + (w.v_decays == 1 ? 0 : d) * STRIDE;
        const float *factor = work.factor + d * STRIDE, *own = f.factored ? factor : work.m_factor + d * STRIDE;
        const bool momentum = group == M || group == M_OVER_RMS || group == FACTORED_M;
        const float* x = momentum ? m(work, d) : group == V ? v(work, d) : nullptr;
        switch (group) {
            case GRAD: use([=](int64_t i) { return g[i]; }); return true;
            case CLIPPED_GRAD: use([=](int64_t i) { return std::min(std::max(g[i], -0.1f), 0.1f); }); return true;
            case PARAM: use([=](int64_t i) { return p[i]; }); return true;
            case M:
            case V: use([=](int64_t i) { return x[i]; }); return true;
            case M_OVER_RMS: use([=](int64_t i) { return x[i] * rms[i]; }); return true;
            case INV_RMS: use([=](int64_t i) { return rms[i]; }); return true;
            case FACTORED_GRAD: use([=](int64_t i) { return g[i] * factor[i]; }); return true;
            case GRAD_OVER_RMS: use([=](int64_t i) { return g[i] * rms[i]; }); return true;
            case FACTORED_M: use([=](int64_t i) { return x[i] * own[i]; }); return true;
            default: return false;
        }
    }

    // One channel of a group, the d-th, times its scale.
    void channel(int64_t group, int64_t d, float s, const Scratch& work, float* to) const {
        const auto write = [&](auto value) { each(n, [=](int64_t i) { to[i] = value(i) * s; }); };
        if (as_function(group, d, work, write)) return;
        if (group != LOG_PARAM) return table_channel(group, d, s, work, to);
        const float* p = f.param + lane * f.entries + begin;
        each(n, [=](int64_t i) { to[i] = std::abs(p[i]) + ROOT_EPS; });
        for (int64_t i = 0; i < n; i += WIDTH) store(to + i, log(load<vec>(to + i)) * s);
    }

    void table_channel(int64_t group, int64_t d, float s, const Scratch& work, float* to) const {
        const bool root = group == INV_ROOT_ROW || group == INV_ROOT_COL;
        if (!f.factored) {
            const float* x = diag(work, d);
            if (root) return each(n, [=](int64_t i) { to[i] = inverse_root(x[i] + ROOT_EPS) * s; });
            return each(n, [=](int64_t i) { to[i] = x[i] * s; });
        }
        const auto [x, is_left] = tables.table(f, group, d);
        if (is_left) return spread(work, x, tables.right, to, [=](float l, float) { return l * s; });
        spread(work, tables.left, x, to, [=](float, float r) { return r * s; });
    }
};

bool is_table(int64_t group) { return group >= ROW && group <= INV_ROOT_COL; }

// Whether a channel is not computed for each element, but once for those of its table.
bool by_table(const Tensor& f, int64_t group) { return is_table(group) && f.factored && f.inner == f.entries; }

int64_t channels(const Call& w, int64_t group) {
    switch (group) {
        case M:
        case M_OVER_RMS:
        case FACTORED_M: return w.m_decays;
        case V:
        case INV_RMS:
        case GRAD_OVER_RMS: return w.v_decays;
        case FACTORED_GRAD: return w.factors;
        default: return is_table(group) ? w.factors : 1;
    }
}

// f(group, d, c) over all channels.
template <class F> void every_channel(const Call& w, F f) {
    int64_t c = 0;
    for (int64_t k = 0; k < w.groups; k++)
        for (int64_t d = 0; d < channels(w, w.codes[k]); d++) f(w.codes[k], d, c++);
}

// What the channels need to be prepared: inverse roots of second moments, factors of gradients.
struct Needs {
    bool seconds = false, factors = false, tables = false, tables_seen = false;

    explicit Needs(const Call& w) {
        seconds = w.v_decays && w.head == 2;
        for (int64_t k = 0; k < w.groups; k++) {
            const int64_t group = w.codes[k];
            seconds |= group == M_OVER_RMS || group == INV_RMS || group == GRAD_OVER_RMS;
            factors |= group == FACTORED_GRAD || group == FACTORED_M;
            tables_seen |= is_table(group);
        }
        tables = factors || tables_seen;
    }
    bool starts(const Tensor& f) const { return tables_seen && by_table(f, ROW); }
};
}  // namespace
