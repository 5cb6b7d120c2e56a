// How far tensors go in a step of l2o.rules.Steered: l2o.ops.alignment, schedules and scales, in double precision.
#pragma once

#include <algorithm>
#include <cmath>

#include "steered.h"

namespace {

// As in l2o.ops.alignment,
constexpr double FASTEST = 0.1, LEAST_START = 0.31622776601683794, VARIANCE = 1e-8, OF_HELD = 0.5;
// l2o.ops.schedules,
constexpr double SHORT = 150, SHORTEST = 1.0 / 3, FLOOR = 0.01;
// and l2o.ops.scales.
constexpr double FAN_IN = 64, LEAST_LIMIT = 3e-4, UNHELD = 1e30;
// Of l2o.ops.controller.
constexpr double NEAR = 5, FAR = 20, LONG = 100, UNIT = 4, LEAST_SIGNAL = 0.05, PACE = 0.1, RANGE = 1.5;
constexpr int OF_TENSOR = 8, OF_RUN = 8, HIDDEN = 16;

inline double within(double x, double least, double most) { return x < least ? least : x > most ? most : x; }

// What the controller keeps from step to step.
struct Shared {
    double log_step = 0, fast = 0, slow = 0, square = 0, missing = 0, longest = 0, more = 0;

    static Shared of(const Step& s) {
        return {*s.log_step, *s.fast_mean, *s.slow_mean, *s.square_mean, s.missing ? *s.missing : 0,
                s.w0 ? *s.long_mean : 0, s.more};
    }
    void keep(const Step& s) const {
        if (!s.log_step) return;
        for (int64_t i = 0; i < s.tensors; i++)
            if (const Tensor& t = s.tensor[i]; t.own) std::copy_n(t.sums, SUMS, t.own);
        for (int64_t i = 0; s.w0 && i < s.tensors; i++) {
            const Tensor& t = s.tensor[i];
            *t.near = t.near_new, *t.far = t.far_new, *t.factor = t.after;
        }
        *s.log_step = log_step, *s.fast_mean = fast, *s.slow_mean = slow, *s.square_mean = square;
        if (s.missing) *s.missing = missing;
        if (s.w0) *s.long_mean = longest;
    }
};

// See `begin`.
inline void begin(const Step& s, Shared& now) {
    if (!s.missing || now.missing <= 0) return;
    double matrices = 0;
    for (int64_t i = 0; i < s.tensors; i++) matrices += s.tensor[i].is_matrix;
    now.missing = 2 * std::log(within(s.deep / matrices, LEAST_START, 1));
}

// See `control`, of all tensors or of a single one.
inline void control(const Step& s, double cosine, bool single, double range, Shared& now) {
    if (s.step <= 0) return;
    const auto mean = [&](double& old, double x, double steps) {
        const double keep = std::exp(-1 / steps);
        old = x + keep * (old - x);
        return old / (1 - std::pow(keep, s.step));
    };
    const double fast = mean(now.fast, cosine, s.fast), slow = mean(now.slow, cosine, s.slow);
    const double square = mean(now.square, cosine * cosine, s.slow);
    const double deviation = std::sqrt(std::max(square - slow * slow, 0.0) + VARIANCE);
    const double off = 0.5 * (fast + slow), below = -slow / deviation;
    const double error = std::max(off - s.band_up, 0.0) - std::max(-off - s.band_down, 0.0);
    const double along = single ? within(-below, 0, 1) : 1;
    const double push = std::tanh(s.slope * error) * (error < 0 ? within(below - s.sure, 0, 1) : along);
    const double gain = std::min(s.gain / s.total, FASTEST) * std::max(1 - s.step / s.total, 0.0);
    const double stays = 1 - std::min(s.leak / s.total, FASTEST);
    now.log_step = within(stays * now.log_step + gain * (push + (single ? 0 : now.more)), -range, range);
    if (s.missing) now.missing = std::min(stays * now.missing + gain * within(-below - s.sure, 0, 1), 0.0);
}

// That of the step of all tensors, before the controller's part.
inline double scheduled(const Step& s) {
    double size = std::min((s.step + 1) / (s.warmup * s.total), 1.0);
    if (s.haste) size *= std::pow(within(s.total / SHORT, SHORTEST, 1), -s.haste);
    if (s.decays) size *= FLOOR + (1 - FLOOR) * std::pow(std::max(1 - s.step / s.total, 0.0), s.fall);
    return size;
}

inline double factor(const Step& s, const Tensor& t) {
    return t.width * (t.sized ? s.matrix * std::pow(t.fan / FAN_IN, -s.fan_in) : 1);
}

inline bool is_held(const Tensor& t) { return !(t.free && *t.free > 0); }

// Of the step before, see `own_factors` of l2o.ops.controller.
inline double own_factor(const Tensor& t) {
    return std::exp((t.own ? double(t.own[0]) : 0) + (t.factor ? double(*t.factor) : t.before));
}

// See `limited` and `lengthened`.  scale: of the direction of t.
inline double bounded(const Step& s, const Tensor& t, double scale) {
    const bool held = is_held(t);
    const double squares = held ? t.sums[3] : UNHELD, root = std::sqrt(t.fan);
    // Of what is no number as by l2o.ops.numeric.safe_sqrt.
    const double size = squares >= 0 ? std::sqrt(squares / t.entries) : 0;
    if (t.sized) {
        const double gain = s.by_gain && !t.table ? std::pow(std::min(size * root, 1.0), s.by_gain) : 1;
        const double least = LEAST_LIMIT * (s.by_gain ? std::sqrt(FAN_IN) / root : 1);
        const double over = scale / (s.relative * gain * size + least);
        scale /= std::sqrt(1 + over * over);
    }
    return t.rare ? scale * s.longer * (1 + (held ? std::min(size, 1.0) : 0)) : scale;
}

// The running mean over so many steps; the first gradient has no step before it.
inline double follow(const Step& s, double mean, double x, double steps) {
    return s.step > 0 ? x + std::exp(-1 / steps) * (mean - x) : mean;
}

// Perceptrons' inputs that all tensors share, times their weights, see `_of_run` of l2o.ops.controller.
inline void of_run(const Step& s, const Shared& now, double* hidden) {
    const double variance = std::max(now.square - now.slow * now.slow, 0.0), done = std::min(s.step / s.total, 1.0);
    const double x[OF_RUN] = {UNIT * now.fast, UNIT * now.slow, UNIT * now.longest, UNIT * std::sqrt(variance),
                              0.5 * now.log_step, done, 0.5 * std::log(s.total / 300), std::exp(-s.step / 20)};
    for (int j = 0; j < HIDDEN; j++) {
        hidden[j] = s.b0[j];
        for (int i = 0; i < OF_RUN; i++) hidden[j] += x[i] * s.w0[(OF_TENSOR + i) * HIDDEN + j];
    }
}

// See `decide` of l2o.ops.controller, of a perceptron: writes what is new of tensors, and returns the push of all.
inline double decide(const Step& s, const Shared& now) {
    double shared[HIDDEN], says = 0, all = 0;
    of_run(s, now, shared);
    for (int64_t i = 0; i < s.tensors; i++) {
        Tensor& t = s.tensor[i];
        t.before = *t.factor;
        const double norm = std::sqrt(t.sums[1]) * std::sqrt(t.sums[2]), cosine = norm > 0 ? t.sums[0] / norm : t.sums[0];
        t.near_new = follow(s, *t.near, cosine, NEAR), t.far_new = follow(s, *t.far, cosine, FAR);
        const double signal = t.sums[1] > 0 && t.momenta >= 0 ? std::sqrt(t.momenta / t.sums[1]) : 0;
        const double size = 0.25 * std::log((t.sums[3] >= 0 ? std::sqrt(t.sums[3] / t.entries) : 0) + 1e-5);
        const double x[OF_TENSOR] = {1 + std::log(std::max(signal, LEAST_SIGNAL)), size + 0.25 * std::log(8.0),
                                     t.columns_in, t.rows_in, t.is_matrix, UNIT * t.near_new, UNIT * t.far_new, t.before};
        double growth = s.b1[0], far = s.b1[1];
        for (int j = 0; j < HIDDEN; j++) {
            double h = shared[j];
            for (int k = 0; k < OF_TENSOR; k++) h += x[k] * s.w0[k * HIDDEN + j];
            h = std::tanh(h);
            growth += h * s.w1[2 * j], far += h * s.w1[2 * j + 1];
        }
        t.after = t.before + PACE * (RANGE * std::tanh(far / RANGE) - t.before);
        const double weight = factor(s, t) * own_factor(t) * norm;
        says += growth * weight, all += weight;
    }
    return std::tanh(all > 0 ? says / all : says);
}

// Writes the scale of each tensor, once its sums are known, and what the controller is to keep. Returns whether all is as
// usual: numbers that are finite in single precision, and gradients within the limit.
inline bool steer(const Step& s, Shared& now) {
    double dots = 0, norms = 0, gradients = 0, all = 0;
    for (int64_t i = 0; i < s.tensors; i++) {
        const Tensor& t = s.tensor[i];
        for (double x : t.sums) all += std::abs(float(x));
        all += std::abs(float(t.momenta));
        const double weight = factor(s, t) * own_factor(t);
        dots += weight * t.sums[0];
        norms += weight * std::sqrt(t.sums[1]) * std::sqrt(t.sums[2]);
        gradients += t.sums[1];
    }
    if (s.log_step) {
        now = Shared::of(s);
        const double cosine = norms > 0 ? dots / norms : dots;
        if (s.w0) {
            now.more = decide(s, now);
            now.longest = follow(s, now.longest, cosine, LONG);
        }
        begin(s, now);
        control(s, cosine, false, s.range, now);
    }
    const double size = scheduled(s) * std::exp(s.log_lr + now.log_step + now.missing);
    for (int64_t i = 0; i < s.tensors; i++) {
        Tensor& t = s.tensor[i];
        double step = size * factor(s, t);
        Shared own;
        if (t.own) {
            const double norm = std::sqrt(t.sums[1]) * std::sqrt(t.sums[2]);
            own = {t.own[0], t.own[1], t.own[2], t.own[3]};
            const double range = s.own * (t.is_matrix && is_held(t) ? OF_HELD : 1);
            control(s, norm > 0 ? t.sums[0] / norm : t.sums[0], true, range, own);
        }
        step *= std::exp(own.log_step + t.after);
        t.scale = -t.rate * bounded(s, t, step);
        const double kept[SUMS] = {own.log_step, own.fast, own.slow, own.square};
        std::copy_n(kept, SUMS, t.sums);
        all += std::abs(float(t.scale));
    }
    return std::isfinite(all) && std::isfinite(float(gradients)) && float(std::sqrt(gradients)) <= s.limit;
}
}  // namespace
