// A strict reader of small JSON documents: UTF-8, unique keys, at most 16 MiB and 32 levels.
// Numbers stay text, so that no locale has a say.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace edgeqdm {

inline constexpr std::size_t max_json_bytes = std::size_t{16} << 20;

struct Json {
  enum class Kind { null, boolean, number, string, array, object };

  Kind kind = Kind::null;
  bool truth = false;
  std::string text;  // of a number, as written; of a string, decoded
  std::vector<Json> items;
  std::map<std::string, Json> fields;

  // The field, or an Error that names it. Fields of other kinds than an object are missing.
  const Json& field(const std::string& name) const;
  // The value, or an Error that names `name`.
  const std::string& string(const std::string& name) const;
  std::uint64_t natural(const std::string& name) const;  // below 10^18
};

// Throws Error, VERIFY, saying what is wrong and at which byte.
Json parse_json(const unsigned char* bytes, std::size_t n);

}  // namespace edgeqdm
