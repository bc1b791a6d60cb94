// Loader of schedule.bin. It allocates nothing, throws nothing and needs no other object file.
#pragma once

#include <cstddef>
#include <cstdint>

#include "table_layout.h"

namespace edgeqdm {

enum class TableStatus {
  ok,
  null,     // an argument is NULL
  size,     // cut off, too long, or not the length its own numbers ask for
  magic,    // another kind of file
  version,  // of another layout
  crc,      // changed
  range,    // a size or a kind is out of its range
  value,    // a number is not finite or makes no sense
  step,     // no such step
};

// A view of a table's bytes, which must outlive it. Scalars have the names of the layout.
struct Table {
  std::uint32_t flags;
  std::uint32_t steps;
  std::uint32_t sample_history;
  std::uint32_t output_history;
  std::uint32_t channels;
  std::uint32_t height;
  std::uint32_t width;
  std::uint32_t conditioning;
  std::uint32_t labels;
  std::int32_t null_label;  // -1: none
  std::uint32_t conditioning_rank;
  std::uint32_t conditioning_size[layout::max_rank];
  std::uint32_t decoder;
  std::uint32_t decoder_factor;
  std::uint32_t label_names;
  float guidance;
  float initial_sigma;
  float clip_limit;
  float largest_share;
  const unsigned char* rows[layout::n_arrays];  // NULL where the array is absent
  std::uint32_t columns[layout::n_arrays];
  const unsigned char* names;

  bool has(layout::Flag flag) const noexcept { return (flags & flag) != 0; }
};

// Checks every byte; `*table` is written only where all is well. `bytes` may be misaligned.
TableStatus table_open(const void* bytes, std::size_t n, Table* table) noexcept;

// Copies the row of a step; `n` must be the array's number of columns. `range`: it is absent.
TableStatus table_row(const Table& table, layout::Array array, std::uint32_t step, float* values,
                      std::size_t n) noexcept;

// One number of an array of one column.
TableStatus table_value(const Table& table, layout::Array array, std::uint32_t step,
                        float* value) noexcept;

// Name of a label, UTF-8, not NUL-terminated, inside the table's bytes. `range`: it has none.
TableStatus table_label_name(const Table& table, std::uint32_t label, const char** name,
                             std::size_t* length) noexcept;

// What a status means, in words.
const char* table_status_text(TableStatus status) noexcept;

}  // namespace edgeqdm
