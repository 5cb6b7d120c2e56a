// Whole unrolls of perceptrons that l2o.rules.MLP trains. A thread takes whole lanes, step after step, so that a lane's
// parameters and momenta stay in its cache; results do not depend on threads.
#include "perceptron_unroll.h"

#include <new>

#include <omp.h>

namespace {

// What a thread works in.
struct Worker {
    Scratch rule;
    Layers network;
    LaneBatch batch;

    Worker(const Step& s, const Perceptron& p) : rule(s, false), network(p), batch(p) {}
};

void move(const Moment& m, int64_t lane, bool ahead) {
    for (int64_t t = 0; t < m.s.tensors; t++) {
        const int64_t n = m.s.entries[t], at = lane * n;
        const float *p = m.params[t] + at, *step = m.s.updates[t] + at;
        float* after = m.after[t] + at;
        for (int64_t i = 0; i < n; i++) after[i] = ahead ? p[i] + step[i] : p[i];
    }
}

void unroll_lane(const Unroll& u, const std::vector<Moment>& steps, const Plan& plan, int64_t lane, float* sums,
                 Worker& work) {
    for (int64_t t = 0; t < u.steps; t++) {
        const Moment& m = steps[t];
        const Step& s = m.s;
        work.batch.gather(u, m.p, t, lane);
        u.losses[t * s.lanes + lane] = differentiate(m.p, lane, work.batch.x.data(), work.batch.y.data(), work.network);
        for (int64_t i = 0; i < plan.count(); i++)
            look(s, lane, plan.pieces[i], &sums[(lane * plan.count() + i) * s.widths[0]]);
        set_scales(s, plan, lane, sums);
        const bool ahead = t < u.left[lane];
        for (int64_t i = 0; ahead && i < plan.count(); i++) apply(s, lane, plan.pieces[i], work.rule);
        move(m, lane, ahead);
    }
}

void unroll(const Unroll& u, const Step& s, const Perceptron& p) {
    const Plan plan(s);
    const std::vector<Moment> steps = moments(u, s, p);
    std::vector<float> sums(s.lanes * plan.count() * s.widths[0]);
    std::vector<Worker> workers;
    for (int64_t i = 0; i < s.threads; i++) workers.emplace_back(s, p);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t lane = 0; lane < s.lanes; lane++)
        unroll_lane(u, steps, plan, lane, sums.data(), workers[omp_get_thread_num()]);
}
}  // namespace

// 1: no memory to work in.  2: a label is no class, or a row not of the table.
extern "C" int l2o_perceptron_unroll(const Unroll* u, const Step* s, const Perceptron* p) {
    if (!is_readable(*u, *p)) return 2;
    try {
        unroll(*u, *s, *p);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
