#include "json.h"

#include <utility>

#include "error.h"
#include "utf8.h"

namespace edgeqdm {
namespace {

constexpr int max_depth = 32;
constexpr std::size_t max_values = 200000;

[[noreturn]] void refuse(const std::string& reason) { throw Error(EDGEQDM_VERIFY, reason); }

class Parser {
 public:
  Parser(const char* text, std::size_t n) : at_(text), begin_(text), end_(text + n) {}

  Json document() {
    Json value = parse(0);
    space();
    if (at_ != end_) fail("more than one value");
    return value;
  }

 private:
  [[noreturn]] void fail(const char* reason) const {
    refuse(std::string(reason) + " at byte " + std::to_string(at_ - begin_));
  }

  char peek() const noexcept { return at_ < end_ ? *at_ : '\0'; }

  void space() noexcept {
    while (at_ < end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\r' || *at_ == '\t')) ++at_;
  }

  void expect(char wanted) {
    space();
    if (peek() != wanted) fail("not valid JSON");
    ++at_;
  }

  bool accept(char wanted) {
    space();
    if (peek() != wanted) return false;
    ++at_;
    return true;
  }

  Json parse(int depth) {
    if (depth > max_depth) fail("nested too deeply");
    if (++n_values_ > max_values) fail("too many values");
    space();
    switch (peek()) {
      case '{': return object(depth);
      case '[': return array(depth);
      case '"': {
        Json value;
        value.kind = Json::Kind::string;
        value.text = string();
        return value;
      }
      case 't': return word("true", Json::Kind::boolean, true);
      case 'f': return word("false", Json::Kind::boolean, false);
      case 'n': return word("null", Json::Kind::null, false);
      default: return number();
    }
  }

  Json object(int depth) {
    Json value;
    value.kind = Json::Kind::object;
    expect('{');
    if (accept('}')) return value;
    do {
      space();
      std::string key = string();
      expect(':');
      Json held = parse(depth + 1);
      if (!value.fields.emplace(std::move(key), std::move(held)).second) fail("duplicate key");
    } while (accept(','));
    expect('}');
    return value;
  }

  Json array(int depth) {
    Json value;
    value.kind = Json::Kind::array;
    expect('[');
    if (accept(']')) return value;
    do {
      value.items.push_back(parse(depth + 1));
    } while (accept(','));
    expect(']');
    return value;
  }

  Json word(const char* wanted, Json::Kind kind, bool truth) {
    for (const char* c = wanted; *c != '\0'; ++c) {
      if (peek() != *c) fail("not valid JSON");
      ++at_;
    }
    Json value;
    value.kind = kind;
    value.truth = truth;
    return value;
  }

  bool digits() {
    const char* first = at_;
    while (peek() >= '0' && peek() <= '9') ++at_;
    return at_ != first;
  }

  Json number() {
    const char* first = at_;
    if (peek() == '-') ++at_;
    const bool zero = peek() == '0';
    const char* whole = at_;
    if (!digits() || (zero && at_ - whole > 1)) fail("not valid JSON");
    if (peek() == '.') {
      ++at_;
      if (!digits()) fail("not valid JSON");
    }
    if (peek() == 'e' || peek() == 'E') {
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      if (!digits()) fail("not valid JSON");
    }
    Json value;
    value.kind = Json::Kind::number;
    value.text.assign(first, at_);
    return value;
  }

  unsigned hex4() {
    unsigned code = 0;
    for (int k = 0; k < 4; ++k) {
      const char c = peek();
      unsigned digit = 0;
      if (c >= '0' && c <= '9') digit = static_cast<unsigned>(c - '0');
      else if (c >= 'a' && c <= 'f') digit = static_cast<unsigned>(c - 'a' + 10);
      else if (c >= 'A' && c <= 'F') digit = static_cast<unsigned>(c - 'A' + 10);
      else fail("not valid JSON");
      code = 16 * code + digit;
      ++at_;
    }
    return code;
  }

  unsigned code_point() {
    const unsigned code = hex4();
    if (code < 0xD800 || code > 0xDFFF) return code;
    if (code > 0xDBFF || peek() != '\\') fail("a lone surrogate");
    ++at_;
    if (peek() != 'u') fail("a lone surrogate");
    ++at_;
    const unsigned low = hex4();
    if (low < 0xDC00 || low > 0xDFFF) fail("a lone surrogate");
    return 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
  }

  static void append(std::string& text, unsigned code) {
    const auto byte = [&text](unsigned value) { text += static_cast<char>(value); };
    if (code < 0x80) {
      byte(code);
    } else if (code < 0x800) {
      byte(0xC0 | code >> 6);
      byte(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
      byte(0xE0 | code >> 12);
      byte(0x80 | (code >> 6 & 0x3F));
      byte(0x80 | (code & 0x3F));
    } else {
      byte(0xF0 | code >> 18);
      byte(0x80 | (code >> 12 & 0x3F));
      byte(0x80 | (code >> 6 & 0x3F));
      byte(0x80 | (code & 0x3F));
    }
  }

  std::string string() {
    if (peek() != '"') fail("not valid JSON");
    ++at_;
    std::string text;
    while (at_ < end_ && *at_ != '"') {
      if (static_cast<unsigned char>(*at_) < 0x20) fail("a control character in a string");
      if (*at_ != '\\') {
        text += *at_++;
        continue;
      }
      ++at_;
      escaped(text);
    }
    if (at_ == end_) fail("a string without its end");
    ++at_;
    return text;
  }

  void escaped(std::string& text) {
    const char kind = peek();
    if (at_ < end_) ++at_;
    switch (kind) {
      case '"': text += '"'; break;
      case '\\': text += '\\'; break;
      case '/': text += '/'; break;
      case 'b': text += '\b'; break;
      case 'f': text += '\f'; break;
      case 'n': text += '\n'; break;
      case 'r': text += '\r'; break;
      case 't': text += '\t'; break;
      case 'u': append(text, code_point()); break;
      default: fail("not valid JSON");
    }
  }

  const char* at_;
  const char* begin_;
  const char* end_;
  std::size_t n_values_ = 0;
};

}  // namespace

const Json& Json::field(const std::string& name) const {
  const auto found = fields.find(name);
  if (found == fields.end()) refuse("no field " + name);
  return found->second;
}

const std::string& Json::string(const std::string& name) const {
  if (kind != Kind::string) refuse(name + " is not a string");
  return text;
}

std::uint64_t Json::natural(const std::string& name) const {
  std::uint64_t value = 0;
  // 18 digits cannot overflow 64 bits, and no file is that large.
  bool good = kind == Kind::number && text.size() <= 18;
  for (char digit : text) {
    good = good && digit >= '0' && digit <= '9';
    if (good) value = 10 * value + static_cast<std::uint64_t>(digit - '0');
  }
  if (!good) refuse(name + " is not a whole number");
  return value;
}

Json parse_json(const unsigned char* bytes, std::size_t n) {
  if (n > max_json_bytes) refuse("larger than 16 MiB");
  if (!is_utf8(bytes, n)) refuse("not UTF-8");
  return Parser(reinterpret_cast<const char*>(bytes), n).document();
}

}  // namespace edgeqdm
