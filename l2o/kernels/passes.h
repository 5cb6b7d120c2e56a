// What passes over the elements of tensors do with a piece of one tensor of one lane, and with a lane: sums of squares of
// channels, the network over channels.
#pragma once

#include "heads.h"
#include "pieces.h"

namespace {

constexpr int STRIP = 3;  // vectors of elements that go through all layers together

template <class F> float square_sum(int64_t n, F x) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) total += x(i) * x(i);
    return total;
}

float square_sum(const float* x, int64_t n) {
    return square_sum(n, [=](int64_t i) { return x[i]; });
}

float table_sum(const Tensor& f, const Tables& tables, int64_t group, int64_t d) {
    const auto [x, is_left] = tables.table(f, group, d);
    const int64_t size = is_left ? lefts(f) : rights(f);
    double total = 0;
    for (int64_t i = 0; i < size; i += BLOCK) total += square_sum(x + i, std::min(BLOCK, size - i));
    return float(total * double(f.axes[is_left ? 3 : 1]));
}

// A piece, to be cut into blocks.
Block block_of(const Call& w, const Piece& piece, const Tables& tables, int64_t lane) {
    return {w, w.all[piece.tensor], tables, lane, piece.begin, 0};
}

// First pass over a piece.  sums: [groups, channels], zeros at first.
void look(const Call& w, const Needs& needs, const Piece& piece, const Block& all, Scratch& work, float* sums) {
    blocks(all.f, piece, [&](int64_t begin, int64_t n) {
        const Block block{w, all.f, all.tables, all.lane, begin, n};
        block.prepare(needs.seconds, needs.factors, work);
        every_channel(w, [&](int64_t group, int64_t d, int64_t c) {
            if (by_table(all.f, group)) return;
            float* sum = &sums[c];
            const auto add = [&](auto value) { *sum += square_sum(n, value); };
            if (piece.groups == 1 && block.as_function(group, d, work, add)) return;
            block.channel(group, d, 1.0f, work, work.h[0]);
            groups(all.f, begin, n, [&](int64_t at, int64_t from, int64_t count) {
                sums[(at - piece.first_group) * w.widths[0] + c] += square_sum(work.h[0] + from, count);
            });
        });
    });
}

void set_sums(const Call& w, const Plan& plan, const AllTables& tables, int64_t lane, const float* parts) {
    for (int64_t t = 0, p = 0; t < w.tensors; t++) {
        const Tensor& f = w.all[t];
        const int64_t width = w.widths[0], count = f.entries ? f.entries / f.inner : 0;
        std::vector<double> sums(count * width);
        for (; p < plan.count() && plan.pieces[p].tensor == t; p++) {
            const Piece& piece = plan.pieces[p];
            for (int64_t i = 0; i < piece.groups * width; i++)
                sums[piece.first_group * width + i] += parts[piece.slot * width + i];
        }
        float* to = f.sums + lane * width * count;
        every_channel(w, [&](int64_t group, int64_t d, int64_t c) {
            if (f.entries && by_table(f, group)) {
                to[c] = table_sum(f, tables.of(lane, t), group, d);
                return;
            }
            for (int64_t g = 0; g < count; g++) to[c * count + g] = float(sums[g * width + c]);
        });
    }
}

float scale(const Call& w, const Tensor& f, float total) {
    return inverse_root(w.scale_eps + total / float(f.count));
}

// A weight or bias of one tensor's network in one lane.
const float* weight(const Call& w, int64_t lane, int64_t tensor, int64_t k) {
    return w.weights[k] + lane * w.lane_strides[k] + tensor * w.net_strides[k];
}

// See `Tables`.
void make_starts(const Call& w, const Tables& tables, int64_t lane, int64_t tensor) {
    const Tensor& f = w.all[tensor];
    const int64_t units = w.widths[1], sizes[] = {rights(f), lefts(f)};
    const float *first = weight(w, lane, tensor, 0), *bias = weight(w, lane, tensor, 1);
    std::fill_n(tables.left_start, units * sizes[true], 0.0f);
    for (int64_t o = 0; o < units; o++) std::fill_n(tables.right_start + o * sizes[false], sizes[false], bias[o]);
    float* next = tables.weights;
    every_channel(w, [&](int64_t group, int64_t d, int64_t c) {
        if (!by_table(f, group)) {
            next = std::copy_n(first + c * units, units, next);
            return;
        }
        const auto [x, is_left] = tables.table(f, group, d);
        const float s = scale(w, f, f.sums[lane * w.widths[0] + c]), *from = x;
        for (int64_t o = 0, n = sizes[is_left]; o < units; o++) {
            float* to = (is_left ? tables.left_start : tables.right_start) + o * n;
            const float factor = s * first[c * units + o];
            each(n, [=](int64_t i) { to[i] += factor * from[i]; });
        }
    });
}

