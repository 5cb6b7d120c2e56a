// l2o.rules.MLP on a block of entries. The formulas restated here are those of l2o/rules/mlp.py and, in it, of `momenta`,
// `second_moment_scale` and `mlp` in l2o/ops.
#pragma once

#include <algorithm>
#include <vector>

#include "vector.h"

extern "C" {
// Mirrored field by field in mlp_rule.py. Arrays of pointers have one for each tensor: [lanes, entries], momenta
// [lanes, decays, entries]; `theta` and `d_theta` hold w0, b0, w1, ..., weights [lanes, in, out].
struct Step {
    int64_t lanes, tensors, layers, decays, times, threads;
    const int64_t* entries;  // [tensors]
    const int64_t* widths;   // [layers + 1]: channels of an entry, hidden units, 2
    const int64_t* strides;  // [2 layers]: from lane to lane of theta; 0 where lanes share it
    const float* decay;
    const float* time;  // [lanes, times]
    float step_mult, exp_mult, eps;
    const float* const* theta;
    const float* const* grads;
    const float* const* params;
    const float* const* m_old;  // not read by the derivative
    float* const* m_new;        // read by the derivative
    float* const* updates;
    float* scales;  // [lanes, tensors, channels]
};
void l2o_layout_Step(int64_t* out) {
    layout(out, &Step::lanes, &Step::tensors, &Step::layers, &Step::decays, &Step::times, &Step::threads,
           &Step::entries, &Step::widths, &Step::strides, &Step::decay, &Step::time, &Step::step_mult, &Step::exp_mult,
           &Step::eps, &Step::theta, &Step::grads, &Step::params, &Step::m_old, &Step::m_new, &Step::updates,
           &Step::scales);
}
}

namespace {

constexpr int64_t BLOCK = 12 * WIDTH;  // entries whose activations are in the cache at once

// Entries of one tensor.
struct Piece {
    int64_t tensor, begin, end;
};

// One channel of one tensor in one lane: gradient, parameter, momenta.
const float* channel(const Step& s, int64_t lane, int64_t tensor, int64_t c) {
    const int64_t n = s.entries[tensor];
    if (c == 0) return s.grads[tensor] + lane * n;
    if (c == 1) return s.params[tensor] + lane * n;
    return s.m_new[tensor] + (lane * s.decays + c - 2) * n;
}

float* scales(const Step& s, int64_t lane, int64_t tensor) {
    return s.scales + (lane * s.tensors + tensor) * s.widths[0];
}

// `momenta`, as torch.lerp has them.
void advance(const Step& s, int64_t lane, const Piece& piece) {
    const int64_t n = s.entries[piece.tensor];
    const float* g = s.grads[piece.tensor] + lane * n;
    for (int64_t i = 0; i < s.decays; i++) {
        const float d = s.decay[i], rest = 1.0f - d;
        const float* old = s.m_old[piece.tensor] + (lane * s.decays + i) * n;
        float* m = s.m_new[piece.tensor] + (lane * s.decays + i) * n;
        sweep(piece.end - piece.begin, [&](auto zero, int64_t offset) {
            using V = decltype(zero);
            const int64_t e = piece.begin + offset;
            const V x = load<V>(g + e), y = load<V>(old + e);
            store(m + e, d < 0.5f ? x + d * (y - x) : y - rest * (y - x));
        });
    }
}

float dot(const float* x, const float* y, int64_t n) {
    vec total = {};
    float remainder = 0;
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) total += load<vec>(x + i) * load<vec>(y + i);
    for (; i < n; i++) remainder += x[i] * y[i];
    return sum(total) + remainder;
}

// The network of one lane: its weights, the bias of its first layer with the inputs that all entries share.
struct Network {
    const Step& s;
    std::vector<const float*> weights, biases;
    std::vector<float> first;

    Network(const Step& s, int64_t lane) : s(s), weights(s.layers), biases(s.layers), first(s.widths[1]) {
        for (int64_t l = 0; l < s.layers; l++) {
            weights[l] = s.theta[2 * l] + lane * s.strides[2 * l];
            biases[l] = s.theta[2 * l + 1] + lane * s.strides[2 * l + 1];
        }
        std::copy_n(biases[0], first.size(), first.begin());
        for (int64_t k = 0; k < s.times; k++)
            for (size_t o = 0; o < first.size(); o++)
                first[o] += s.time[lane * s.times + k] * weights[0][(s.widths[0] + k) * first.size() + o];
        biases[0] = first.data();
    }
};

// How many sums over entries the gradient of theta needs: by layer the weights' and the bias's.
int64_t sums_for_theta(const Step& s) {
    int64_t sums = 0;
    for (int64_t l = 0; l < s.layers; l++) sums += (s.widths[l] + 1) * s.widths[l + 1];
    return sums;
}

// What a thread works in: activations of a block by layer, [width, BLOCK], each with a row of ones below it (the input
// that a bias is the weight of). For the derivative also the gradients of one layer and of the one below, and the
// sums for theta.
struct Scratch {
    std::vector<vec> memory;
    std::vector<float*> h;
    float *d, *d_below;
    vec* d_theta;

