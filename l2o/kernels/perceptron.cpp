// Losses and gradients of perceptrons with cross-entropy, one in each lane.
#include "perceptron.h"

#include <new>

#include <omp.h>

namespace {

void gradient(const Perceptron& p) {
    std::vector<Layers> scratch;
    for (int64_t i = 0; i < p.threads; i++) scratch.emplace_back(p);
#pragma omp parallel for schedule(dynamic) num_threads(p.threads)
    for (int64_t lane = 0; lane < p.lanes; lane++)
        p.losses[lane] = differentiate(
            p, lane, p.x + lane * p.batch * p.widths[0], p.y + lane * p.batch, scratch[omp_get_thread_num()]);
}
}  // namespace

// 1: no memory to work in.  2: a label is no class.
extern "C" int l2o_perceptron_gradient(const Perceptron* p) {
    if (!are_classes(*p, p->y, p->lanes * p->batch)) return 2;
    try {
        gradient(*p);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
