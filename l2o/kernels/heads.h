// What updates are made of a network's outputs: `Product` and `Nominal` of l2o/ops/coordinatewise.py.
#pragma once

#include "channels.h"

namespace {

// `Product`: gain * o0 * exp(exp_mult * o1), left in o0's place.
void product(const Call& w, float gain, int64_t n, float* outputs) {
    for (int64_t e = 0; e < n; e += WIDTH)
        store(outputs + e, load<vec>(outputs + e) * exp(load<vec>(outputs + STRIDE + e) * w.constants[0]) * gain);
}

// `Nominal` of coordinatewise.py, in the order of its fields.
struct NominalConstants {
    float direction, step_mult, exp_mult, lr, decay, lr_exp_mult, decay_exp_mult, sets_lr, sets_decay, mean_magnitude,
        mean_lr, mean_decay, normalise;
};

// The direction without a network, and what the learned term is multiplied with where `normalise`.
void direction(const Block& block, const Scratch& work, int64_t kind, float* to) {
    const int64_t last = block.w.m_decays - 1, first = kind == 2 || kind == 4 ? 0 : last;
    const float* rms = work.inv_rms;
    std::fill_n(to, block.n, 0.0f);
    for (int64_t d = first; d <= last; d++) {
        const float *x = kind == 0 ? work.grad : block.m(work, d), share = 1.0f / float(last - first + 1);
        if (kind >= 3) each(block.n, [=](int64_t i) { to[i] += x[i] * rms[i] * share; });
        else each(block.n, [=](int64_t i) { to[i] += x[i] * share; });
    }
}

void nominal(const Block& block, const float* means, float gain, Scratch& work, float* outputs) {
    const NominalConstants& k = *reinterpret_cast<const NominalConstants*>(block.w.constants);
    float *to = work.spare, *p = work.grad;
    direction(block, work, int64_t(k.direction), to);
    std::copy_n(block.f.param + block.lane * block.f.entries + block.begin, block.n, p);
    const auto pick = [&](int64_t o, bool set, bool mean, float unset, int64_t e) {
        return !set ? vec{} + unset : mean ? vec{} + means[o] : load<vec>(outputs + o * STRIDE + e);
    };
    for (int64_t e = 0; e < block.n; e += WIDTH) {
        const vec s = pick(1, true, k.mean_magnitude, 0, e), n = pick(2, k.sets_lr, k.mean_lr, 1, e);
        const vec r = pick(3, k.sets_decay, k.mean_decay, 0, e);
        vec learned = load<vec>(outputs + e) * exp(s * k.exp_mult) * k.step_mult;
        if (k.normalise) learned *= load<vec>(work.inv_rms + e);
        const vec step = learned + exp(n * k.lr_exp_mult) * k.lr * load<vec>(to + e);
        store(outputs + e, gain * step - exp(r * k.decay_exp_mult) * k.decay * load<vec>(p + e));
    }
}
}  // namespace
