// How the work on all tensors of all lanes is cut into pieces, and shared by threads.
#pragma once

#include "channels.h"

#include <omp.h>

namespace {

// Elements of one tensor: several whole groups of those that share scales, or a part of one.
struct Piece {
    int64_t tensor, begin, end, first_group, groups, slot;  // slot: of the piece's first group among those of a lane
};

struct Plan {
    std::vector<Piece> pieces;
    int64_t slots = 0;

    explicit Plan(const Call& w) {
        for (int64_t t = 0; t < w.tensors; t++) {
            const Tensor& f = w.all[t];
            const int64_t inner = std::max<int64_t>(f.inner, 1);
            const int64_t together = std::max<int64_t>(PIECE / inner, 1), stretch = together * inner;
            for (int64_t start = 0; start < f.entries; start += stretch) {
                const int64_t stop = std::min(start + stretch, f.entries), groups = (stop - start) / inner;
                for (int64_t begin = start; begin < stop; begin += PIECE) {
                    pieces.push_back({t, begin, std::min(begin + PIECE, stop), start / inner, groups, slots});
                    slots += groups;
                }
            }
        }
    }
    int64_t count() const { return pieces.size(); }
};

// first(lane, i, work) for i < firsts, then middle(lane, i, work) for i < middles, then last(lane) of each lane. A thread
// takes whole lanes, which need no waiting for each other, unless there are too few to share them out evenly.
template <class First, class Middle, class Last>
void phases(const Call& w, int64_t firsts, int64_t middles, First first, Middle middle, Last last) {
    std::vector<Scratch> scratch;
    for (int64_t i = 0; i < w.threads; i++) scratch.emplace_back(w);
    const bool whole_lanes = w.lanes % w.threads == 0 || w.lanes >= 4 * w.threads;
#pragma omp parallel num_threads(w.threads)
    {
        Scratch& work = scratch[omp_get_thread_num()];
        if (whole_lanes) {
#pragma omp for schedule(dynamic)
            for (int64_t lane = 0; lane < w.lanes; lane++) {
                for (int64_t i = 0; i < firsts; i++) first(lane, i);
                for (int64_t i = 0; i < middles; i++) middle(lane, i, work);
                last(lane);
            }
        } else {
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < w.lanes * firsts; i++) first(i / firsts, i % firsts);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < w.lanes * middles; i++) middle(i / middles, i % middles, work);
#pragma omp for
            for (int64_t lane = 0; lane < w.lanes; lane++) last(lane);
        }
    }
}

// The tables of all tensors of all lanes.
struct AllTables {
    std::vector<int64_t> offsets{0};
    std::unique_ptr<float[]> memory;
    const Call& w;

    AllTables(const Call& w, bool wanted) : w(w) {
        for (int64_t t = 0; t < w.tensors; t++)
            offsets.push_back(offsets.back() + (wanted ? Tables::size(w, w.all[t], w.layers) : 0));
        memory.reset(new float[w.lanes * offsets.back()]);
    }
    Tables of(int64_t lane, int64_t t) const {
        return {w, w.all[t], lane, memory.get() + lane * offsets.back() + offsets[t]};
    }
    void make(int64_t lane, int64_t t) const {
        if (offsets[t] < offsets[t + 1]) of(lane, t).make(w, w.all[t], lane);
    }
};

// How many elements the block has that begins there: if rows are long, none of another row.
int64_t block_size(const Field& f, int64_t begin, int64_t end) {
    const int64_t row = f.factored && f.axes[4] == 1 ? f.axes[3] : 0;
    if (2 * row < BLOCK) return std::min(BLOCK, end - begin);
    const int64_t parts = (row + BLOCK - 1) / BLOCK, part = padded((row + parts - 1) / parts);
    return std::min({part, row - begin % row, end - begin});
}

// f(begin, n) over the blocks of a piece.
template <class F> void blocks(const Field& field, const Piece& piece, F f) {
    for (int64_t begin = piece.begin, n; begin < piece.end; begin += n) {
        n = block_size(field, begin, piece.end);
        f(begin, n);
    }
}

// f(group, from, count) over the groups that share scales in a block: from is counted from the beginning of the block.
template <class F> void groups(const Tensor& f, int64_t begin, int64_t n, F visit) {
    for (int64_t e = begin; e < begin + n;) {
        const int64_t group = e / f.inner, stop = std::min((group + 1) * f.inner, begin + n);
        visit(group, e - begin, stop - e);
        e = stop;
    }
}
}  // namespace
