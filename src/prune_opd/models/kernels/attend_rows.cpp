// Attention of whole rows to themselves, in float32, with its gradient: see attend_rows.py.
//
// Each query sees two runs of columns, so work is done for those alone, where a general kernel multiplies with all that
// a mask may allow. TILE queries go together; columns go in panels of PANEL, in which keys and values lie transposed,
// so that a product of queries and keys needs no sum across a vector.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

using Vec = at::vec::Vectorized<float>;

namespace {

constexpr int64_t SIZE = HEAD_SIZE;  // of a head; attend_rows.py defines it
constexpr int64_t LANES = Vec::size();
static_assert(SIZE % LANES == 0);
constexpr int64_t WIDTH = SIZE % (2 * LANES) == 0 ? 2 : 1;  // vectors of a position at a time
constexpr int64_t PANEL = 2 * LANES;
constexpr int64_t TILE = LANES >= 16 ? 8 : 6;  // TILE · 2 sums and what they need fit into the registers
constexpr float LEAST = -1e30f;  // score of a column that is not seen; -inf less -inf would be NaN

struct Rows {  // (rows, heads, length, size), each position without gaps
  Rows(const float* data, const int64_t* strides)
      : data(data), row(strides[0]), head(strides[1]), position(strides[2]) {}
  const float* data;
  int64_t row, head, position;  // strides
  const float* at(int64_t r, int64_t h) const { return data + r * row + h * head; }
};

struct Sight {  // of a query: it sees the columns of its prompt, and those from `begin` to itself
  int32_t begin, prompt_begin, prompt_end;
};

// Whether nobody looks behind itself or out of the row, and prompts come first.
bool in_order(const Sight* sights, int64_t rows, int64_t length) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t q = 0; q < length; ++q, ++sights)
      if (!(0 <= sights->prompt_begin && sights->prompt_begin <= sights->prompt_end &&
            sights->prompt_end <= sights->begin && sights->begin <= q))
        return false;
  return true;
}

struct Span {  // of columns, and the panels around them
  int64_t first, end;
  int64_t panel_begin() const { return first / PANEL; }
  int64_t panel_end() const { return (end + PANEL - 1) / PANEL; }
  int64_t from() const { return panel_begin() * PANEL; }
  int64_t to() const { return panel_end() * PANEL; }
};

struct Spans {  // one or two, in order, without a panel in common
  Span parts[2];
  int64_t count;
  const Span* begin() const { return parts; }
  const Span* end() const { return parts + count; }
};

// What the queries of a tile see together.
Spans spans_of(const Sight* sights, int64_t begin, int64_t stop) {
  Span prompt{stop, 0}, own{stop, stop};
  for (int64_t q = begin; q < stop; ++q) {
    const Sight sight = sights[q];
    own.first = std::min<int64_t>(own.first, sight.begin);
    if (sight.prompt_begin == sight.prompt_end) continue;
    prompt.first = std::min<int64_t>(prompt.first, sight.prompt_begin);
    prompt.end = std::max<int64_t>(prompt.end, sight.prompt_end);
  }
  if (prompt.first >= prompt.end) return {{own}, 1};
  if (prompt.panel_end() > own.panel_begin()) return {{{std::min(prompt.first, own.first), stop}}, 1};
  return {{prompt, own}, 2};
}

// Columns of the spans' panels that a query does not see get no share; of queries behind the last, all.
void blank(const Sight* sights, int64_t begin, int64_t stop, const Spans& spans, int64_t padded, float* scores) {
  for (int64_t q = begin; q < begin + TILE; ++q, scores += padded)
    for (const Span& span : spans) {
      const auto hide = [&](int64_t from, int64_t to) {
        from = std::max(from, span.from()), to = std::min(to, span.to());
        if (from < to) std::fill(scores + from, scores + to, LEAST);
      };
      if (q >= stop) {
        hide(span.from(), span.to());
        continue;
      }
      hide(0, sights[q].prompt_begin);
      hide(sights[q].prompt_end, sights[q].begin);
      hide(q + 1, padded);
    }
}

// (length, SIZE) into panels of (SIZE, PANEL), zeros behind the last position.
void transpose(const float* from, int64_t stride, int64_t length, float* panels) {
  for (int64_t begin = 0; begin < length; begin += PANEL, panels += SIZE * PANEL) {
    const int64_t columns = std::min(PANEL, length - begin);
    if (columns < PANEL) std::fill_n(panels, SIZE * PANEL, 0.f);
    at::vec::transpose_mxn<float>(from + begin * stride, stride, panels, PANEL, columns, SIZE);
  }
}

