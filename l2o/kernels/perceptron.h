// Losses and gradients of perceptrons with cross-entropy: `loss` of l2o.tasks.ImageMLP and its gradient, lane by lane.
// Arrays are [batch, units] inside, rows padded to whole vectors.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "vector.h"

extern "C" {
// Mirrored field by field in perceptron.py. Parameters and gradients by layer: weight [lanes, out, in], bias [lanes, out].
struct Perceptron {
    int64_t lanes, batch, layers, activation, threads;  // activation: 0 ReLU, 1 tanh, 2 GELU
    const int64_t* widths;                              // [layers + 1]
    const float* x;                                     // [lanes, batch, widths[0]]
    const int64_t* y;                                   // [lanes, batch]
    const float* const* params;
    float* const* grads;
    float* losses;  // [lanes]
};
void l2o_layout_Perceptron(int64_t* out) {
    layout(out, &Perceptron::lanes, &Perceptron::batch, &Perceptron::layers, &Perceptron::activation,
           &Perceptron::threads, &Perceptron::widths, &Perceptron::x, &Perceptron::y, &Perceptron::params,
           &Perceptron::grads, &Perceptron::losses);
}
}

namespace {

// What a thread works in. By layer from 1: its activations h and, if hidden, their derivatives by what came in; of one
// layer the transposed weight with the bias below it, and gradients of one layer and of the one below. Where second
// derivatives are wanted there are also those of the activations, else null.
struct Layers {
    std::vector<std::vector<vec>> memory;
    std::vector<float*> h, slope, bend;
    float *transposed, *d, *d_below;

    explicit Layers(const Perceptron& p)
        : h(by_layer(p)), slope(by_layer(p)), bend(p.layers + 1), d(of_any_layer(p)), d_below(of_any_layer(p)) {
        int64_t weights = 0;
        for (int64_t l = 0; l < p.layers; l++)
            weights = std::max(weights, (p.widths[l] + 1) * padded(p.widths[l + 1]));
        transposed = take(weights);
    }

    float* take(int64_t n) { return reinterpret_cast<float*>(memory.emplace_back(n / WIDTH).data()); }

    std::vector<float*> by_layer(const Perceptron& p) {
        std::vector<float*> arrays{nullptr};  // of the images themselves
        for (int64_t l = 1; l <= p.layers; l++) arrays.push_back(take(p.batch * padded(p.widths[l])));
        return arrays;
    }

