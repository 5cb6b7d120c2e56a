// What Python compares its mirrors of structures with.
#pragma once

#include <cstdint>

// The size of S and the offsets of all its members, in their order.
template <class S, class... M> void layout(int64_t* out, M S::*... members) {
    alignas(S) static char memory[sizeof(S)];
    const S* s = reinterpret_cast<const S*>(memory);
    *out++ = sizeof(S);
    ((*out++ = reinterpret_cast<const char*>(&(s->*members)) - memory), ...);
}
