#include "table.h"

#include "bytes.h"
#include "crc32.h"
#include "utf8.h"

namespace edgeqdm {
namespace {

using layout::Array;

std::uint32_t scalar(const unsigned char* scalars, std::size_t offset) noexcept {
  return read_le<std::uint32_t>(scalars + offset);
}

bool integers_in_range(const unsigned char* scalars) noexcept {
  for (const layout::IntegerRange& range : layout::integers) {
    const std::uint32_t raw = scalar(scalars, range.offset);
    // Two's complement by hand: a conversion that overflows is the compiler's choice in C++17.
    const std::int64_t value =
        range.is_signed && raw > 0x7FFFFFFFu ? std::int64_t{raw} - (std::int64_t{1} << 32) : raw;
    if (value < range.low || value > range.high) return false;
  }
  return true;
}

Table read_scalars(const unsigned char* scalars) noexcept {
  Table table{};
  table.flags = scalar(scalars, layout::flags_offset);
  table.steps = scalar(scalars, layout::steps_offset);
  table.sample_history = scalar(scalars, layout::sample_history_offset);
  table.output_history = scalar(scalars, layout::output_history_offset);
  table.channels = scalar(scalars, layout::channels_offset);
  table.height = scalar(scalars, layout::height_offset);
  table.width = scalar(scalars, layout::width_offset);
  table.conditioning = scalar(scalars, layout::conditioning_offset);
  table.labels = scalar(scalars, layout::labels_offset);
  const std::uint32_t null_label = scalar(scalars, layout::null_label_offset);
  table.null_label = null_label > 0x7FFFFFFFu ? -1 : static_cast<std::int32_t>(null_label);
  table.conditioning_rank = scalar(scalars, layout::conditioning_rank_offset);
  for (std::size_t k = 0; k < layout::max_rank; ++k) {
    table.conditioning_size[k] = scalar(scalars, layout::conditioning_size_0_offset + 4 * k);
  }
  table.decoder = scalar(scalars, layout::decoder_offset);
  table.decoder_factor = scalar(scalars, layout::decoder_factor_offset);
  table.label_names = scalar(scalars, layout::label_names_offset);
  table.guidance = read_f32_le(scalars + layout::guidance_offset);
  table.initial_sigma = read_f32_le(scalars + layout::initial_sigma_offset);
  table.clip_limit = read_f32_le(scalars + layout::clip_limit_offset);
  table.largest_share = read_f32_le(scalars + layout::largest_share_offset);
  return table;
}

// Every size is capped by now, so that none of these products can overflow 64 bits.
bool sizes_agree(const Table& table) noexcept {
  std::uint64_t values = std::uint64_t{table.channels} * table.height * table.width;
  if (values > layout::max_values) return false;
  values = 1;
  for (std::uint32_t size : table.conditioning_size) {
    values *= size;
    if (values > layout::max_values) return false;
  }
  for (std::size_t k = table.conditioning_rank; k < layout::max_rank; ++k) {
    if (table.conditioning_size[k] != 1) return false;
  }
  const std::uint32_t factor = table.decoder_factor;
  if (table.decoder == layout::decoder_identity && factor != 1) return false;
  return table.channels % (factor * factor) == 0;
}

bool conditioning_agrees(const Table& table) noexcept {
  const bool by_label = table.conditioning == layout::conditioning_label;
  const bool by_embedding = table.conditioning == layout::conditioning_embedding;
  // The null label may be one more than there are labels to ask for.
  return by_label == (table.labels > 0) && (by_label || table.null_label == -1) &&
         table.null_label <= std::int64_t{table.labels} && table.label_names <= table.labels &&
         by_embedding == (table.conditioning_rank > 0);
}

bool flags_agree(const Table& table) noexcept {
  const bool learned = table.has(layout::flag_learned_variance);
  return (learned || !table.has(layout::flag_learned_bounds)) &&
         ((learned && table.has(layout::flag_correction)) || !table.has(layout::flag_absorbed));
}

bool scalars_have_values(const Table& table) noexcept {
  const float numbers[] = {table.guidance, table.initial_sigma, table.clip_limit,
                           table.largest_share};
  return all_finite(numbers, sizeof numbers / sizeof numbers[0]) && table.guidance >= 0.0f &&
         table.initial_sigma > 0.0f && table.clip_limit >= 0.0f && table.largest_share >= 0.0f &&
         table.largest_share <= 1.0f;
}

float at(const Table& table, Array array, std::uint64_t step, std::uint32_t column) noexcept {
  return read_f32_le(table.rows[array] + 4 * (step * table.columns[array] + column));
}

bool arrays_are_finite(const Table& table) noexcept {
  for (std::size_t k = 0; k < layout::n_arrays; ++k) {
    if (table.rows[k] == nullptr) continue;
    for (std::uint32_t step = 0; step < table.steps; ++step) {
      for (std::uint32_t column = 0; column < table.columns[k]; ++column) {
        if (!is_finite(at(table, static_cast<Array>(k), step, column))) return false;
      }
    }
  }
  return true;
}

// PNDM evaluates some timesteps twice, hence "never ascend", not "descend".
bool timesteps_never_ascend(const Table& table) noexcept {
  for (std::uint32_t step = 0; step < table.steps; ++step) {
    const float timestep = at(table, layout::timesteps, step, 0);
    if (timestep < 0.0f) return false;
    if (step > 0 && timestep > at(table, layout::timesteps, step - 1, 0)) return false;
  }
  return true;
}

bool history_exists(const Table& table, Array array) noexcept {
  for (std::uint32_t step = 0; step < table.steps; ++step) {
    for (std::uint32_t age = step + 1; age < table.columns[array]; ++age) {
      if (at(table, array, step, age) != 0.0f) return false;
    }
  }
  return true;
}

bool noise_is_not_negative(const Table& table) noexcept {
  for (std::uint32_t step = 0; step < table.steps; ++step) {
    if (at(table, layout::golden_noise_rms, step, 0) < 0.0f) return false;
  }
  return true;
}

}  // namespace

TableStatus table_open(const void* bytes, std::size_t n, Table* table) noexcept {
  if (bytes == nullptr || table == nullptr) return TableStatus::null;
  const auto* data = static_cast<const unsigned char*>(bytes);
  if (n < layout::header_bytes + layout::scalars_bytes) return TableStatus::size;
  for (std::size_t k = 0; k < sizeof layout::magic; ++k) {
    if (data[k] != layout::magic[k]) return TableStatus::magic;
  }
  if (read_le<std::uint32_t>(data + layout::version_offset) != layout::version) {
    return TableStatus::version;
  }
  if (read_le<std::uint64_t>(data + layout::size_offset) != n) return TableStatus::size;
#ifndef EDGEQDM_FUZZ_NO_CRC
  const std::uint32_t sum = crc32(0, data + layout::header_bytes, n - layout::header_bytes);
  if (read_le<std::uint32_t>(data + layout::crc_offset) != sum) return TableStatus::crc;
#endif
  const unsigned char* scalars = data + layout::header_bytes;
  if (!integers_in_range(scalars)) return TableStatus::range;
  Table found = read_scalars(scalars);
  if (!sizes_agree(found) || !conditioning_agrees(found) || !flags_agree(found)) {
    return TableStatus::range;
  }
  std::uint64_t need = layout::header_bytes + layout::scalars_bytes;
  for (std::size_t k = 0; k < layout::n_arrays; ++k) {
    const layout::Rows& rows = layout::rows[k];
    found.columns[k] =
        rows.width_offset == layout::one_column ? 1 : scalar(scalars, rows.width_offset);
    if (rows.flag != layout::flag_always && !found.has(rows.flag)) continue;
    const std::uint64_t array_bytes = std::uint64_t{4} * found.steps * found.columns[k];
    if (array_bytes > n - need) return TableStatus::size;
    found.rows[k] = data + need;
    need += array_bytes;
  }
  found.names = data + need;
  for (std::uint32_t k = 0; k < found.label_names; ++k) {
    if (n - need < 2) return TableStatus::size;
    const std::uint64_t length = read_le<std::uint16_t>(data + need);
    need += 2;
    if (length > n - need) return TableStatus::size;
    if (!is_utf8(data + need, static_cast<std::size_t>(length))) return TableStatus::value;
    need += length;
  }
  if (need != n) return TableStatus::size;
  if (!scalars_have_values(found) || !arrays_are_finite(found) || !timesteps_never_ascend(found) ||
      !history_exists(found, layout::sample_weights) ||
      !history_exists(found, layout::output_weights) || !noise_is_not_negative(found)) {
    return TableStatus::value;
  }
  *table = found;
  return TableStatus::ok;
}

TableStatus table_row(const Table& table, Array array, std::uint32_t step, float* values,
                      std::size_t n) noexcept {
  if (values == nullptr) return TableStatus::null;
  if (array >= layout::n_arrays || table.rows[array] == nullptr) return TableStatus::range;
  if (step >= table.steps) return TableStatus::step;
  if (n != table.columns[array]) return TableStatus::size;
  for (std::uint32_t k = 0; k < table.columns[array]; ++k) values[k] = at(table, array, step, k);
  return TableStatus::ok;
}

TableStatus table_value(const Table& table, Array array, std::uint32_t step,
                        float* value) noexcept {
  return table_row(table, array, step, value, 1);
}

TableStatus table_label_name(const Table& table, std::uint32_t label, const char** name,
                             std::size_t* length) noexcept {
  if (name == nullptr || length == nullptr) return TableStatus::null;
  if (label >= table.label_names) return TableStatus::range;
  const unsigned char* entry = table.names;
  for (std::uint32_t k = 0; k < label; ++k) entry += 2 + read_le<std::uint16_t>(entry);
  *length = read_le<std::uint16_t>(entry);
  *name = reinterpret_cast<const char*>(entry + 2);
  return TableStatus::ok;
}

const char* table_status_text(TableStatus status) noexcept {
  switch (status) {
    case TableStatus::ok: return "ok";
    case TableStatus::null: return "no table";
    case TableStatus::size: return "cut off or of a wrong size";
    case TableStatus::magic: return "not a sampler's table";
    case TableStatus::version: return "of another version";
    case TableStatus::crc: return "damaged (CRC-32)";
    case TableStatus::range: return "a size or kind out of range";
    case TableStatus::value: return "a number that makes no sense";
    case TableStatus::step: return "no such step";
  }
  return "unknown";
}

}  // namespace edgeqdm