// TILE positions from `begin` on, times `scale`, without gaps; zeros behind the last.
void load_tile(const float* from, int64_t stride, int64_t begin, int64_t length, float scale, float* tile) {
  for (int64_t q = 0; q < TILE; ++q)
    for (int64_t i = 0; i < SIZE; i += LANES)
      (begin + q < length ? Vec::loadu(from + (begin + q) * stride + i) * Vec(scale) : Vec(0.f)).store(
          tile + q * SIZE + i);
}

// products (TILE, padded) of a tile with the columns of the span's panels.
void times_panels(const float* tile, const float* panels, const Span& span, int64_t padded, float* products) {
  for (int64_t p = span.panel_begin(); p < span.panel_end(); ++p) {
    const float* panel = panels + p * SIZE * PANEL;
    Vec sums[TILE][2];
    for (int64_t q = 0; q < TILE; ++q) sums[q][0] = sums[q][1] = Vec(0.f);
    for (int64_t i = 0; i < SIZE; ++i) {
      const Vec left = Vec::loadu(panel + i * PANEL), right = Vec::loadu(panel + i * PANEL + LANES);
      for (int64_t q = 0; q < TILE; ++q) {
        const Vec asked(tile[q * SIZE + i]);
        sums[q][0] = at::vec::fmadd(asked, left, sums[q][0]);
        sums[q][1] = at::vec::fmadd(asked, right, sums[q][1]);
      }
    }
    for (int64_t q = 0; q < TILE; ++q) {
      sums[q][0].store(products + q * padded + p * PANEL);
      sums[q][1].store(products + q * padded + p * PANEL + LANES);
    }
  }
}

// sums (TILE, SIZE) over the spans' columns of share · position.
void times_positions(
    const float* shares, int64_t padded, const float* from, int64_t stride, const Spans& spans, float* sums) {
  for (int64_t i = 0; i < SIZE; i += WIDTH * LANES) {
    Vec sum[TILE][WIDTH];
    for (int64_t q = 0; q < TILE; ++q)
      for (int64_t w = 0; w < WIDTH; ++w) sum[q][w] = Vec(0.f);
    for (const Span& span : spans)
      for (int64_t column = span.first; column < span.end; ++column) {
        Vec value[WIDTH];
        for (int64_t w = 0; w < WIDTH; ++w) value[w] = Vec::loadu(from + column * stride + i + w * LANES);
        for (int64_t q = 0; q < TILE; ++q) {
          const Vec share(shares[q * padded + column]);
          for (int64_t w = 0; w < WIDTH; ++w) sum[q][w] = at::vec::fmadd(share, value[w], sum[q][w]);
        }
      }
    for (int64_t q = 0; q < TILE; ++q)
      for (int64_t w = 0; w < WIDTH; ++w) sum[q][w].store(sums + q * SIZE + i + w * LANES);
  }
}

// Adds share · tile over the tile's queries to the span's columns of sums (length, SIZE).
void add_to_positions(const float* shares, int64_t padded, const float* tile, const Span& span, float* sums) {
  for (int64_t i = 0; i < SIZE; i += WIDTH * LANES) {
    Vec asked[TILE][WIDTH];
    for (int64_t q = 0; q < TILE; ++q)
      for (int64_t w = 0; w < WIDTH; ++w) asked[q][w] = Vec::loadu(tile + q * SIZE + i + w * LANES);
    for (int64_t column = span.first; column < span.end; ++column) {
      float* into = sums + column * SIZE + i;
      Vec sum[WIDTH];
      for (int64_t w = 0; w < WIDTH; ++w) sum[w] = Vec::loadu(into + w * LANES);
      for (int64_t q = 0; q < TILE; ++q) {
        const Vec share(shares[q * padded + column]);
        for (int64_t w = 0; w < WIDTH; ++w) sum[w] = at::vec::fmadd(share, asked[q][w], sum[w]);
      }
      for (int64_t w = 0; w < WIDTH; ++w) sum[w].store(into + w * LANES);
    }
  }
}

float sum_of(Vec parts) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, parts);
}