    float* of_any_layer(const Perceptron& p) {
        return take(p.batch * padded(*std::max_element(p.widths + 1, p.widths + p.layers + 1)));
    }
};

// Turns n inputs into activations, and leaves their derivatives beside them, where `bend` is not null the second ones
// too; n is a multiple of WIDTH.
void activate(int64_t activation, int64_t n, float* h, float* slope, float* bend) {
    for (int64_t i = 0; i < n; i += WIDTH) {
        const vec z = load<vec>(h + i);
        if (activation == 0) {
            store(h + i, z < 0 ? vec{} : z);
            store(slope + i, z > 0 ? vec{} + 1.0f : vec{});
            if (bend) store(bend + i, vec{});
        } else if (activation == 1) {
            const vec y = tanh(z);
            store(h + i, y);
            store(slope + i, 1.0f - y * y);
            if (bend) store(bend + i, y * (y * y - 1.0f) * 2.0f);
        } else {  // z Phi(z), Phi the normal distribution's
            vec phi;
            for (int j = 0; j < WIDTH; j++) phi[j] = 0.5f * (1.0f + std::erf(z[j] * 0.707106781f));
            const vec density = exp(z * z * -0.5f) * 0.398942280f;
            store(h + i, z * phi);
            store(slope + i, phi + z * density);
            if (bend) store(bend + i, (2.0f - z * z) * density);
        }
    }
}

// Of products: to begin with nothing, and to leave them as they are.
const auto zero = [](auto zero, int64_t, int64_t) { return zero; };
const auto same = [](auto y, int64_t, int64_t) { return y; };

// Layer l's weight and bias, of `params` or of what is laid out like them, into work.transposed: rows padded with
// zeros, the last one, the bias, with `rest`. Returns the bias.
const float* transpose(const Perceptron& p, const float* const* params, int64_t l, int64_t lane, float rest, Layers& work) {
    const int64_t in = p.widths[l], out = p.widths[l + 1], row = padded(out);
    const float *weight = params[2 * l] + lane * out * in, *bias = params[2 * l + 1] + lane * out;
    for (int64_t i = 0; i < in; i++) {
        for (int64_t o = 0; o < out; o++) work.transposed[i * row + o] = weight[o * in + i];
        std::fill(work.transposed + i * row + out, work.transposed + (i + 1) * row, 0.0f);
    }
    float* last = work.transposed + in * row;
    std::fill(std::copy_n(bias, out, last), last + row, rest);
    return last;
}

// From the activations of layer l to those of the next.
void forward(const Perceptron& p, int64_t lane, int64_t l, Layers& work) {
    const int64_t in = p.widths[l], row = padded(p.widths[l + 1]);
    const float* bias = transpose(p, p.params, l, lane, -std::numeric_limits<float>::infinity(), work);
    multiply<6, 2>(
        p.batch, row, in, work.h[l], l ? padded(in) : in, 1, work.transposed, row, work.h[l + 1], row,
        [=](auto zero, int64_t, int64_t o) { return load<decltype(zero)>(bias + o); },
        same);
    if (l + 1 < p.layers)
        activate(p.activation, p.batch * row, work.h[l + 1], work.slope[l + 1], work.bend[l + 1]);
}

// The mean cross-entropy of a lane, and in work.d its gradient by the logits.  y: [batch].
float cross_entropy(const Perceptron& p, const int64_t* y, Layers& work) {
    const int64_t classes = p.widths[p.layers], row = padded(classes);
    const float share = 1.0f / float(p.batch);
    double total = 0;
    for (int64_t e = 0; e < p.batch; e++) {
        const float* logits = work.h[p.layers] + e * row;  // those of the padding are -inf
        float* d = work.d + e * row;
        vec most = load<vec>(logits), sums = {};
        for (int64_t o = WIDTH; o < row; o += WIDTH) most = load<vec>(logits + o) > most ? load<vec>(logits + o) : most;
        const float shift = largest(most);
        for (int64_t o = 0; o < row; o += WIDTH) {
            const vec y = exp(load<vec>(logits + o) - shift);
            store(d + o, y);
            sums += y;
        }
        const float all = sum(sums), factor = share / all;
        for (int64_t o = 0; o < row; o += WIDTH) store(d + o, load<vec>(d + o) * factor);
        const int64_t label = y[e];
        d[label] -= share;
        total += std::log(all) - (logits[label] - shift);
    }
    return float(total * share);
}

// The sums of the first n columns of [rows, row].
void add_up(int64_t rows, int64_t row, const float* x, int64_t n, float* sums) {
    for (int64_t o = 0; o < n; o += WIDTH) {
        vec total = {};
        for (int64_t e = 0; e < rows; e++) total += load<vec>(x + e * row + o);
        std::memcpy(sums + o, &total, std::min<int64_t>(WIDTH, n - o) * sizeof(float));
    }
}

void backward(const Perceptron& p, int64_t lane, Layers& work) {
    for (int64_t l = p.layers - 1; l >= 0; l--) {
        const int64_t in = p.widths[l], out = p.widths[l + 1], row = padded(out), below = padded(in);
        const float* weight = p.params[2 * l] + lane * out * in;
        float* grad = p.grads[2 * l] + lane * out * in;
        multiply<6, 2>(out, in, p.batch, work.d, 1, row, work.h[l], l ? below : in, grad, in, zero, same);
        add_up(p.batch, row, work.d, out, p.grads[2 * l + 1] + lane * out);
        if (l == 0) return;
        const float* slope = work.slope[l];
        multiply<6, 2>(
            p.batch, in, out, work.d, row, 1, weight, in, work.d_below, below, zero,
            [=](auto y, int64_t e, int64_t i) { return y * load<decltype(y)>(slope + e * below + i); });
        std::swap(work.d, work.d_below);
    }
}

// The loss of a lane and, in p.grads, its gradient.  x: [batch, widths[0]].
float differentiate(const Perceptron& p, int64_t lane, const float* x, const int64_t* y, Layers& work) {
    work.h[0] = const_cast<float*>(x);
    for (int64_t l = 0; l < p.layers; l++) forward(p, lane, l, work);
    const float loss = cross_entropy(p, y, work);
    backward(p, lane, work);
    return loss;
}

bool are_classes(const Perceptron& p, const int64_t* labels, int64_t n) {
    return std::all_of(labels, labels + n, [&](int64_t y) { return 0 <= y && y < p.widths[p.layers]; });
}
}  // namespace
