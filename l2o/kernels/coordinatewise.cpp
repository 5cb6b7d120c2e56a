#if defined(__AVX512F__)
#pragma GCC target("prefer-vector-width=512")  // compilers would rather take half of it
#endif
// Passes over the elements of tensors: moments of their gradients, sums of squares of their channels, the network over
// their channels.
//
// Work is cut into pieces of one tensor of one lane, the same whatever the number of threads, and sums over pieces are
// taken in their order: results do not depend on threads.
#include "moments.h"
#include "passes.h"

#include <new>

namespace {

void feature_sums(const Call& w) {
    const Plan plan(w);
    const Needs needs(w);
    const AllTables tables(w, needs.tables);
    const int64_t width = w.widths[0];
    std::unique_ptr<float[]> parts(new float[w.lanes * plan.slots * width]());
    phases(
        w, w.tensors, plan.count(), [&](int64_t lane, int64_t t) { tables.make(lane, t); },
        [&](int64_t lane, int64_t i, Scratch& work) {
            const Piece& piece = plan.pieces[i];
            const Tables own = tables.of(lane, piece.tensor);
            look(w, needs, piece, block_of(w, piece, own, lane), work, &parts[(lane * plan.slots + piece.slot) * width]);
        },
        [&](int64_t lane) { set_sums(w, plan, tables, lane, &parts[lane * plan.slots * width]); });
}

void set_output_sums(const Call& w, const Plan& plan, int64_t lane, const float* parts) {
    const int64_t outputs = w.widths[w.layers];
    std::vector<double> sums(w.tensors * outputs);
    for (int64_t p = 0; p < plan.count(); p++)
        for (int64_t o = 0; o < outputs; o++) sums[plan.pieces[p].tensor * outputs + o] += parts[p * outputs + o];
    std::copy(sums.begin(), sums.end(), w.output_sums + lane * w.tensors * outputs);
}

void coordinatewise(const Call& w) {
    const Plan plan(w);
    const Needs needs(w);
    const AllTables tables(w, needs.tables);
    const int64_t outputs = w.output_sums ? w.widths[w.layers] : 0;
    std::unique_ptr<float[]> parts(new float[w.lanes * plan.count() * outputs]());
    phases(
        w, w.tensors, plan.count(),
        [&](int64_t lane, int64_t t) {
            tables.make(lane, t);
            if (needs.starts(w.all[t])) make_starts(w, tables.of(lane, t), lane, t);
        },
        [&](int64_t lane, int64_t i, Scratch& work) {
            const Piece& piece = plan.pieces[i];
            const Tables own = tables.of(lane, piece.tensor);
            float* sums = outputs ? &parts[(lane * plan.count() + i) * outputs] : nullptr;
            apply(w, needs, piece, block_of(w, piece, own, lane), work, sums);
        },
        [&](int64_t lane) {
            if (outputs) set_output_sums(w, plan, lane, &parts[lane * plan.count() * outputs]);
        });
}

void moments(const Moments& w) {
    const Chunks chunks(w);
    const int64_t count = chunks.count();
    std::unique_ptr<float[]> parts(new float[w.lanes * chunks.sums]());
#pragma omp parallel for schedule(dynamic) num_threads(w.threads)
    for (int64_t i = 0; i < w.lanes * count; i++) {
        const Chunk& chunk = chunks.all[i % count];
        advance(w, i / count, chunk, &parts[i / count * chunks.sums + chunk.sums]);
    }
    for (int64_t lane = 0; lane < w.lanes; lane++) set_rows_and_columns(w, chunks, lane, &parts[lane * chunks.sums]);
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

extern "C" int l2o_feature_sums(const Work* work) {
    return guarded([&] { feature_sums(Call(*work)); });
}

extern "C" int l2o_coordinatewise(const Work* work) {
    return guarded([&] { coordinatewise(Call(*work)); });
}

extern "C" int l2o_moments(const Moments* work) {
    return guarded([&] { moments(*work); });
}