    Scratch(const Step& s, bool derivative) {
        const int64_t row = BLOCK / WIDTH, widest = *std::max_element(s.widths, s.widths + s.layers + 1);
        int64_t rows = derivative ? 2 * widest : 0;
        for (int64_t l = 0; l <= s.layers; l++) rows += s.widths[l] + 1;
        memory.resize(rows * row + (derivative ? sums_for_theta(s) : 0));
        vec* next = memory.data();
        const auto take = [&](int64_t count) {
            float* taken = reinterpret_cast<float*>(next);
            next += count * row;
            return taken;
        };
        for (int64_t l = 0; l <= s.layers; l++) {
            h.push_back(take(s.widths[l] + 1));
            std::fill_n(h[l] + s.widths[l] * BLOCK, BLOCK, 1.0f);
        }
        if (derivative) d = take(widest), d_below = take(widest);
        d_theta = next;
    }
};

void copy_padded(const float* from, int64_t n, float factor, float* to) {
    sweep(n, [&](auto zero, int64_t i) { store(to + i, load<decltype(zero)>(from + i) * factor); });
    std::fill(to + n, to + padded(n), 0.0f);
}

// Activations of the entries from `begin` on, n <= BLOCK of them; the last layer's are direction and magnitude.
void network(const Network& net, int64_t lane, int64_t tensor, int64_t begin, int64_t n, Scratch& work) {
    const Step& s = net.s;
    for (int64_t c = 0; c < s.widths[0]; c++)
        copy_padded(channel(s, lane, tensor, c) + begin, n, scales(s, lane, tensor)[c], work.h[0] + c * BLOCK);
    for (int64_t l = 0; l < s.layers; l++) {
        const float* bias = net.biases[l];
        const float floor = l + 1 < s.layers ? 0.0f : -std::numeric_limits<float>::infinity();  // ReLU, or none
        multiply<4, 3>(
            s.widths[l + 1], padded(n), s.widths[l], net.weights[l], 1, s.widths[l + 1], work.h[l], BLOCK,
            work.h[l + 1], BLOCK, [=](auto zero, int64_t o, int64_t) { return zero + bias[o]; },
            [=](auto y, int64_t, int64_t) { return y < floor ? decltype(y){} + floor : y; });
    }
}

// `update = -step_mult * o0 * exp(exp_mult * o1)`; the factor of o0 is left in o1's place.
void outputs(const Step& s, int64_t n, Scratch& work) {
    float *direction = work.h[s.layers], *magnitude = direction + BLOCK;
    for (int64_t e = 0; e < n; e += WIDTH) {
        const vec factor = exp(load<vec>(magnitude + e) * s.exp_mult) * -s.step_mult;
        store(magnitude + e, factor);
        store(direction + e, load<vec>(direction + e) * factor);
    }
}

template <class F> void blocks(const Piece& piece, F f) {
    for (int64_t begin = piece.begin; begin < piece.end; begin += BLOCK)
        f(begin, std::min(BLOCK, piece.end - begin));
}

constexpr int64_t PIECE = 16 * BLOCK;  // most entries of a piece

// The pieces of a lane, and groups of them, [groups[i], groups[i + 1]), of about as many entries as one piece may have.
struct Plan {
    std::vector<Piece> pieces;
    std::vector<int64_t> groups{0};

    explicit Plan(const Step& s) {
        int64_t filled = 0;
        for (int64_t t = 0; t < s.tensors; t++)
            for (int64_t begin = 0; begin < s.entries[t]; begin += PIECE) {
                const int64_t end = std::min(begin + PIECE, s.entries[t]);
                if (filled + end - begin > PIECE) groups.push_back(pieces.size()), filled = 0;
                filled += end - begin;
                pieces.push_back({t, begin, end});
            }
        groups.push_back(pieces.size());
    }
    int64_t count() const { return pieces.size(); }
    int64_t group_count() const { return groups.size() - 1; }
};

// f(lane, tensor, c, total): for each channel of each tensor, the total of what its pieces have in [lanes, pieces, channels].
template <class F> void totals(const Step& s, const Plan& plan, int64_t lane, const float* parts, F f) {
    const int64_t channels = s.widths[0];
    std::vector<double> sums(s.tensors * channels);
    for (int64_t i = 0; i < plan.count(); i++)
        for (int64_t c = 0; c < channels; c++)
            sums[plan.pieces[i].tensor * channels + c] += parts[(lane * plan.count() + i) * channels + c];
    for (int64_t t = 0; t < s.tensors; t++)
        for (int64_t c = 0; c < channels; c++) f(t, c, float(sums[t * channels + c]));
}

// First pass over a piece: momenta, and the sums of squares of its channels.
void look(const Step& s, int64_t lane, const Piece& piece, float* sums) {
    advance(s, lane, piece);
    for (int64_t c = 0; c < s.widths[0]; c++) {
        const float* x = channel(s, lane, piece.tensor, c) + piece.begin;
        sums[c] = dot(x, x, piece.end - piece.begin);
    }
}

// `second_moment_scale` of every channel of a lane.
void set_scales(const Step& s, const Plan& plan, int64_t lane, const float* sums) {
    totals(s, plan, lane, sums, [&](int64_t t, int64_t c, float total) {
        scales(s, lane, t)[c] = 1.0f / std::sqrt(s.eps + total / float(std::max<int64_t>(s.entries[t], 1)));
    });
}

// Second pass.
void apply(const Step& s, int64_t lane, const Piece& piece, Scratch& work) {
    const Network net(s, lane);
    blocks(piece, [&](int64_t begin, int64_t n) {
        network(net, lane, piece.tensor, begin, n, work);
        outputs(s, n, work);
        std::copy_n(work.h[s.layers], n, s.updates[piece.tensor] + lane * s.entries[piece.tensor] + begin);
    });
}
}  // namespace
