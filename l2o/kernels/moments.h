// Moments of gradients with one more gradient averaged in, and the sums that rows and columns are averages of.
#pragma once

#include "coordinatewise.h"

extern "C" {
// Mirrored field by field in moments.py; `Field` as for the other kernels.

// Of one tensor: each lane contiguous, with an axis of decays after that of lanes in all but `grad`. Null what there is
// not: diag of a tensor with rows and columns, these of all others.
struct MomentAddresses {
    const float *grad, *m, *v, *diag;
    float *m_new, *v_new, *diag_new;
    float *row, *col;  // [lanes, ...]: sums of squares over the axis that rows and columns lack
    const float* update;  // and the parameter that it is for, where `steps` are
    float* param;
    bool* had_gradient;  // of entries that rest until they have had one, or null
};

struct Moments {
    int64_t lanes, tensors, m_decays, v_decays, factors, threads;
    const Field* fields;                // [tensors]
    const float* decays;                // [lanes, m_decays + v_decays + factors]
    const MomentAddresses* addresses;  // [tensors]
    const float* steps;                 // [tensors, 2]: lr and keep of param <- keep param + lr update, or null
    float clip;
};
void l2o_layout_Moments(int64_t* out) {
    layout(out, &Moments::lanes, &Moments::tensors, &Moments::m_decays, &Moments::v_decays, &Moments::factors,
           &Moments::threads, &Moments::fields, &Moments::decays, &Moments::addresses, &Moments::steps,
           &Moments::clip);
}
}

namespace {

constexpr int64_t MOST_CHUNKS = 16;

// Elements of one tensor that a thread sees one after the other; sums over a chunk are kept apart.
struct Chunk {
    int64_t tensor, begin, end, sums;  // sums: where in a lane's partial sums those of this chunk begin
};

struct Chunks {
    std::vector<Chunk> all;
    int64_t sums = 0;

    explicit Chunks(const Moments& w) {
        for (int64_t t = 0; t < w.tensors; t++) {
            const Field& f = w.fields[t];
            const int64_t own = f.factored ? lefts(f) + rights(f) : 0;
            // So many that threads have something to share, so few that their sums are small beside the tensor.
            const int64_t most = own ? std::min(MOST_CHUNKS, f.entries / (8 * own)) : f.entries / PIECE;
            const int64_t count = std::max<int64_t>(std::min(most, f.entries / PIECE), 1);
            const int64_t size = ((f.entries + count - 1) / count + BLOCK - 1) / BLOCK * BLOCK;
            for (int64_t begin = 0; begin < f.entries; begin += size, sums += own)
                all.push_back({t, begin, std::min(begin + size, f.entries), sums});
        }
    }
    int64_t count() const { return all.size(); }
};

// Adds the squares of a block to the sums of its rows and columns.
inline void add_squares(const Field& f, const std::vector<Run>& runs, const float* squares, float* left, float* right) {
    for (const Run& run : runs) {
        const float* x = squares + run.begin;
        float *l = left + run.left, *r = right + run.right;
        each(run.count, [=](int64_t i) { r[i] += x[i]; });
        if (f.axes[4] > 1) {
            each(run.count, [=](int64_t i) { l[i] += x[i]; });
            continue;
        }
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < run.count; i++) total += x[i];
        *l += total;
    }
}

// param <- keep param + lr update, of the elements [begin, begin + n) of the only lane.
inline void take_step(const MomentAddresses& a, float lr, float keep, int64_t begin, int64_t n) {
    const float *u = a.update + begin, *g = a.grad + begin;
    float* p = a.param + begin;
    if (!a.had_gradient) return each(n, [=](int64_t i) { p[i] = keep * p[i] + lr * u[i]; });
    bool* had = a.had_gradient + begin;
    each(n, [=](int64_t i) {
        const bool moves = had[i] | (g[i] != 0.0f);
        had[i] = moves;
        p[i] = keep * p[i] + (moves ? lr * u[i] : 0.0f);
    });
}

void advance(const Moments& w, int64_t lane, const Chunk& chunk, float* sums) {
    const Field& f = w.fields[chunk.tensor];
    const MomentAddresses& a = w.addresses[chunk.tensor];
    float grad[BLOCK], square[BLOCK], factored[BLOCK];
    std::vector<Run> runs;
    for (int64_t begin = chunk.begin; begin < chunk.end; begin += BLOCK) {
        const int64_t n = std::min(BLOCK, chunk.end - begin);
        const float *g = a.grad + lane * f.entries + begin, clip = w.clip;
        each(n, [&](int64_t i) {
            grad[i] = std::min(std::max(g[i], -clip), clip);
            square[i] = grad[i] * grad[i];
            factored[i] = square[i] + LEAST_SQUARE;
        });
        const float* d = w.decays + lane * (w.m_decays + w.v_decays + w.factors);
        const auto averages = [&](int64_t count, const float* old, const float* x, float* to) {
            const float* own = std::exchange(d, d + count);
            for (int64_t k = 0, at = lane * count * f.entries + begin; old && k < count; k++, at += f.entries)
                average(old + at, x, own[k], n, to + at);
        };
        averages(w.m_decays, a.m, grad, a.m_new);
        averages(w.v_decays, a.v, square, a.v_new);
        averages(w.factors, a.diag, factored, a.diag_new);
        if (w.steps) take_step(a, w.steps[2 * chunk.tensor], w.steps[2 * chunk.tensor + 1], begin, n);
        if (!f.factored) continue;
        find_runs(f, begin, n, runs);
        add_squares(f, runs, factored, sums, sums + lefts(f));
    }
}

void set_rows_and_columns(const Moments& w, const Chunks& chunks, int64_t lane, const float* parts) {
    for (int64_t t = 0, c = 0; t < w.tensors; t++) {
        const Field& f = w.fields[t];
        const int64_t l = f.factored ? lefts(f) : 0, r = f.factored ? rights(f) : 0;
        std::vector<double> sums(l + r);
        for (; c < chunks.count() && chunks.all[c].tensor == t; c++)
            for (int64_t i = 0; i < l + r; i++) sums[i] += parts[chunks.all[c].sums + i];
        if (!f.factored) continue;
        const MomentAddresses& a = w.addresses[t];
        std::copy_n(sums.begin(), l, f.row_lacks_q ? a.row + lane * l : a.col + lane * l);
        std::copy_n(sums.begin() + l, r, f.row_lacks_q ? a.col + lane * r : a.row + lane * r);
    }
}
}  // namespace
