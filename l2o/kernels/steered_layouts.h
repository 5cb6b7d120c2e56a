// Where fields of the structures of steered.h and whitened.h are, to be compared with their mirrors in Python.
#pragma once

#include "eigenbasis.h"
#include "layout.h"
#include "steered.h"
#include "whitened.h"

extern "C" void l2o_layout_Follow(int64_t* out) {
    layout(out, &Follow::matrices, &Follow::rows, &Follow::cols, &Follow::carried, &Follow::left, &Follow::right,
           &Follow::row_basis, &Follow::column_basis, &Follow::m, &Follow::v);
}

extern "C" void l2o_layout_Weigh(int64_t* out) {
    layout(out, &Weigh::matrices, &Weigh::entries, &Weigh::momentum, &Weigh::memory, &Weigh::cautious,
           &Weigh::least, &Weigh::seen, &Weigh::m, &Weigh::v, &Weigh::scaled);
}

extern "C" void l2o_layout_Settle(int64_t* out) {
    layout(out, &Settle::matrices, &Settle::entries, &Settle::sized, &Settle::power,
           &Settle::direction, &Settle::grad, &Settle::d);
}

extern "C" void l2o_layout_Tensor(int64_t* out) {
    using T = Tensor;
    layout(out, &T::path, &T::rows, &T::cols, &T::grad, &T::param, &T::m, &T::d, &T::v, &T::row, &T::col, &T::count,
           &T::left, &T::right, &T::row_basis, &T::column_basis, &T::free, &T::own, &T::near, &T::far,
           &T::factor, &T::is_matrix, &T::sized, &T::fan,
           &T::entries, &T::table, &T::rare, &T::width, &T::columns_in, &T::rows_in, &T::before, &T::after, &T::near_new,
           &T::far_new, &T::momenta, &T::keep, &T::rate, &T::scale, &T::sums);
}

extern "C" void l2o_layout_Lanes(int64_t* out) {
    layout(out, &Lanes::lanes, &Lanes::threads, &Lanes::moves, &Lanes::step);
}

extern "C" void l2o_layout_Step(int64_t* out) {
    using S = Step;
    layout(out, &S::tensors, &S::threads, &S::looked, &S::momentum, &S::fresh1, &S::fresh2, &S::memory, &S::cautious,
           &S::by_signal, &S::due, &S::carried, &S::step, &S::total, &S::limit, &S::log_lr, &S::warmup, &S::decays,
           &S::fall, &S::haste, &S::matrix, &S::fan_in, &S::relative, &S::by_gain, &S::longer, &S::deep, &S::gain,
           &S::slope, &S::band_up, &S::band_down, &S::fast, &S::slow, &S::sure, &S::range, &S::leak, &S::own, &S::more,
           &S::log_step, &S::fast_mean, &S::slow_mean, &S::square_mean, &S::missing, &S::long_mean, &S::w0,
           &S::b0, &S::w1, &S::b1, &S::tensor);
}
