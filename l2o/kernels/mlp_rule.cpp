// One update of l2o.rules.MLP for all lanes and tensors, and its derivative.
//
// Work is cut into pieces of one tensor of one lane, the same whatever the number of threads, and sums over pieces are
// taken in their order: results do not depend on threads.
#include "mlp_derivative.h"

#include <new>

#include <omp.h>

namespace {

// first(i, work) for the lane's items i < firsts, then middle(lane), then last(i, work) for i < lasts; items of lane l
// are counted from l * firsts and l * lasts. A thread takes whole lanes, whose data then stays in its cache and which
// need no waiting for each other, unless there are too few lanes to share them out evenly.
template <class First, class Middle, class Last>
void phases(const Step& s, bool derivative, int64_t firsts, int64_t lasts, First first, Middle middle, Last last) {
    std::vector<Scratch> scratch;
    for (int64_t i = 0; i < s.threads; i++) scratch.emplace_back(s, derivative);
    const bool whole_lanes = s.lanes % s.threads == 0 || s.lanes >= 4 * s.threads;
#pragma omp parallel num_threads(s.threads)
    {
        Scratch& work = scratch[omp_get_thread_num()];
        if (whole_lanes) {
#pragma omp for schedule(dynamic)
            for (int64_t lane = 0; lane < s.lanes; lane++) {
                for (int64_t i = lane * firsts; i < (lane + 1) * firsts; i++) first(i, work);
                middle(lane);
                for (int64_t i = lane * lasts; i < (lane + 1) * lasts; i++) last(i, work);
            }
        } else {
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < s.lanes * firsts; i++) first(i, work);
#pragma omp for
            for (int64_t lane = 0; lane < s.lanes; lane++) middle(lane);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < s.lanes * lasts; i++) last(i, work);
        }
    }
}

void update(const Step& s) {
    const Plan plan(s);
    const int64_t count = plan.count();
    std::vector<float> sums(s.lanes * count * s.widths[0]);
    phases(
        s, false, count, count,
        [&](int64_t i, Scratch&) { look(s, i / count, plan.pieces[i % count], &sums[i * s.widths[0]]); },
        [&](int64_t lane) { set_scales(s, plan, lane, sums.data()); },
        [&](int64_t i, Scratch& work) { apply(s, i / count, plan.pieces[i % count], work); });
}

void derivative(const Step& s, const Derivative& d) {
    const Plan plan(s);
    const int64_t count = plan.count(), groups = plan.group_count();
    Sums sums(s, plan);
    phases(
        s, true, groups, count,
        [&](int64_t i, Scratch& work) { derive_group(s, d, plan, i / groups, i % groups, sums, work); },
        [&](int64_t lane) { derive_lane(s, d, plan, lane, sums); },
        [&](int64_t i, Scratch&) { derive_piece(s, d, i / count, plan.pieces[i % count], sums); });
}

template <class F> int guarded(F f) {
    try {
        f();
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
}  // namespace

extern "C" int l2o_mlp_update(const Step* step) {
    return guarded([&] { update(*step); });
}

extern "C" int l2o_mlp_derivative(const Step* step, const Derivative* derivative_) {
    return guarded([&] { derivative(*step, *derivative_); });
}
