#include "json_text.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "error.h"

namespace edgeqdm::bench {
namespace {

template <typename T, typename Text>
std::string listed(const std::vector<T>& values, const Text& text) {
  std::string all;
  for (const T& value : values) all += (all.empty() ? "" : ",") + text(value);
  return "[" + all + "]";
}

}  // namespace

std::string number_text(double value) {
  char text[40];
  for (int digits = 1; digits <= 17; ++digits) {
    std::snprintf(text, sizeof text, "%.*g", digits, value);
    if (std::strtod(text, nullptr) == value) break;
  }
  const std::string found = text;
  return found.find_first_of(".en") == std::string::npos ? found + ".0" : found;
}

std::string numbers_text(const std::vector<double>& values) { return listed(values, number_text); }

std::string naturals_text(const std::vector<std::uint64_t>& values) {
  return listed(values, [](std::uint64_t value) { return std::to_string(value); });
}

std::string quoted(const std::string& text) {
  std::string shown = "\"";
  for (char c : text) {
    const bool plain = c >= ' ' && c <= '~';
    if (c == '"' || c == '\\') shown += '\\';
    shown += plain ? c : '?';
  }
  return shown + "\"";
}

std::string quoted_list(const std::vector<std::string>& texts) { return listed(texts, quoted); }

double real(const Json& value, const std::string& name) {
  if (value.kind != Json::Kind::number) throw Error(EDGEQDM_VERIFY, name + " is not a number");
  return std::strtod(value.text.c_str(), nullptr);
}

bool same(const Json& a, const Json& b) {
  if (a.kind != b.kind) return false;
  switch (a.kind) {
    case Json::Kind::null: return true;
    case Json::Kind::boolean: return a.truth == b.truth;
    case Json::Kind::number: return real(a, "") == real(b, "");
    case Json::Kind::string: return a.text == b.text;
    case Json::Kind::array:
      return std::equal(a.items.begin(), a.items.end(), b.items.begin(), b.items.end(), same);
    case Json::Kind::object: break;
  }
  return std::equal(a.fields.begin(), a.fields.end(), b.fields.begin(), b.fields.end(),
                    [](const auto& x, const auto& y) {
                      return x.first == y.first && same(x.second, y.second);
                    });
}

}  // namespace edgeqdm::bench
