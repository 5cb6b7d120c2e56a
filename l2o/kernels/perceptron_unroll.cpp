// Whole unrolls of perceptrons that l2o.rules.MLP trains. A thread takes whole lanes, step after step, so that a lane's
// parameters and momenta stay in its cache; results do not depend on threads.
#include <new>

#include <omp.h>

#include "mlp_rule.h"
#include "perceptron.h"

extern "C" {
// Mirrored field by field in perceptron_unroll.py. Of the step and the perceptron that go with it, params are the same
// arrays and move, m_old and m_new are the same, grads and updates are scratch, and `time` is [steps, lanes, times].
struct Unroll {
    int64_t steps, copies, n;
    const float* x;       // [n, in]
    const int64_t* y;     // [n]
    const int64_t* rows;  // [steps, lanes / copies, batch], each under n
    const int64_t* left;  // [lanes]: steps until the lane stands still
    float* const* params;
    float* losses;  // [steps, lanes]
};
}

namespace {

// What a thread works in.
struct Worker {
    Scratch rule;
    Layers network;
    std::vector<float> x;
    std::vector<int64_t> y;

    Worker(const Step& s, const Perceptron& p)
        : rule(s, false), network(p), x(p.batch * p.widths[0]), y(p.batch) {}
};

void gather(const Unroll& u, const Perceptron& p, const int64_t* rows, Worker& work) {
    const int64_t in = p.widths[0];
    for (int64_t e = 0; e < p.batch; e++) {
        std::copy_n(u.x + rows[e] * in, in, &work.x[e * in]);
        work.y[e] = u.y[rows[e]];
    }
}

void move(const Unroll& u, const Step& s, int64_t lane) {
    for (int64_t t = 0; t < s.tensors; t++) {
        const int64_t n = s.entries[t];
        float* p = u.params[t] + lane * n;
        const float* step = s.updates[t] + lane * n;
        for (int64_t i = 0; i < n; i++) p[i] += step[i];
    }
}

void unroll_lane(const Unroll& u, Step s, const Perceptron& p, const Plan& plan, int64_t lane, float* sums, Worker& work) {
    const int64_t problems = s.lanes / u.copies, count = plan.count(), channels = s.widths[0];
    for (int64_t t = 0; t < u.steps; t++, s.time += s.lanes * s.times) {
        gather(u, p, u.rows + (t * problems + lane / u.copies) * p.batch, work);
        u.losses[t * s.lanes + lane] = differentiate(p, lane, work.x.data(), work.y.data(), work.network);
        for (int64_t i = 0; i < count; i++) look(s, lane, plan.pieces[i], &sums[(lane * count + i) * channels]);
        if (t >= u.left[lane]) continue;
        set_scales(s, plan, lane, sums);
        for (const Piece& piece : plan.pieces) apply(s, lane, piece, work.rule);
        move(u, s, lane);
    }
}

void unroll(const Unroll& u, const Step& s, const Perceptron& p) {
    const Plan plan(s);
    std::vector<float> sums(s.lanes * plan.count() * s.widths[0]);
    std::vector<Worker> workers;
    for (int64_t i = 0; i < s.threads; i++) workers.emplace_back(s, p);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t lane = 0; lane < s.lanes; lane++)
        unroll_lane(u, s, p, plan, lane, sums.data(), workers[omp_get_thread_num()]);
}
}  // namespace

// 1: no memory to work in.  2: a label is no class, or a row not of the table.
extern "C" int l2o_perceptron_unroll(const Unroll* u, const Step* s, const Perceptron* p) {
    const auto end = u->rows + u->steps * (s->lanes / u->copies) * p->batch;
    if (!are_classes(*p, u->y, u->n) || !std::all_of(u->rows, end, [=](int64_t row) { return 0 <= row && row < u->n; }))
        return 2;
    try {
        unroll(*u, *s, *p);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
