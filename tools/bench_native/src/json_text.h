// Numbers and strings as JSON text, and numbers out of it. Nothing here or elsewhere in this
// program sets a locale, so that of C holds and the decimal sign is a point.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "json.h"

namespace edgeqdm::bench {

// The fewest digits that read back to the same number, with a point or an exponent.
std::string number_text(double value);
// "a, b, c" in brackets.
std::string numbers_text(const std::vector<double>& values);
std::string naturals_text(const std::vector<std::uint64_t>& values);

// Quoted; '"' and '\' are escaped, control characters and what is no ASCII become '?'.
std::string quoted(const std::string& text);
std::string quoted_list(const std::vector<std::string>& texts);

// The number, or an Error that names `name`; infinite where the text is too large.
double real(const Json& value, const std::string& name);

// Whether the two are of one kind and value; numbers are compared as float64.
bool same(const Json& a, const Json& b);

}  // namespace edgeqdm::bench
