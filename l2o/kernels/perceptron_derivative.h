// The derivative of losses and gradients of perceptrons: Hessians times directions, by the R operator of Pearlmutter
// 1994, "Fast exact multiplication by the Hessian", over the two passes of perceptron.h. With R{f} the change of f along
// V, the cotangents of a lane's gradient, the gradient of <V, gradient> is R{gradient}. A pass forward finds R{h}; the
// one backward carries R{d} + u d, u the cotangent of the loss, so that u times the gradient comes along for nothing.
#pragma once

#include "perceptron.h"

extern "C" {
// What comes in by losses and gradients. Of the perceptron that goes with it, `grads` are what goes out: by parameters.
struct Cotangents {
    const float* losses;        // [lanes]
    const float* const* grads;  // as the perceptron's
};
void l2o_layout_Cotangents(int64_t* out) {
    layout(out, &Cotangents::losses, &Cotangents::grads);
}
}

namespace {

// What a thread works in besides: by layer R{h}, null for the images, which do not change; R{d} + u d of one layer and
// of the one below.
struct Changes : Layers {
    std::vector<float*> rh;
    float *e, *e_below;

    explicit Changes(const Perceptron& p)
        : Layers(p), rh(by_layer(p)), e(of_any_layer(p)), e_below(of_any_layer(p)) {
        bend = by_layer(p);
    }
};

// What c has there, to go on adding to it; rows are ldc apart.
auto before(const float* c, int64_t ldc) {
    return [=](auto zero, int64_t m, int64_t n) { return load<decltype(zero)>(c + m * ldc + n); };
}

// From R{h} of layer l to that of the next, after `forward`, which has left the transposed weight. If that layer is
// hidden, `bend` becomes R{slope}.
void forward_change(const Perceptron& p, const Cotangents& v, int64_t lane, int64_t l, Changes& work) {
    const int64_t in = p.widths[l], row = padded(p.widths[l + 1]), lda = l ? padded(in) : in;
    float* rz = work.rh[l + 1];
    if (l) multiply<6, 2>(p.batch, row, in, work.rh[l], lda, 1, work.transposed, row, rz, row, zero, same);
    const float* bias = transpose(p, v.grads, l, lane, 0.0f, work);
    const float* sum = l ? rz : nullptr;
    multiply<6, 2>(
        p.batch, row, in, work.h[l], lda, 1, work.transposed, row, rz, row,
        [=](auto zero, int64_t e, int64_t o) {
            using V = decltype(zero);
            return load<V>(bias + o) + (sum ? load<V>(sum + e * row + o) : zero);
        },
        same);
    if (l + 1 == p.layers) return;
    for (int64_t i = 0; i < p.batch * row; i += WIDTH) {
        const vec change = load<vec>(rz + i);
        store(work.bend[l + 1] + i, load<vec>(work.bend[l + 1] + i) * change);
        store(rz + i, load<vec>(work.slope[l + 1] + i) * change);
    }
}

// Of the logits, after `cross_entropy`: work.e from work.d and R{logits}, u the cotangent of the loss.
void cross_entropy_change(const Perceptron& p, const int64_t* y, float u, Changes& work) {
    const int64_t row = padded(p.widths[p.layers]);
    const float share = 1.0f / float(p.batch);
    for (int64_t b = 0; b < p.batch; b++) {
        const float* rz = work.rh[p.layers] + b * row;
        float *d = work.d + b * row, *e = work.e + b * row;
        d[y[b]] += share;  // the probabilities over the batch
        vec sums = {};
        for (int64_t o = 0; o < row; o += WIDTH) sums += load<vec>(d + o) * load<vec>(rz + o);
        const float rest = u - sum(sums) / share;
        for (int64_t o = 0; o < row; o += WIDTH) store(e + o, load<vec>(d + o) * (load<vec>(rz + o) + rest));
        d[y[b]] -= share;
        e[y[b]] -= u * share;
    }
}

void backward_change(const Perceptron& p, const Cotangents& v, int64_t lane, Changes& work) {
    for (int64_t l = p.layers - 1; l >= 0; l--) {
        const int64_t in = p.widths[l], out = p.widths[l + 1], row = padded(out), below = padded(in), n = out * in;
        const float *weight = p.params[2 * l] + lane * n, *direction = v.grads[2 * l] + lane * n;
        float* result = p.grads[2 * l] + lane * n;
        multiply<6, 2>(out, in, p.batch, work.e, 1, row, work.h[l], l ? below : in, result, in, zero, same);
        add_up(p.batch, row, work.e, out, p.grads[2 * l + 1] + lane * out);
        if (l == 0) return;
        multiply<6, 2>(
            out, in, p.batch, work.d, 1, row, work.rh[l], below, result, in, before(result, in), same);
        float *d = work.d_below, *e = work.e_below;
        const float *slope = work.slope[l], *change = work.bend[l];
        multiply<6, 2>(p.batch, in, out, work.d, row, 1, direction, in, e, below, zero, same);
        multiply<6, 2>(p.batch, in, out, work.d, row, 1, weight, in, d, below, zero, same);
        multiply<6, 2>(
            p.batch, in, out, work.e, row, 1, weight, in, e, below, before(e, below),
            [=](auto y, int64_t b, int64_t i) {
                using V = decltype(y);
                const int64_t at = b * below + i;
                const V by_h = load<V>(d + at), factor = load<V>(slope + at);
                store(d + at, by_h * factor);
                return y * factor + by_h * load<V>(change + at);
            });
        std::swap(work.d, work.d_below);
        std::swap(work.e, work.e_below);
    }
}

// Into p.grads.  x: [batch, widths[0]].    y: [batch].
void derive(const Perceptron& p, const Cotangents& v, int64_t lane, const float* x, const int64_t* y, Changes& work) {
    work.h[0] = const_cast<float*>(x);
    for (int64_t l = 0; l < p.layers; l++) {
        forward(p, lane, l, work);
        forward_change(p, v, lane, l, work);
    }
    cross_entropy(p, y, work);
    cross_entropy_change(p, y, v.losses[lane], work);
    backward_change(p, v, lane, work);
}
}  // namespace
