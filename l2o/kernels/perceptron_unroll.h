// Whole unrolls of perceptrons that l2o.rules.MLP trains: what their forward and backward passes share.
#pragma once

#include "mlp_rule.h"
#include "unroll.h"

// Of the step and the perceptron that go with an `Unroll`, params and grads are the same arrays, m_old and m_new are,
// updates are scratch, and `time` is [steps, lanes, times]. Where steps are kept there are params and momenta of
// steps + 1, grads and scales of steps.
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
}  // namespace