// The channels of a block, each over its root mean square, and how many they are; without those that `make_starts` has,
// whose part of the first layer is left in work.h[1] where a block has several rows.
int64_t features(const Call& w, const Needs& needs, const Block& block, Scratch& work) {
    const Tensor& f = block.f;
    const int64_t count = f.entries / f.inner;
    const float* sums = f.sums + block.lane * w.widths[0] * count;
    float* to = work.h[0];
    block.prepare(needs.seconds, needs.factors, work);
    every_channel(w, [&](int64_t group, int64_t d, int64_t c) {
        if (by_table(f, group)) return;
        block.channel(group, d, count == 1 ? scale(w, f, sums[c]) : 1.0f, work, to);
        if (count > 1)
            groups(f, block.begin, block.n, [&](int64_t at, int64_t from, int64_t size) {
                const float s = scale(w, f, sums[c * count + at]);
                each(size, [=](int64_t i) { to[from + i] *= s; });
            });
        to += STRIDE;
    });
    for (int64_t o = 0; needs.starts(f) && !block.in_one_row(work) && o < w.widths[1]; o++)
        block.spread(work, block.tables.left_start + o * lefts(f), block.tables.right_start + o * rights(f),
                     work.h[1] + o * STRIDE, [](float l, float r) { return l + r; });
    return (to - work.h[0]) / STRIDE;
}

constexpr float NOTHING = 0;

// What the first layer begins with: left[o * left_step] + right[o * right_step + e].
struct Start {
    const float *left, *right;
    int64_t left_step, right_step;

    Start(const Block& block, const Scratch& work) : left(&NOTHING), right(work.h[1]), left_step(0), right_step(STRIDE) {
        if (!block.in_one_row(work)) return;
        left = block.tables.left_start + work.runs[0].left, right = block.tables.right_start + work.runs[0].right;
        left_step = lefts(block.f), right_step = rights(block.f);
    }

    template <class V> V of(V, int64_t o, int64_t e) const { return load<V>(right + o * right_step + e) + left[o * left_step]; }
};

// The layers, from the `channels` in work.h[0] on, for `n` elements from `at` on: so few that all their activations stay
// in the nearest cache.
void layers(const Call& w, const Block& block, int64_t tensor, int64_t channels, bool starts, int64_t at, int64_t n,
            Scratch& work) {
    const bool relu = w.activation == 0;
    for (int64_t l = 0; l < w.layers; l++) {
        const bool first = starts && l == 0;
        const Start start(block, work);
        const float* bias = weight(w, block.lane, tensor, 2 * l + 1);
        const float* weights = first ? block.tables.weights : weight(w, block.lane, tensor, 2 * l);
        const bool hidden = l + 1 < w.layers;
        const float floor = relu && hidden ? 0.0f : -std::numeric_limits<float>::infinity();
        const auto multiplied = [&](auto begin) {
            multiply<8, STRIP>(
                w.widths[l + 1], n, l ? w.widths[l] : channels, weights, 1, w.widths[l + 1], work.h[l] + at, STRIDE,
                work.h[l + 1] + at, STRIDE, begin,
                [=](auto y, int64_t, int64_t) { return y < floor ? decltype(y){} + floor : y; });
        };
        if (first) multiplied([=](auto zero, int64_t o, int64_t e) { return start.of(zero, o, at + e); });
        else multiplied([=](auto zero, int64_t o, int64_t) { return zero + bias[o]; });
        for (int64_t o = 0; hidden && !relu && o < w.widths[l + 1]; o++)
            for (float *x = work.h[l + 1] + o * STRIDE + at, *end = x + n; x < end; x += WIDTH)
                store(x, tanh(load<vec>(x)));
    }
}

void network(const Call& w, const Block& block, int64_t tensor, int64_t channels, bool starts, Scratch& work) {
    const int64_t n = padded(block.n), strip = STRIP * WIDTH;
    for (int64_t at = 0; at < n; at += strip)
        layers(w, block, tensor, channels, starts, at, std::min(strip, n - at), work);
}

float plain_sum(const float* x, int64_t n) {
    vec total = {};
    float rest = 0;
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) total += load<vec>(x + i);
    for (; i < n; i++) rest += x[i];
    return sum(total) + rest;
}

// Second pass over a piece.  sums: of the outputs, or null.
void apply(const Call& w, const Needs& needs, const Piece& piece, const Block& all, Scratch& work, float* sums) {
    const int64_t at = all.lane * w.tensors + piece.tensor, outputs = w.widths[w.layers];
    const float* means = w.means ? w.means + at * outputs : nullptr;
    blocks(all.f, piece, [&](int64_t begin, int64_t n) {
        const Block block{w, all.f, all.tables, all.lane, begin, n};
        const int64_t channels = features(w, needs, block, work);
        network(w, block, piece.tensor, channels, needs.starts(all.f), work);
        float* out = work.h[w.layers];
        for (int64_t o = 0; sums && o < outputs; o++) sums[o] += plain_sum(out + o * STRIDE, n);
        if (w.head == 0) return;
        w.head == 1 ? product(w, w.gains[at], n, out) : nominal(block, means, w.gains[at], work, out);
        std::copy_n(out, n, all.f.update + all.lane * all.f.entries + begin);
    });
}
}  // namespace