// Shares (unnormalised) in place of scores, and their sum and largest score.
void exponentials(float* scores, const Spans& spans, float& total, float& largest) {
  Vec most(LEAST);
  for (const Span& span : spans)
    for (int64_t c = span.from(); c < span.to(); c += LANES) most = at::vec::maximum(most, Vec::loadu(scores + c));
  largest = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, most);
  Vec totals(0.f);
  for (const Span& span : spans)
    for (int64_t c = span.from(); c < span.to(); c += LANES) {
      const Vec share = (Vec::loadu(scores + c) - Vec(largest)).exp_u20();
      share.store(scores + c);
      totals = totals + share;
    }
  total = sum_of(totals);
}

using Floats = std::unique_ptr<float[]>;

Floats floats(int64_t count) { return Floats(new float[count]); }  // not zeroed, as a vector would be

// What a call works on. A task is a part of the tiles of one row and one head of keys; there are as many parts as it
// takes to have a task for each thread.
struct Shape {
  Shape(int64_t rows, int64_t shared, int64_t group, int64_t length)
      : rows(rows), shared(shared), group(group), heads(shared * group), length(length),
        padded((length + PANEL - 1) / PANEL * PANEL),
        parts(std::max<int64_t>(1, at::get_num_threads() / (rows * shared))) {}
  int64_t rows, shared, group, heads, length, padded, parts;

  template <class Work>
  void for_tasks(const Work& work) const {
    at::parallel_for(0, rows * shared * parts, 1, [&](int64_t task, int64_t last) {
      for (; task < last; ++task) work(task / parts / shared, task / parts % shared, task % parts);
    });
  }
};

}  // namespace

// Pointers of (rows, heads, length, size) come with their strides of rows, heads and positions. out (rows, length,
// heads, size), log_z (rows, heads, length) and sights (rows, length) have no gaps. False if sights are not in order.
extern "C" bool attend_rows(
    const float* query, const int64_t* query_strides, const float* key, const int64_t* key_strides, const float* value,
    const int64_t* value_strides, const Sight* all_sights, float* out, float* log_z, int64_t rows, int64_t shared,
    int64_t group, int64_t length, float scale) {
  const Rows queries(query, query_strides), keys(key, key_strides), values(value, value_strides);
  const Shape shape(rows, shared, group, length);
  const int64_t heads = shape.heads, padded = shape.padded;
  if (!in_order(all_sights, rows, length)) return false;
  shape.for_tasks([&](int64_t r, int64_t s, int64_t part) {
    const Floats panels = floats(padded * SIZE), scores = floats(TILE * padded);
    float asked[TILE * SIZE], sums[TILE * SIZE];
    const Sight* sights = all_sights + r * length;
    transpose(keys.at(r, s), keys.position, length, panels.get());
    for (int64_t h = s * group; h < (s + 1) * group; ++h) {
      for (int64_t begin = part * TILE; begin < length; begin += shape.parts * TILE) {
        const int64_t stop = std::min(begin + TILE, length);
        const Spans spans = spans_of(sights, begin, stop);
        load_tile(queries.at(r, h), queries.position, begin, length, scale, asked);
        for (const Span& span : spans) times_panels(asked, panels.get(), span, padded, scores.get());
        blank(sights, begin, stop, spans, padded, scores.get());
        float total[TILE], largest[TILE];
        for (int64_t q = 0; q < TILE; ++q) exponentials(scores.get() + q * padded, spans, total[q], largest[q]);
        times_positions(scores.get(), padded, values.at(r, s), values.position, spans, sums);
        for (int64_t q = begin; q < stop; ++q) {
          float* to = out + ((r * length + q) * heads + h) * SIZE;
          const Vec divisor(total[q - begin]);
          for (int64_t i = 0; i < SIZE; i += LANES)
            (Vec::loadu(sums + (q - begin) * SIZE + i) / divisor).store(to + i);
          log_z[(r * heads + h) * length + q] = largest[q - begin] + std::log(total[q - begin]);
        }
      }
    }
  });
  return true;
}

