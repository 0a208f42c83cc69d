// Zero insertion, padding, FIR filter and decimation of images, without ever making the inserted zeros.
//
// With m = o * down - pad0 along each axis, output o is the sum over taps a of k[a] * x[(m + a) / up], over those a for
// which up divides m + a and the sample exists; k is the filter, reversed unless `flip`. Reading it from the input's
// side, relative to an output whose m is a multiple of up: input r meets output o with tap a = up * r - down * o.
// Every kernel below is that one line, over different tiles.
//
//   Resample       any filter up to 32 x 32, any factors, any strides: one output per step of a thread
//   Tile           4 x 4 taps, factors 1, 2 up, 2 down: input tile in shared memory, several outputs per thread, for
//                  planes of pixels (x varies fastest) and for channels-last (channels vary fastest)
//   SeparableTile  12 taps along both axes, same factors: both passes in shared memory, one trip to device memory
//
// Taps and sums are float32 (float64 for float64 images). Strides and offsets are 64 bits wide.

#pragma once

#include "kernel_common.h"

namespace sgr {

struct UpfirdnParams {
    const void* x;
    void* y;
    const float *fx, *fy;              // taps along x and along y; a 2-D filter is fx and fy is null
    int64_t x_stride[4], y_stride[4];  // of n, c, h, w, in elements
    int64_t f_stride_x, f_stride_y;    // of fx; fy uses f_stride_x
    int64_t n, c, h, w, out_h, out_w;
    int fw, fh, upx, upy, downx, downy, padx0, padx1, pady0, pady1, flip;
    double gain;
    int x_dtype, y_dtype;
    // Set by upfirdn2d_prepare and upfirdn2d_choose:
    int is_channels_inner;  // neighbours in memory are channels
    int is_wide;            // counts (of outputs for Resample, of planes else) need 64 bits
    int is_packed;          // four neighbours of x may travel in one access
    int64_t tiles_x, tiles_y, tiles_c;
    Divider by_tiles_x, by_tiles_y, by_tiles_c, by_c;
    int shift_x, shift_y;   // tiles start that much early, for m to be a multiple of up
};

// The tap that belongs at distance (a, b), gain included, of a 2-D filter; a float32 number for every type of image.
template <class S> SGR_DEVICE S tap_2d(const UpfirdnParams& p, int a, int b) {
    const int row = p.flip ? a : p.fh - 1 - a, column = p.flip ? b : p.fw - 1 - b;
    const float scaled = load(p.fx + row * p.f_stride_y + column * p.f_stride_x) * static_cast<float>(p.gain);
    return static_cast<S>(scaled);
}

// A range of inputs that a range of outputs needs, from its first one on; outputs start at a multiple of UP.
template <int UP, int DOWN, int TAPS> struct Reach {
    template <int OUTPUTS> static constexpr int of = ((OUTPUTS - 1) * DOWN + TAPS - 1) / UP + 1;
};

// Image and channel of a plane.
SGR_DEVICE void split_plane(const UpfirdnParams& p, int64_t plane, int64_t& n, int64_t& c) {
    if (p.is_wide) {
        n = plane / p.c;
        c = plane % p.c;
    } else {
        uint32_t rest = static_cast<uint32_t>(plane);
        c = p.by_c.split(rest);
        n = rest;
    }
}

constexpr int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

// ---- any shape

template <class T, class U> struct Resample {
    using S = compute_t<T>;
    static constexpr int THREADS = 256;
    static constexpr int ROUNDS = 4;
    static constexpr int PHASES = 2;
    struct Shared {
        Cells<S, MAX_TAPS * MAX_TAPS> taps;
    };

    template <int I>
    static SGR_DEVICE void phase(const UpfirdnParams& p, Shared& shared, int64_t block, int thread) {
        if constexpr (I == 0) {
            for (int i = thread; i < p.fh * p.fw; i += THREADS) shared.taps.set(i, tap_2d<S>(p, i / p.fw, i % p.fw));
        } else {
            const int64_t total = p.n * p.c * p.out_h * p.out_w;
            for (int r = 0; r < ROUNDS; r++) {
                const int64_t i = (block * ROUNDS + r) * THREADS + thread;
                if (i < total) output(p, shared, i);
            }
        }
    }

    template <class Int> static SGR_DEVICE Int take(Int& rest, int64_t size) {
        const Int index = rest % static_cast<Int>(size);
        rest /= static_cast<Int>(size);
        return index;
    }

    // Split a position in memory order into its four indices.
    template <class Int>
    static SGR_DEVICE void locate(const UpfirdnParams& p, Int i, int64_t& n, int64_t& c, int64_t& oy, int64_t& ox) {
        if (p.is_channels_inner) c = take(i, p.c);
        ox = take(i, p.out_w);
        oy = take(i, p.out_h);
        if (!p.is_channels_inner) c = take(i, p.c);
        n = i;
    }

    static SGR_DEVICE void output(const UpfirdnParams& p, const Shared& shared, int64_t i) {
        int64_t n, c, oy, ox;
        if (p.is_wide) {
            locate(p, i, n, c, oy, ox);
        } else {
            locate(p, static_cast<uint32_t>(i), n, c, oy, ox);
        }
        // m / up, rounded up, is the first sample at or after m.
        const int64_t my = oy * p.downy - p.pady0, mx = ox * p.downx - p.padx0;
        const int64_t y_first = p.upy == 1 ? my : -floor_div(-my, p.upy);
        const int64_t x_first = p.upx == 1 ? mx : -floor_div(-mx, p.upx);
        const T* plane = static_cast<const T*>(p.x) + n * p.x_stride[0] + c * p.x_stride[1];
        S sum = 0;
        int64_t iy = y_first;
        for (int a = static_cast<int>(iy * p.upy - my); a < p.fh; a += p.upy, iy++) {
            if (iy < 0 || iy >= p.h) continue;
            int64_t ix = x_first;
            for (int b = static_cast<int>(ix * p.upx - mx); b < p.fw; b += p.upx, ix++) {
                if (ix < 0 || ix >= p.w) continue;
                sum += shared.taps.get(a * p.fw + b) * widen(load(plane + iy * p.x_stride[2] + ix * p.x_stride[3]));
            }
        }
        U* out = static_cast<U*>(p.y) + n * p.y_stride[0] + c * p.y_stride[1] + oy * p.y_stride[2] + ox * p.y_stride[3];
        store(out, narrow<U>(sum));
    }
};

// ---- 4 x 4 taps

// A tile has WIDTH x HEIGHT outputs of INNER planes (or channels). A thread makes a column of ROWS outputs; with
// zero insertion a pair of columns, for every second output uses the other half of the taps.
template <class T, int UP, int DOWN, bool CHANNELS, int WIDTH, int HEIGHT, int INNER, int ROWS> struct Tile {
    static constexpr int TAPS = 4;
    static constexpr int COLUMNS = UP;
    static constexpr int UNITS = WIDTH / COLUMNS;
    static constexpr int THREADS = UNITS * (HEIGHT / ROWS) * INNER;
    static constexpr int PHASES = 3;
    using R = Reach<UP, DOWN, TAPS>;
    static constexpr int IN_H = R::template of<HEIGHT>, IN_W = R::template of<WIDTH>;
    // Planes: rows begin up to three samples early, at a multiple of four.
    static constexpr int PITCH = CHANNELS ? IN_W : round_up(IN_W + 3, 4);
    static constexpr int STEP_X = CHANNELS ? INNER : 1;
    static constexpr int STEP_Y = STEP_X * PITCH;
    static constexpr int STEP_PLANE = CHANNELS ? 1 : STEP_Y * IN_H;
    static_assert(UP == 1 || (UP == 2 && DOWN == 1), "up or down, not both");
    static_assert(WIDTH % COLUMNS == 0 && HEIGHT % ROWS == 0 && ROWS % UP == 0, "tile does not divide");
    static_assert(!CHANNELS || INNER % 4 == 0, "channels go by four");

    struct Shared {
        Cells<float, TAPS * TAPS> taps;
        Cells<int64_t, CHANNELS ? 1 : INNER> x_plane, y_plane;  // where each plane begins; -1 = there is none
        Cells<float, IN_H * PITCH * INNER> in;
    };
    static_assert(sizeof(Shared) <= 48 * 1024, "more shared memory than a block has");

    struct Place {
        int64_t out_x, out_y, plane;  // first output; first plane, or first channel
        int64_t in_x, in_y, n;        // first input; image, for channels
        int slack;                    // columns before it
    };

    static SGR_DEVICE Place place(const UpfirdnParams& p, int64_t block) {
        Place at;
        uint32_t rest = static_cast<uint32_t>(block);
        if (CHANNELS) at.plane = int64_t{p.by_tiles_c.split(rest)} * INNER;
        at.out_x = int64_t{p.by_tiles_x.split(rest)} * WIDTH - p.shift_x;
        at.out_y = int64_t{p.by_tiles_y.split(rest)} * HEIGHT - p.shift_y;
        at.n = rest;
        if (!CHANNELS) at.plane = int64_t{rest} * INNER;
        at.in_x = floor_div(at.out_x * DOWN - p.padx0, UP);
        at.in_y = floor_div(at.out_y * DOWN - p.pady0, UP);
        at.slack = CHANNELS || !p.is_packed ? 0 : static_cast<int>(at.in_x & 3);
        return at;
    }

    template <int I>
    static SGR_DEVICE void phase(const UpfirdnParams& p, Shared& shared, int64_t block, int thread) {
        const Place at = place(p, block);
        if constexpr (I == 0) prepare(p, shared, at, thread);
        if constexpr (I == 1) fetch(p, shared, at, thread);
        if constexpr (I == 2) filter(p, shared, at, thread);
    }

    static SGR_DEVICE void prepare(const UpfirdnParams& p, Shared& shared, const Place& at, int thread) {
        if (thread < TAPS * TAPS) shared.taps.set(thread, tap_2d<float>(p, thread / TAPS, thread % TAPS));
        if (!CHANNELS) {
            for (int i = thread; i < INNER; i += THREADS) {
                int64_t n, c;
                split_plane(p, at.plane + i, n, c);
                const bool exists = n < p.n;
                shared.x_plane.set(i, exists ? n * p.x_stride[0] + c * p.x_stride[1] : -1);
                shared.y_plane.set(i, exists ? n * p.y_stride[0] + c * p.y_stride[1] : -1);
            }
        }
    }

    // Bring the input tile, zeros where there is no sample, by fours along the fastest axis.
    static SGR_DEVICE void fetch(const UpfirdnParams& p, Shared& shared, const Place& at, int thread) {
        constexpr int FOURS = (CHANNELS ? INNER : PITCH) / 4;
        constexpr int MIDDLE = CHANNELS ? PITCH : IN_H, OUTER = CHANNELS ? IN_H : INNER;
        constexpr int COUNT = FOURS * MIDDLE * OUTER;
        constexpr int BATCH = 4;  // accesses under way at once
        for (int start = thread; start < COUNT; start += THREADS * BATCH) {
            Pack<T, 4> got[BATCH];
            SGR_UNROLL
            for (int k = 0; k < BATCH; k++) {
                const int i = start + k * THREADS;
                SGR_UNROLL
                for (int j = 0; j < 4; j++) got[k].v[j] = T{};
                if (i >= COUNT) continue;
                const int four = i % FOURS * 4, middle = i / FOURS % MIDDLE, outer = i / (FOURS * MIDDLE);
                const int64_t iy = at.in_y + (CHANNELS ? outer : middle);
                if (iy < 0 || iy >= p.h) continue;
                int64_t first, limit, offset, step;  // along the fastest axis
                if (CHANNELS) {
                    const int64_t ix = at.in_x + middle;
                    if (ix < 0 || ix >= p.w) continue;
                    first = at.plane + four, limit = p.c, step = p.x_stride[1];
                    offset = at.n * p.x_stride[0] + ix * p.x_stride[3];
                } else {
                    first = at.in_x - at.slack + four, limit = p.w, step = p.x_stride[3];
                    offset = shared.x_plane.get(outer);
                    if (offset < 0) continue;
                }
                const T* source = static_cast<const T*>(p.x) + offset + iy * p.x_stride[2];
                if (p.is_packed) {  // first and limit are multiples of four: all exist, or none
                    if (first >= 0 && first < limit)
                        got[k] = load(reinterpret_cast<const Pack<T, 4>*>(source + first));
                } else {
                    SGR_UNROLL
                    for (int j = 0; j < 4; j++)
                        if (first + j >= 0 && first + j < limit) got[k].v[j] = load(source + (first + j) * step);
                }
            }
            SGR_UNROLL
            for (int k = 0; k < BATCH; k++) {
                const int i = start + k * THREADS;
                if (i >= COUNT) continue;
                Pack<float, 4> wide;
                SGR_UNROLL
                for (int j = 0; j < 4; j++) wide.v[j] = widen(got[k].v[j]);
                shared.in.set4(i * 4, wide);
            }
        }
    }

    static SGR_DEVICE void filter(const UpfirdnParams& p, const Shared& shared, const Place& at, int thread) {
        int inner, unit, strip;
        if (CHANNELS) {
            inner = thread % INNER, unit = thread / INNER % UNITS, strip = thread / (INNER * UNITS);
        } else {
            unit = thread % UNITS, strip = thread / UNITS % (HEIGHT / ROWS), inner = thread / (UNITS * (HEIGHT / ROWS));
        }
        int64_t base;
        if (CHANNELS) {
            if (at.plane + inner >= p.c) return;
            base = at.n * p.y_stride[0] + (at.plane + inner) * p.y_stride[1];
        } else {
            base = shared.y_plane.get(inner);
            if (base < 0) return;
        }
        const int64_t out_x = at.out_x + unit * COLUMNS, out_y = at.out_y + strip * ROWS;
        if (out_x >= p.out_w || out_y >= p.out_h) return;

        float taps[TAPS * TAPS], sum[ROWS][COLUMNS];
        SGR_UNROLL
        for (int i = 0; i < TAPS * TAPS; i++) taps[i] = shared.taps.get(i);
        SGR_UNROLL
        for (int i = 0; i < ROWS; i++) {
            SGR_UNROLL
            for (int j = 0; j < COLUMNS; j++) sum[i][j] = 0;
        }
        constexpr int REACH_X = R::template of<COLUMNS>, REACH_Y = R::template of<ROWS>;
        const int corner = inner * STEP_PLANE + strip * (ROWS * DOWN / UP) * STEP_Y
            + (unit * (COLUMNS * DOWN / UP) + at.slack) * STEP_X;
        SGR_UNROLL
        for (int y = 0; y < REACH_Y; y++) {
            float in[REACH_X];
            SGR_UNROLL
            for (int x = 0; x < REACH_X; x++) in[x] = shared.in.get(corner + y * STEP_Y + x * STEP_X);
            SGR_UNROLL
            for (int i = 0; i < ROWS; i++) {
                const int a = UP * y - DOWN * i;
                if (a < 0 || a >= TAPS) continue;
                SGR_UNROLL
                for (int j = 0; j < COLUMNS; j++) {
                    SGR_UNROLL
                    for (int x = 0; x < REACH_X; x++) {
                        const int b = UP * x - DOWN * j;
                        if (b >= 0 && b < TAPS) sum[i][j] += taps[a * TAPS + b] * in[x];
                    }
                }
            }
        }
        T* out = static_cast<T*>(p.y) + base + out_y * p.y_stride[2] + out_x * p.y_stride[3];
        SGR_UNROLL
        for (int i = 0; i < ROWS; i++) {
            SGR_UNROLL
            for (int j = 0; j < COLUMNS; j++) {
                const int64_t oy = out_y + i, ox = out_x + j;
                if (oy >= 0 && oy < p.out_h && ox >= 0 && ox < p.out_w)
                    store(out + i * p.y_stride[2] + j * p.y_stride[3], narrow<T>(sum[i][j]));
            }
        }
    }
};

// ---- 12 taps along x, then along y

template <class T, int UP, int DOWN> struct SeparableTile {
    static constexpr int TAPS = 12;
    static constexpr int SIZE = 32;   // outputs per axis
    static constexpr int STRIP = 4;   // outputs per thread and step
    static constexpr int THREADS = 256;
    static constexpr int PHASES = 4;
    using R = Reach<UP, DOWN, TAPS>;
    static constexpr int IN = R::template of<SIZE>;
    // Odd pitches: the horizontal pass has neighbouring threads in neighbouring rows, which must not share a bank.
    static constexpr int IN_PITCH = IN | 1, MID_PITCH = SIZE | 1;

    struct Shared {
        Cells<float, TAPS> taps_x, taps_y;
        Cells<float, IN * IN_PITCH> in;
        Cells<float, IN * MID_PITCH> mid;
    };
    static_assert(sizeof(Shared) <= 48 * 1024, "more shared memory than a block has");

    struct Place {
        int64_t out_x, out_y, n, c;
    };

    static SGR_DEVICE Place place(const UpfirdnParams& p, int64_t block) {
        Place at;
        uint32_t rest = static_cast<uint32_t>(block);
        at.out_x = int64_t{p.by_tiles_x.split(rest)} * SIZE - p.shift_x;
        at.out_y = int64_t{p.by_tiles_y.split(rest)} * SIZE - p.shift_y;
        split_plane(p, rest, at.n, at.c);
        return at;
    }

    // STRIP neighbouring outputs of one line.
    template <int LENGTH>
    static SGR_DEVICE void line(
        const Cells<float, LENGTH>& in, int start, int step, const Cells<float, TAPS>& taps, float (&sum)[STRIP]) {
        SGR_UNROLL
        for (int i = 0; i < STRIP; i++) sum[i] = 0;
        constexpr int REACH = R::template of<STRIP>;
        SGR_UNROLL
        for (int r = 0; r < REACH; r++) {
            const float v = in.get(start + r * step);
            SGR_UNROLL
            for (int i = 0; i < STRIP; i++) {
                const int a = UP * r - DOWN * i;
                if (a >= 0 && a < TAPS) sum[i] += taps.get(a) * v;
            }
        }
    }

    template <int I>
    static SGR_DEVICE void phase(const UpfirdnParams& p, Shared& shared, int64_t block, int thread) {
        const Place at = place(p, block);
        if constexpr (I == 0) {
            if (thread < TAPS) {
                const int64_t i = (p.flip ? thread : TAPS - 1 - thread) * p.f_stride_x;
                shared.taps_x.set(thread, load(p.fx + i) * static_cast<float>(p.gain));
                shared.taps_y.set(thread, load(p.fy + i));
            }
        }
        if constexpr (I == 1) {
            const int64_t in_x = floor_div(at.out_x * DOWN - p.padx0, UP);
            const int64_t in_y = floor_div(at.out_y * DOWN - p.pady0, UP);
            const T* plane = static_cast<const T*>(p.x) + at.n * p.x_stride[0] + at.c * p.x_stride[1];
            constexpr int BATCH = 4;
            for (int start = thread; start < IN * IN; start += THREADS * BATCH) {
                T got[BATCH];
                SGR_UNROLL
                for (int k = 0; k < BATCH; k++) {
                    const int i = start + k * THREADS;
                    const int64_t iy = in_y + i / IN, ix = in_x + i % IN;
                    got[k] = T{};
                    if (i < IN * IN && iy >= 0 && iy < p.h && ix >= 0 && ix < p.w)
                        got[k] = load(plane + iy * p.x_stride[2] + ix * p.x_stride[3]);
                }
                SGR_UNROLL
                for (int k = 0; k < BATCH; k++) {
                    const int i = start + k * THREADS;
                    if (i < IN * IN) shared.in.set(i / IN * IN_PITCH + i % IN, widen(got[k]));
                }
            }
        }
        if constexpr (I == 2) {
            for (int i = thread; i < IN * (SIZE / STRIP); i += THREADS) {
                const int row = i % IN, strip = i / IN;
                float sum[STRIP];
                line(shared.in, row * IN_PITCH + strip * (STRIP * DOWN / UP), 1, shared.taps_x, sum);
                SGR_UNROLL
                for (int k = 0; k < STRIP; k++) shared.mid.set(row * MID_PITCH + strip * STRIP + k, sum[k]);
            }
        }
        if constexpr (I == 3) {
            static_assert(SIZE * (SIZE / STRIP) == THREADS, "one strip per thread");
            const int column = thread % SIZE, strip = thread / SIZE;
            float sum[STRIP];
            line(shared.mid, strip * (STRIP * DOWN / UP) * MID_PITCH + column, MID_PITCH, shared.taps_y, sum);
            const int64_t ox = at.out_x + column;
            if (ox < 0 || ox >= p.out_w) return;
            T* plane = static_cast<T*>(p.y) + at.n * p.y_stride[0] + at.c * p.y_stride[1] + ox * p.y_stride[3];
            SGR_UNROLL
            for (int k = 0; k < STRIP; k++) {
                const int64_t oy = at.out_y + strip * STRIP + k;
                if (oy >= 0 && oy < p.out_h) store(plane + oy * p.y_stride[2], narrow<T>(sum[k]));
            }
        }
    }
};

// ---- choice

// Check a call and set the size of the result. Returns null, or what is wrong. Needs the sizes, factors and padding.
inline const char* upfirdn2d_prepare(UpfirdnParams& p) {
    constexpr int64_t limit = std::numeric_limits<int32_t>::max();
    if (p.upx < 1 || p.upy < 1 || p.downx < 1 || p.downy < 1) return "up and down must be at least 1";
    if (p.fw < 1 || p.fh < 1 || p.fw > MAX_TAPS || p.fh > MAX_TAPS) return "a filter has 1 to 32 taps per axis";
    if (p.n < 0 || p.c < 0 || p.h < 0 || p.w < 0 || p.h > limit || p.w > limit) return "image size out of range";
    const int64_t padded_w = p.w * p.upx + p.padx0 + p.padx1, padded_h = p.h * p.upy + p.pady0 + p.pady1;
    if (padded_w < p.fw || padded_h < p.fh) return "the padded image is smaller than the filter; give more padding";
    if (padded_w > limit || padded_h > limit) return "the padded image has 2^31 or more pixels along an axis";
    p.out_w = (padded_w - p.fw) / p.downx + 1;
    p.out_h = (padded_h - p.fh) / p.downy + 1;
    return nullptr;
}

// Whether a 1-D filter can be applied along both axes in one kernel; else take two passes through Resample.
inline bool upfirdn2d_is_fused(const UpfirdnParams& p) {
    const bool known = p.upx == p.upy && p.downx == p.downy && p.upx * p.downx <= 2;
    return p.fw == SeparableTile<float, 1, 1>::TAPS && p.fh == p.fw && known && p.x_dtype != FLOAT64;
}

template <class K, class Launch> int upfirdn2d_launch_resample(UpfirdnParams& p, Launch&& launch) {
    const int64_t total = p.n * p.c * p.out_h * p.out_w;
    p.is_wide = total >= (int64_t{1} << 31);
    return launch(K{}, p, ceil_div(total, K::THREADS * K::ROUNDS));
}

template <int UP, int WIDTH, int HEIGHT> void upfirdn2d_count_tiles(UpfirdnParams& p) {
    p.shift_x = static_cast<int>(static_cast<unsigned>(p.padx0) % UP);
    p.shift_y = static_cast<int>(static_cast<unsigned>(p.pady0) % UP);
    p.tiles_x = ceil_div(p.out_w + p.shift_x, WIDTH);
    p.tiles_y = ceil_div(p.out_h + p.shift_y, HEIGHT);
    p.by_tiles_x = Divider::of(p.tiles_x);
    p.by_tiles_y = Divider::of(p.tiles_y);
    p.by_c = Divider::of(p.c);
    p.is_wide = p.n * p.c >= (int64_t{1} << 31) - 1024;  // a tile may reach past the last plane
}

template <class T, int UP, int DOWN, bool CHANNELS, int WIDTH, int HEIGHT, int INNER, int ROWS, class Launch>
int upfirdn2d_launch_tile(UpfirdnParams& p, Launch&& launch) {
    using K = Tile<T, UP, DOWN, CHANNELS, WIDTH, HEIGHT, INNER, ROWS>;
    upfirdn2d_count_tiles<UP, WIDTH, HEIGHT>(p);
    p.tiles_c = CHANNELS ? ceil_div(p.c, INNER) : 1;
    p.by_tiles_c = Divider::of(p.tiles_c);
    const int64_t inner_size = CHANNELS ? p.c : p.w, inner_stride = CHANNELS ? p.x_stride[1] : p.x_stride[3];
    bool packed = inner_stride == 1 && inner_size % 4 == 0 && reinterpret_cast<uintptr_t>(p.x) % (4 * sizeof(T)) == 0;
    for (const int axis : {0, 1, 2, 3}) packed = packed && (axis == (CHANNELS ? 1 : 3) || p.x_stride[axis] % 4 == 0);
    p.is_packed = packed;
    const int64_t outer = CHANNELS ? p.n * p.tiles_c : ceil_div(p.n * p.c, INNER);
    return launch(K{}, p, outer * p.tiles_x * p.tiles_y);
}

// Tile shapes: 256 threads; small images share a block.
template <class T, class Launch> int upfirdn2d_launch_4x4(UpfirdnParams& p, Launch&& launch) {
    const int64_t size = p.out_w > p.out_h ? p.out_w : p.out_h;
    const bool channels = p.is_channels_inner && p.c >= 16;
    if (p.upx == 2) {
        if (channels && size > 8) return upfirdn2d_launch_tile<T, 2, 1, true, 16, 16, 16, 8>(p, launch);
        if (channels) return upfirdn2d_launch_tile<T, 2, 1, true, 8, 8, 32, 4>(p, launch);
        if (size > 16) return upfirdn2d_launch_tile<T, 2, 1, false, 64, 32, 1, 4>(p, launch);
        if (size > 8) return upfirdn2d_launch_tile<T, 2, 1, false, 16, 16, 16, 8>(p, launch);
        return upfirdn2d_launch_tile<T, 2, 1, false, 8, 8, 32, 4>(p, launch);
    }
    if (p.downx == 2) {
        if (channels) return upfirdn2d_launch_tile<T, 1, 2, true, 8, 8, 16, 4>(p, launch);
        if (size > 16) return upfirdn2d_launch_tile<T, 1, 2, false, 64, 16, 1, 4>(p, launch);
        if (size > 8) return upfirdn2d_launch_tile<T, 1, 2, false, 16, 16, 4, 4>(p, launch);
        return upfirdn2d_launch_tile<T, 1, 2, false, 8, 8, 16, 4>(p, launch);
    }
    if (channels && size > 8) return upfirdn2d_launch_tile<T, 1, 1, true, 16, 16, 16, 16>(p, launch);
    if (channels) return upfirdn2d_launch_tile<T, 1, 1, true, 8, 8, 32, 8>(p, launch);
    if (size > 16) return upfirdn2d_launch_tile<T, 1, 1, false, 64, 32, 1, 8>(p, launch);
    if (size > 8) return upfirdn2d_launch_tile<T, 1, 1, false, 16, 16, 8, 8>(p, launch);
    return upfirdn2d_launch_tile<T, 1, 1, false, 8, 8, 32, 8>(p, launch);
}

template <class T, int UP, int DOWN, class Launch> int upfirdn2d_launch_separable(UpfirdnParams& p, Launch&& launch) {
    using K = SeparableTile<T, UP, DOWN>;
    upfirdn2d_count_tiles<UP, K::SIZE, K::SIZE>(p);
    return launch(K{}, p, p.n * p.c * p.tiles_x * p.tiles_y);
}

template <class T, class Launch> int upfirdn2d_choose_kernel(UpfirdnParams& p, Launch&& launch) {
    if (p.fy) {
        if (p.upx == 2) return upfirdn2d_launch_separable<T, 2, 1>(p, launch);
        if (p.downx == 2) return upfirdn2d_launch_separable<T, 1, 2>(p, launch);
        return upfirdn2d_launch_separable<T, 1, 1>(p, launch);
    }
    const bool known = p.upx == p.upy && p.downx == p.downy && p.upx * p.downx <= 2;
    if (known && p.fw == 4 && p.fh == 4 && p.x_dtype == p.y_dtype) return upfirdn2d_launch_4x4<T>(p, launch);
    if (p.x_dtype == p.y_dtype) return upfirdn2d_launch_resample<Resample<T, T>>(p, launch);
    if constexpr (sizeof(T) == sizeof(float)) {
        if (p.y_dtype == FLOAT16) return upfirdn2d_launch_resample<Resample<float, Half>>(p, launch);
        return upfirdn2d_launch_resample<Resample<float, Bfloat>>(p, launch);
    } else {
        return upfirdn2d_launch_resample<Resample<T, float>>(p, launch);
    }
}

// Call launch(kernel, params, number of blocks) with the kernel for a prepared call. x and y have one dtype, or one of
// them is float32 and the other 16 bits wide (the two passes of a separable filter, which keep the middle in float32).
template <class Launch> int upfirdn2d_choose(UpfirdnParams p, Launch&& launch) {
    switch (p.x_dtype) {
        case FLOAT16: return upfirdn2d_choose_kernel<Half>(p, launch);
        case BFLOAT16: return upfirdn2d_choose_kernel<Bfloat>(p, launch);
        case FLOAT64: return upfirdn2d_launch_resample<Resample<double, double>>(p, launch);
        default: return upfirdn2d_choose_kernel<float>(p, launch);
    }
}

// In upfirdn2d.cu: run on a CUDA stream. Returns a cudaError_t.
int upfirdn2d_launch(const UpfirdnParams& p, void* stream);

}  // namespace sgr
