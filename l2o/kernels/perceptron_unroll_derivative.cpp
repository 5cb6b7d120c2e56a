// The derivative of whole unrolls, backwards through the steps that the forward pass has kept. As there, a thread takes
// whole lanes, and results do not depend on threads.
#include <new>

#include <omp.h>

#include "mlp_derivative.h"
#include "perceptron_derivative.h"
#include "perceptron_unroll.h"

extern "C" {
// What comes in by losses and, where it is then replaced by what goes out, by params and momenta at the end and at the
// start; what goes out by theta.
struct UnrollDerivative {
    const float* d_losses;  // [steps, lanes]
    float* const* d_params;
    float* const* d_m;
    float* const* d_theta;
};
void l2o_layout_UnrollDerivative(int64_t* out) {
    layout(out, &UnrollDerivative::d_losses, &UnrollDerivative::d_params, &UnrollDerivative::d_m,
           &UnrollDerivative::d_theta);
}
}

namespace {

// Arrays [lanes, sizes[i]] of zeros.
struct Arrays {
    std::vector<std::vector<float>> memory;
    std::vector<float*> pointers;

    Arrays(int64_t lanes, const std::vector<int64_t>& sizes) {
        for (int64_t size : sizes) pointers.push_back(memory.emplace_back(lanes * size).data());
    }
    operator float* const*() const { return pointers.data(); }
};

std::vector<int64_t> sizes_of_theta(const Step& s) {
    std::vector<int64_t> sizes;
    for (int64_t l = 0; l < s.layers; l++)
        for (int64_t in : {s.widths[l] + (l ? 0 : s.times), int64_t(1)}) sizes.push_back(in * s.widths[l + 1]);
    return sizes;
}

// What all lanes work in, each in a part of its own: gradients by one step's inputs, by way of the rule or through the
// perceptron's gradient, and the update of a lane that stands still.
struct Shared {
    std::vector<int64_t> entries, theta_entries;
    Sums sums;
    Arrays by_grads, by_params, through_grads, by_m, by_theta, nothing;

    Shared(const Step& s, const Plan& plan)
        : entries(s.entries, s.entries + s.tensors),
          theta_entries(sizes_of_theta(s)),
          sums(s, plan),
          by_grads(s.lanes, entries),
          by_params(s.lanes, entries),
          through_grads(s.lanes, entries),
          by_m(s.lanes * s.decays, entries),
          by_theta(s.lanes, theta_entries),
          nothing(s.lanes, entries) {}
};

// What a thread works in.
struct Worker {
    Scratch rule;
    Changes network;
    LaneBatch batch;

    Worker(const Step& s, const Perceptron& p) : rule(s, true), network(p), batch(p) {}
};

// A lane's part of `from`, arrays [lanes, sizes[i]], added to that of `to`.
void add(const std::vector<int64_t>& sizes, int64_t lane, const float* const* from, float* const* to) {
    for (size_t i = 0; i < sizes.size(); i++) {
        const float* x = from[i] + lane * sizes[i];
        float* y = to[i] + lane * sizes[i];
        for (int64_t j = 0; j < sizes[i]; j++) y[j] += x[j];
    }
}

void derive_rule(const Step& s, const Derivative& d, const Plan& plan, int64_t lane, Sums& sums, Scratch& work) {
    for (int64_t group = 0; group < plan.group_count(); group++) derive_group(s, d, plan, lane, group, sums, work);
    derive_lane(s, d, plan, lane, sums);
    for (const Piece& piece : plan.pieces) derive_piece(s, d, lane, piece, sums);
}

void derive_unroll(const Unroll& u, const UnrollDerivative& d, const std::vector<Moment>& steps, const Plan& plan,
                   int64_t lane, Shared& shared, Worker& work) {
    float *const *m_in = d.d_m, *const *m_out = shared.by_m;
    for (int64_t t = u.steps - 1; t >= 0; t--, std::swap(m_in, m_out)) {
        const Step& s = steps[t].s;
        const float* const* by_updates = t < u.left[lane] ? d.d_params : shared.nothing;
        const Derivative rule{by_updates, m_in, shared.by_theta, shared.by_grads, shared.by_params, m_out};
        derive_rule(s, rule, plan, lane, shared.sums, work.rule);
        Perceptron p = steps[t].p;
        p.grads = shared.through_grads;
        work.batch.gather(u, p, t, lane);
        const Cotangents v{d.d_losses + t * s.lanes, shared.by_grads};
        derive(p, v, lane, work.batch.x.data(), work.batch.y.data(), work.network);
        add(shared.entries, lane, shared.by_params, d.d_params);
        add(shared.entries, lane, shared.through_grads, d.d_params);
        add(shared.theta_entries, lane, shared.by_theta, d.d_theta);
    }
    if (m_in == d.d_m) return;
    const Step& s = steps[0].s;
    for (int64_t i = 0; i < s.tensors; i++) {
        const int64_t n = s.decays * s.entries[i];
        std::copy_n(m_in[i] + lane * n, n, d.d_m[i] + lane * n);
    }
}

void derivative(const Unroll& u, const Step& s, const Perceptron& p, const UnrollDerivative& d) {
    const Plan plan(s);
    const std::vector<Moment> steps = moments(u, s, p);
    Shared shared(s, plan);
    std::vector<Worker> workers;
    for (int64_t i = 0; i < s.threads; i++) workers.emplace_back(s, p);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t lane = 0; lane < s.lanes; lane++)
        derive_unroll(u, d, steps, plan, lane, shared, workers[omp_get_thread_num()]);
}
}  // namespace

// 1: no memory to work in. Labels and rows were looked at in the forward pass.
extern "C" int l2o_perceptron_unroll_derivative(const Unroll* u, const Step* s, const Perceptron* p,
                                                const UnrollDerivative* d) {
    try {
        derivative(*u, *s, *p, *d);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
