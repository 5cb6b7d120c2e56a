// The derivative of l2o.rules.MLP, lane by lane.
#pragma once

#include "mlp_rule.h"

extern "C" {
// What comes in by updates and m_new, what goes out by theta, grads, params and m_old; as in `Step`.
struct Derivative {
    const float* const* d_updates;
    const float* const* d_m_new;
    float* const* d_theta;
    float* const* d_grads;
    float* const* d_params;
    float* const* d_m_old;
};
void l2o_layout_Derivative(int64_t* out) {
    layout(out, &Derivative::d_updates, &Derivative::d_m_new, &Derivative::d_theta, &Derivative::d_grads,
           &Derivative::d_params, &Derivative::d_m_old);
}
}

namespace {

// Where the gradient of a channel goes: by gradient, parameter and old momenta.
float* d_channel(const Step& s, const Derivative& d, int64_t lane, int64_t tensor, int64_t c) {
    const int64_t n = s.entries[tensor];
    if (c == 0) return d.d_grads[tensor] + lane * n;
    if (c == 1) return d.d_params[tensor] + lane * n;
    return d.d_m_old[tensor] + (lane * s.decays + c - 2) * n;
}

// Through `outputs`: from the gradient of the update to that of direction and magnitude.
void d_outputs(const Step& s, const float* d_update, int64_t n, Scratch& work) {
    float *direction = work.d, *magnitude = work.d + BLOCK;
    const float *result = work.h[s.layers], *factor = result + BLOCK;
    copy_padded(d_update, n, 1.0f, direction);
    for (int64_t e = 0; e < n; e += WIDTH) {
        const vec u = load<vec>(direction + e);
        store(magnitude + e, u * load<vec>(result + e) * s.exp_mult);
        store(direction + e, u * load<vec>(factor + e));
    }
}

// Through `network`: adds to the sums for theta, and leaves the gradient of the scaled channels in work.d.
void d_network(const Network& net, int64_t n, Scratch& work) {
    const Step& s = net.s;
    vec* d_theta = work.d_theta + sums_for_theta(s);
    for (int64_t l = s.layers - 1; l >= 0; l--) {
        const int64_t in = s.widths[l], out = s.widths[l + 1];
        d_theta -= (in + 1) * out;
        add_dots(in + 1, out, padded(n), work.h[l], BLOCK, work.d, BLOCK, d_theta);
        const float* h = work.h[l];
        const float floor = l ? 0.0f : -std::numeric_limits<float>::infinity();  // of the ReLU below, if there is one
        multiply<4, 3>(
            in, padded(n), out, net.weights[l], out, 1, work.d, BLOCK, work.d_below, BLOCK,
            [](auto zero, int64_t, int64_t) { return zero; },
            [=](auto y, int64_t i, int64_t e) {
                return load<decltype(y)>(h + i * BLOCK + e) <= floor ? decltype(y){} : y;
            });
        std::swap(work.d, work.d_below);
    }
}

// From the updates' gradients to theta's, summed up in `work`, and to those of the scaled channels, which are left where
// the gradients of the channels themselves belong. dots: [channels], their products with the channels.
void derive(const Network& net, const Derivative& d, int64_t lane, const Piece& piece, Scratch& work, float* dots) {
    const Step& s = net.s;
    blocks(piece, [&](int64_t begin, int64_t n) {
        network(net, lane, piece.tensor, begin, n, work);
        outputs(s, n, work);
        d_outputs(s, d.d_updates[piece.tensor] + lane * s.entries[piece.tensor] + begin, n, work);
        d_network(net, n, work);
        for (int64_t c = 0; c < s.widths[0]; c++) {
            dots[c] += dot(work.d + c * BLOCK, channel(s, lane, piece.tensor, c) + begin, n);
            std::copy_n(work.d + c * BLOCK, n, d_channel(s, d, lane, piece.tensor, c) + begin);
        }
    });
}

// Through `second_moment_scale` and `momenta`. factors: [tensors, channels], what a channel's gradient has of the
// channel itself, because its scale depends on it.
void unscale(const Step& s, const Derivative& d, int64_t lane, const Piece& piece, const float* factors) {
    const int64_t n = s.entries[piece.tensor], channels = s.widths[0];
    const float *scale = scales(s, lane, piece.tensor), *factor = factors + piece.tensor * channels;
    float* d_grad = d_channel(s, d, lane, piece.tensor, 0);
    for (int64_t c = 0; c < channels; c++) {
        const float* x = channel(s, lane, piece.tensor, c);
        float* dx = d_channel(s, d, lane, piece.tensor, c);
        const float* d_m = c < 2 ? nullptr : d.d_m_new[piece.tensor] + (lane * s.decays + c - 2) * n;
        const float kept = c < 2 ? 1.0f : s.decay[c - 2];
        sweep(piece.end - piece.begin, [&](auto zero, int64_t offset) {
            using V = decltype(zero);
            const int64_t e = piece.begin + offset;
            V total = load<V>(dx + e) * scale[c] - load<V>(x + e) * factor[c];
            if (d_m) {
                total += load<V>(d_m + e);
                store(d_grad + e, load<V>(d_grad + e) + total * (1.0f - kept));
            }
            store(dx + e, total * kept);
        });
    }
}

// The sums of a lane's groups, [lanes, groups, sums], as the gradients of its theta.
void set_d_theta(const Step& s, const Derivative& d, const Plan& plan, int64_t lane, const float* parts, int64_t count) {
    std::vector<double> sums(count);
    for (int64_t g = 0; g < plan.group_count(); g++)
        for (int64_t i = 0; i < count; i++) sums[i] += parts[(lane * plan.group_count() + g) * count + i];
    const double* next = sums.data();
    for (int64_t l = 0; l < s.layers; l++) {
        const int64_t in = s.widths[l], out = s.widths[l + 1], shared = l ? 0 : s.times;
        float* weight = d.d_theta[2 * l] + lane * (in + shared) * out;
        const double* bias = next + in * out;
        std::copy_n(next, in * out, weight);
        for (int64_t k = 0; k < shared; k++)
            for (int64_t o = 0; o < out; o++) weight[(in + k) * out + o] = s.time[lane * s.times + k] * float(bias[o]);
        std::copy_n(bias, out, d.d_theta[2 * l + 1] + lane * out);
        next = bias + out;
    }
}

// What the pieces and groups of all lanes leave for each other.
struct Sums {
    std::vector<float> dots, parts, factors;

