// The output of the heads that are on, list by list.
#pragma once

#include "aggregated.h"

namespace headwise {

template <typename T, int64_t CHANNELS>
void aggregate(const Map& z, const MapInputs& x, Tensor& y) {
  T* out_of = y.mutable_data_ptr<T>();
  share_out(z.batch * z.heads, [&] {
    return [&, list = MapList<T, CHANNELS>(z, x), p = Buffer<T>(HALF<T> ? MAP_ROWS * z.columns : 0),
            out = Buffer<float>(MAP_ROWS * z.channels)](int64_t i) mutable {
      const int64_t b = i / z.heads, h = i % z.heads, c = list.channels();
      if (!list.enter(b, h)) return;
      const auto& rows = list.rows;
      for (size_t first = 0; first < rows.size(); first += MAP_ROWS) {
        const int64_t count = std::min<int64_t>(MAP_ROWS, rows.size() - first);
        const int64_t padded = round_up(count, MAP_MULTIPLE);
        float* weights = list.weights.data();
        list.weigh(rows.data() + first, count);
        if (z.pooled) {
          if constexpr (HALF<T>) store(p.data(), weights, count * z.columns);
          // Columns beyond the pooled keys meet values of 0.
          multiply(
              padded, c, z.far_columns, HALF<T> ? p.data() : reinterpret_cast<const T*>(weights),
              z.columns, list.far_values.data(), c, out.data(), c, false);
        } else {
          std::fill_n(out.data(), count * c, 0.0f);
        }
        for (int64_t r = 0; r < count; ++r) {
          const int64_t t = rows[first + r], place = z.place(b, t, h);
          float *near = weights + r * z.columns + z.pooled, *row = out.data() + r * c;
          for (int64_t w = 0; w < z.near; ++w) near[w] += list.learned[r * z.near_columns + w];
          add_multiples(row, near, list.values.data() + z.corner(t), z.steps, c);
          const float gate = list.gates[place];
          for (int64_t j = 0; j < c; ++j) row[j] *= gate;
          store(out_of + place * c, row, c);
        }
      }
    };
  });
}

}  // namespace headwise
