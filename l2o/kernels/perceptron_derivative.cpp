// The derivative of losses and gradients of perceptrons, one in each lane.
#include "perceptron_derivative.h"

#include <new>

#include <omp.h>

namespace {

void derivative(const Perceptron& p, const Cotangents& v) {
    std::vector<Changes> scratch;
    for (int64_t i = 0; i < p.threads; i++) scratch.emplace_back(p);
#pragma omp parallel for schedule(dynamic) num_threads(p.threads)
    for (int64_t lane = 0; lane < p.lanes; lane++)
        derive(p, v, lane, p.x + lane * p.batch * p.widths[0], p.y + lane * p.batch, scratch[omp_get_thread_num()]);
}
}  // namespace

// 1: no memory to work in. Labels were looked at when the gradient was taken.
extern "C" int l2o_perceptron_derivative(const Perceptron* p, const Cotangents* v) {
    try {
        derivative(*p, *v);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
