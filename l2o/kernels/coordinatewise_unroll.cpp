#if defined(__AVX512F__)
#pragma GCC target("prefer-vector-width=512")  // compilers would rather take half of it
#endif
// Whole unrolls of perceptrons that a rule with a network over channels trains. A thread takes whole lanes, step after
// step, so that a lane's parameters and moments stay in its cache; results do not depend on threads.
#include "moments.h"
#include "passes.h"
#include "unroll.h"

#include <new>

namespace {

float* writable(const float* x) { return const_cast<float*>(x); }

// The moments of each tensor, averaged in place, and the sums that rows and columns are averages of.
struct Averages {
    std::vector<std::unique_ptr<float[]>> left, right;  // [lanes, lefts] and [lanes, rights]
    std::vector<MomentAddresses> addresses;
    Moments all;
    std::unique_ptr<Chunks> chunks;

    Averages(const Call& w, const float* decays) {
        for (const Tensor& f : w.all) {
            float *m = writable(f.m), *v = writable(f.v), *diag = f.factored ? nullptr : writable(f.row);
            float* l = left.emplace_back(new float[f.factored ? w.lanes * lefts(f) : 0]).get();
            float* r = right.emplace_back(new float[f.factored ? w.lanes * rights(f) : 0]).get();
            addresses.push_back({f.grad, m, v, diag, m, v, diag, f.row_lacks_q ? l : r, f.row_lacks_q ? r : l});
        }
        all = {w.lanes, w.tensors, w.m_decays, w.v_decays, w.factors, w.threads, w.fields, decays, addresses.data()};
        all.clip = w.clip;
        chunks.reset(new Chunks(all));
    }
};

// Means, of sums over `length` entries, averaged into [factors, n].
void average_means(float* sums, int64_t n, int64_t length, int64_t factors, const float* decays, float* to) {
    each(n, [=](int64_t i) { sums[i] /= float(length); });
    for (int64_t d = 0; d < factors; d++, to += n) average(to, sums, decays[d], n, to);
}

// The means of rows [outer, n, stride] over their middle axis.
void set_row_means(const float* row, int64_t outer, int64_t n, int64_t stride, float* means) {
    for (int64_t o = 0; o < outer; o++, row += n * stride)
        for (int64_t i = 0; i < stride; i++) {
            double total = 0;
            for (int64_t k = 0; k < n; k++) total += row[k * stride + i];
            *means++ = float(total / double(n));
        }
}

// Rows, columns and the means of rows of one tensor, from the sums of `set_rows_and_columns`.
void set_factors(const Call& w, const Averages& averages, int64_t lane, int64_t tensor) {
    const Tensor& f = w.all[tensor];
    const auto [a, p, b, q, c] = f.axes;
    const int64_t l = lefts(f), r = rights(f), means = (f.row_lacks_q ? l / p : r / q) * w.factors;
    float* left = writable(f.row_lacks_q ? f.row : f.col) + lane * w.factors * l;
    float* right = writable(f.row_lacks_q ? f.col : f.row) + lane * w.factors * r;
    const float* decays = averages.all.decays + (lane + 1) * (w.m_decays + w.v_decays + w.factors) - w.factors;
    average_means(averages.left[tensor].get() + lane * l, l, q, w.factors, decays, left);
    average_means(averages.right[tensor].get() + lane * r, r, p, w.factors, decays, right);
    float* to = writable(f.row_mean) + lane * means;
    if (f.row_lacks_q) set_row_means(left, w.factors * a, p, b * c, to);
    else set_row_means(right, w.factors * a * b, q, c, to);
}

// What all threads share.
struct Shared {
    const Unroll& u;
    const Perceptron& p;
    const Averages& averages;
    const Plan plan;
    const Needs needs;
    const AllTables tables;
};

// A thread's: what it works in, and the call, whose first bias is that of the step.
struct Worker {
    std::vector<const float*> weights;
    Call w;
    Scratch rule;
    Layers network;
    LaneBatch batch;
    std::vector<float> squares, sums;

    Worker(const Call& call, const Shared& s)
        : weights(call.weights, call.weights + 2 * call.layers), w(call), rule(w), network(s.p), batch(s.p),
          squares(s.averages.chunks->sums), sums(s.plan.slots * w.widths[0]) {
        w.weights = weights.data();
    }

    void advance_moments(const Shared& s, int64_t lane) {
        std::fill(squares.begin(), squares.end(), 0.0f);
        for (const Chunk& chunk : s.averages.chunks->all) advance(s.averages.all, lane, chunk, &squares[chunk.sums]);
        set_rows_and_columns(s.averages.all, *s.averages.chunks, lane, squares.data());
        for (int64_t t = 0; t < w.tensors; t++)
            if (w.all[t].factored) set_factors(w, s.averages, lane, t);
    }

    void update(const Shared& s, int64_t lane) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t t = 0; t < w.tensors; t++) s.tables.make(lane, t);
        for (const Piece& piece : s.plan.pieces) {
            const Tables tables = s.tables.of(lane, piece.tensor);
            look(w, s.needs, piece, block_of(w, piece, tables, lane), rule, &sums[piece.slot * w.widths[0]]);
        }
        set_sums(w, s.plan, s.tables, lane, sums.data());
        for (int64_t t = 0; t < w.tensors; t++)
            if (s.needs.starts(w.all[t])) make_starts(w, s.tables.of(lane, t), lane, t);
        for (const Piece& piece : s.plan.pieces) {
            const Tables tables = s.tables.of(lane, piece.tensor);
            apply(w, s.needs, piece, block_of(w, piece, tables, lane), rule, nullptr);
        }
    }

    void move(int64_t lane) {
        for (const Tensor& f : w.all) {
            float *p = writable(f.param) + lane * f.entries, *step = f.update + lane * f.entries;
            each(f.entries, [=](int64_t i) { p[i] += step[i]; });
        }
    }

    void unroll(const Shared& s, int64_t lane) {
        const float* bias = weights[1];
        for (int64_t t = 0; t < s.u.steps; t++, weights[1] += w.widths[1]) {
            batch.gather(s.u, s.p, t, lane);
            s.u.losses[t * w.lanes + lane] = differentiate(s.p, lane, batch.x.data(), batch.y.data(), network);
            advance_moments(s, lane);
            if (t >= s.u.left[lane]) continue;
            update(s, lane);
            move(lane);
        }
        weights[1] = bias;
    }
};

void unroll(const Unroll& u, const Perceptron& p, const Work& work) {
    Call w(work);
    const Averages averages(w, std::exchange(w.decays, nullptr));  // else moments would be taken to wait
    const Needs needs(w);
    const Shared shared{u, p, averages, Plan(w), needs, AllTables(w, needs.tables)};
    std::vector<std::unique_ptr<Worker>> workers;
    for (int64_t i = 0; i < p.threads; i++) workers.emplace_back(new Worker(w, shared));
#pragma omp parallel for schedule(dynamic) num_threads(p.threads)
    for (int64_t lane = 0; lane < w.lanes; lane++) workers[omp_get_thread_num()]->unroll(shared, lane);
}
}  // namespace

// The first bias is [steps, units] in each lane, decays are each lane's. Of a tensor, whatever it is, all but weights is
// written to: it ends as after the last step.
// 1: no memory to work in.  2: a label is no class, or a row not of the table.
extern "C" int l2o_coordinatewise_unroll(const Unroll* u, const Perceptron* p, const Work* work) {
    if (!is_readable(*u, *p)) return 2;
    try {
        unroll(*u, *p, *work);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