// The gradients have the layout of out: (rows, length, heads, size).
extern "C" void attend_rows_backward(
    const float* query, const int64_t* query_strides, const float* key, const int64_t* key_strides, const float* value,
    const int64_t* value_strides, const Sight* all_sights, const float* out, const float* log_z, const float* grad,
    const int64_t* grad_strides, float* grad_query, float* grad_key, float* grad_value, int64_t rows, int64_t shared,
    int64_t group, int64_t length, float scale) {
  const Rows queries(query, query_strides), keys(key, key_strides), values(value, value_strides);
  const Rows grads(grad, grad_strides);
  const Shape shape(rows, shared, group, length);
  const int64_t heads = shape.heads, padded = shape.padded;
  const int64_t parts = shape.parts, of_part = rows * length * shared * SIZE;
  std::vector<float> more(2 * (parts - 1) * of_part);  // what the other parts add to the gradients of keys and values
  shape.for_tasks([&](int64_t r, int64_t s, int64_t part) {
    const Floats key_panels = floats(padded * SIZE), value_panels = floats(padded * SIZE);
    const Floats shares = floats(TILE * padded), slopes = floats(TILE * padded);
    const Floats of_keys = floats(length * SIZE), of_values = floats(length * SIZE);
    float asked[TILE * SIZE], given[TILE * SIZE], sums[TILE * SIZE];
    std::memset(of_keys.get(), 0, length * SIZE * sizeof(float));
    std::memset(of_values.get(), 0, length * SIZE * sizeof(float));
    const Sight* sights = all_sights + r * length;
    transpose(keys.at(r, s), keys.position, length, key_panels.get());
    transpose(values.at(r, s), values.position, length, value_panels.get());
    for (int64_t h = s * group; h < (s + 1) * group; ++h) {
      for (int64_t begin = part * TILE; begin < length; begin += parts * TILE) {
        const int64_t stop = std::min(begin + TILE, length);
        const Spans spans = spans_of(sights, begin, stop);
        load_tile(queries.at(r, h), queries.position, begin, length, scale, asked);
        load_tile(grads.at(r, h), grads.position, begin, length, 1.f, given);
        for (const Span& span : spans) {
          times_panels(asked, key_panels.get(), span, padded, shares.get());
          times_panels(given, value_panels.get(), span, padded, slopes.get());
        }
        blank(sights, begin, stop, spans, padded, shares.get());
        for (int64_t q = 0; q < TILE; ++q) {
          float along = 0, z = 0;  // ∂loss/∂out · out, and log Z
          if (begin + q < stop) {
            const float* said = out + ((r * length + begin + q) * heads + h) * SIZE;
            Vec products(0.f);
            for (int64_t i = 0; i < SIZE; i += LANES)
              products = at::vec::fmadd(Vec::loadu(given + q * SIZE + i), Vec::loadu(said + i), products);
            along = sum_of(products);
            z = log_z[(r * heads + h) * length + begin + q];
          }
          float *share = shares.get() + q * padded, *slope = slopes.get() + q * padded;
          for (const Span& span : spans)
            for (int64_t c = span.from(); c < span.to(); c += LANES) {
              const Vec p = (Vec::loadu(share + c) - Vec(z)).exp_u20();
              p.store(share + c);
              (p * (Vec::loadu(slope + c) - Vec(along))).store(slope + c);
            }
        }
        times_positions(slopes.get(), padded, keys.at(r, s), keys.position, spans, sums);
        for (int64_t q = begin; q < stop; ++q) {
          float* into = grad_query + ((r * length + q) * heads + h) * SIZE;
          for (int64_t i = 0; i < SIZE; i += LANES)
            (Vec::loadu(sums + (q - begin) * SIZE + i) * Vec(scale)).store(into + i);
        }
        for (const Span& span : spans) {
          add_to_positions(slopes.get(), padded, asked, span, of_keys.get());
          add_to_positions(shares.get(), padded, given, span, of_values.get());
        }
      }
    }
    float* into_keys = part ? more.data() + 2 * (part - 1) * of_part : grad_key;
    float* into_values = part ? into_keys + of_part : grad_value;
    for (int64_t c = 0; c < length; ++c) {
      const int64_t into = ((r * length + c) * shared + s) * SIZE;
      std::copy_n(of_keys.get() + c * SIZE, SIZE, into_keys + into);
      std::copy_n(of_values.get() + c * SIZE, SIZE, into_values + into);
    }
  });
  for (int64_t part = 1; part < parts; ++part) {
    const float* from = more.data() + 2 * (part - 1) * of_part;
    for (int64_t i = 0; i < of_part; i += LANES) {
      (Vec::loadu(grad_key + i) + Vec::loadu(from + i)).store(grad_key + i);
      (Vec::loadu(grad_value + i) + Vec::loadu(from + of_part + i)).store(grad_value + i);
    }
  }
}
