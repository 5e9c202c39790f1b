// The cells as pointwise steps: the C++ twins of spec/cells.py. A cell sees values (a vector or several on
// the CPU, a scalar on a GPU thread) and a math policy M with sigmoid, tanh and relu; never time, pointers or
// threads.
//   fwd: x[G], r[G] pre-activations (r unused where APART is false: then x already holds their sum),
//        h_prev, c in/out -> h, reserve[R]
//   bwd: reserve[R], h_prev, c_prev, dh, dc in/out -> dx[G], dr[G] (dr only where APART), returns the part of
//        dh_prev that does not go through the recurrent matmul
#pragma once

namespace seqkern {

struct Lstm {
    static constexpr int G = 4, R = 5;
    static constexpr bool APART = false, HAS_C = true;

    template <class M, class V>
    static inline __attribute__((always_inline)) void fwd(const V* x, const V*, V, V& c, V& h, V* reserve) {
        V i = M::sigmoid(x[0]), f = M::sigmoid(x[1]), g = M::tanh(x[2]), o = M::sigmoid(x[3]);
        c = f * c + i * g;
        h = o * M::tanh(c);
        reserve[0] = i, reserve[1] = f, reserve[2] = g, reserve[3] = o, reserve[4] = c;
    }

    template <class M, class V>
    static inline __attribute__((always_inline)) V bwd(const V* reserve, V, V c_prev, V dh, V& dc, V* dx,
                                                       V*) {
        V i = reserve[0], f = reserve[1], g = reserve[2], o = reserve[3], tc = M::tanh(reserve[4]);
        dc = dc + dh * o * (1 - tc * tc);
        dx[0] = dc * g * i * (1 - i);
        dx[1] = dc * c_prev * f * (1 - f);
        dx[2] = dc * i * (1 - g * g);
        dx[3] = dh * tc * o * (1 - o);
        dc = dc * f;
        return V{};
    }
};

struct Gru {
    static constexpr int G = 3, R = 4;
    static constexpr bool APART = true, HAS_C = false;

    template <class M, class V>
    static inline __attribute__((always_inline)) void fwd(const V* x, const V* r, V h_prev, V&, V& h,
                                                          V* reserve) {
        V reset = M::sigmoid(x[0] + r[0]), update = M::sigmoid(x[1] + r[1]), n = M::tanh(x[2] + reset * r[2]);
        h = n + update * (h_prev - n);
        reserve[0] = reset, reserve[1] = update, reserve[2] = n, reserve[3] = r[2];
    }

    template <class M, class V>
    static inline __attribute__((always_inline)) V bwd(const V* reserve, V h_prev, V, V dh, V&, V* dx,
                                                       V* dr) {
        V reset = reserve[0], update = reserve[1], n = reserve[2];
        V dn = dh * (1 - update) * (1 - n * n);
        dx[0] = dr[0] = dn * reserve[3] * reset * (1 - reset);
        dx[1] = dr[1] = dh * (h_prev - n) * update * (1 - update);
        dx[2] = dn;
        dr[2] = dn * reset;
        return dh * update;
    }
};

// The plain cells reserve nothing: backward reads h_t itself, handed over as reserve[0].
struct RnnTanh {
    static constexpr int G = 1, R = 0;
    static constexpr bool APART = false, HAS_C = false;

    template <class M, class V>
    static inline __attribute__((always_inline)) void fwd(const V* x, const V*, V, V&, V& h, V*) {
        h = M::tanh(x[0]);
    }

    template <class M, class V>
    static inline __attribute__((always_inline)) V bwd(const V* reserve, V, V, V dh, V&, V* dx, V*) {
        dx[0] = dh * (1 - reserve[0] * reserve[0]);
        return V{};
    }
};

struct RnnRelu {
    static constexpr int G = 1, R = 0;
    static constexpr bool APART = false, HAS_C = false;

    template <class M, class V>
    static inline __attribute__((always_inline)) void fwd(const V* x, const V*, V, V&, V& h, V*) {
        h = M::relu(x[0]);
    }

    template <class M, class V>
    static inline __attribute__((always_inline)) V bwd(const V* reserve, V, V, V dh, V&, V* dx, V*) {
        dx[0] = reserve[0] <= 0 ? V{} : dh;
        return V{};
    }
};

}  // namespace seqkern