    Sums(const Step& s, const Plan& plan)
        : dots(s.lanes * plan.count() * s.widths[0]),
          parts(s.lanes * plan.group_count() * sums_for_theta(s)),
          factors(s.lanes * s.tensors * s.widths[0]) {}
};

// First, for each group of a lane: sums for theta, and for scales.
void derive_group(const Step& s, const Derivative& d, const Plan& plan, int64_t lane, int64_t group, Sums& sums,
                  Scratch& work) {
    const int64_t weights = sums_for_theta(s);
    const Network net(s, lane);
    std::fill_n(work.d_theta, weights, vec{});
    for (int64_t p = plan.groups[group]; p < plan.groups[group + 1]; p++) {
        float* dots = &sums.dots[(lane * plan.count() + p) * s.widths[0]];
        std::fill_n(dots, s.widths[0], 0.0f);
        derive(net, d, lane, plan.pieces[p], work, dots);
    }
    float* part = &sums.parts[(lane * plan.group_count() + group) * weights];
    for (int64_t j = 0; j < weights; j++) part[j] = sum(work.d_theta[j]);
}

// Then the lane's gradient of theta, and what its channels have of their scales.
void derive_lane(const Step& s, const Derivative& d, const Plan& plan, int64_t lane, Sums& sums) {
    const int64_t channels = s.widths[0];
    set_d_theta(s, d, plan, lane, sums.parts.data(), sums_for_theta(s));
    totals(s, plan, lane, sums.dots.data(), [&](int64_t t, int64_t c, float total) {
        const float scale = scales(s, lane, t)[c];
        sums.factors[(lane * s.tensors + t) * channels + c] = scale * scale * scale * total / s.entries[t];
    });
}

// At last each of its pieces.
void derive_piece(const Step& s, const Derivative& d, int64_t lane, const Piece& piece, const Sums& sums) {
    unscale(s, d, lane, piece, &sums.factors[lane * s.tensors * s.widths[0]]);
}
}  // namespace
