#include "tensors.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <utility>

#include "bytes.h"
#include "error.h"
#include "json.h"

namespace edgeqdm {
namespace {

constexpr std::size_t max_rank = 32;
constexpr unsigned char npy_magic[] = {0x93, 'N', 'U', 'M', 'P', 'Y'};

[[noreturn]] void damaged(const std::string& reason) { throw Error(EDGEQDM_VERIFY, reason); }

// Number of values, or false where it does not fit into `limit`.
bool count_values(const std::vector<std::uint64_t>& shape, std::uint64_t limit,
                  std::uint64_t* count) {
  std::uint64_t n = 1;
  for (std::uint64_t size : shape) {
    if (size != 0 && n > limit / size) return false;
    n *= size;
  }
  *count = n;
  return n <= limit;
}

// Where a safetensors file has the values of a tensor, in bytes from the end of its header.
struct Entry {
  std::string name;
  std::vector<std::uint64_t> shape;
  std::uint64_t width = 0;  // bytes of one value; 4 is F32, 8 is I64
  std::uint64_t start = 0, stop = 0;
};

Entry parse_entry(const std::string& name, const Json& entry, std::uint64_t n_bytes) {
  const std::string& dtype = entry.field("dtype").string("dtype");
  if (dtype != "F32" && dtype != "I64") damaged("a tensor of " + printable(dtype));
  Entry found;
  found.name = name;
  found.width = dtype == "F32" ? 4 : 8;
  const Json& shape = entry.field("shape");
  if (shape.kind != Json::Kind::array || shape.items.size() > max_rank) damaged("a wrong shape");
  for (const Json& size : shape.items) found.shape.push_back(size.natural("shape"));
  const Json& offsets = entry.field("data_offsets");
  if (offsets.items.size() != 2) damaged("wrong data_offsets");
  found.start = offsets.items[0].natural("data_offsets");
  found.stop = offsets.items[1].natural("data_offsets");
  std::uint64_t count = 0;
  if (found.start > found.stop || found.stop > n_bytes ||
      !count_values(found.shape, n_bytes / found.width, &count) ||
      count * found.width != found.stop - found.start) {
    damaged("a tensor beyond the end of the file");
  }
  return found;
}

// As the format demands: no byte twice, or a small file would become many large tensors.
void check_tiling(std::vector<Entry> entries, std::uint64_t n_bytes) {
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::make_pair(a.start, a.stop) < std::make_pair(b.start, b.stop);
  });
  std::uint64_t covered = 0;
  for (const Entry& entry : entries) {
    if (entry.start != covered) {
      damaged(printable(entry.name) + (entry.start < covered ? " overlaps another tensor"
                                                             : " leaves a hole before it"));
    }
    covered = entry.stop;
  }
  if (covered != n_bytes) damaged("bytes that belong to no tensor");
}

Tensor read_values(const Entry& entry, const unsigned char* data) {
  Tensor tensor;
  tensor.shape = entry.shape;
  for (std::uint64_t place = entry.start; place < entry.stop; place += entry.width) {
    const unsigned char* at = data + place;
    if (entry.width == 4) {
      tensor.floats.push_back(read_f32_le(at));
    } else {
      std::int64_t value;
      const std::uint64_t bits = read_le<std::uint64_t>(at);
      std::memcpy(&value, &bits, sizeof value);
      tensor.integers.push_back(value);
    }
  }
  return tensor;
}

// What the header of a .npy file says, in the only form numpy writes it.
struct NpyHeader {
  std::string descr;
  bool fortran_order = false;
  std::vector<std::uint64_t> shape;
};

class NpyParser {
 public:
  explicit NpyParser(const std::string& text) : text_(text) {}

  // False where the header is none.
  bool parse(NpyHeader* header) {
    if (!accept("{")) return false;
    bool descr = false, order = false, shape = false;
    while (!accept("}")) {
      std::string key;
      if (!quoted(&key) || !accept(":")) return false;
      if (key == "descr" && !descr) {
        descr = quoted(&header->descr);
        if (!descr) return false;
      } else if (key == "fortran_order" && !order) {
        header->fortran_order = accept("True");
        order = header->fortran_order || accept("False");
        if (!order) return false;
      } else if (key == "shape" && !shape) {
        shape = tuple(&header->shape);
        if (!shape) return false;
      } else {
        return false;
      }
      if (accept(",")) continue;
      if (!accept("}")) return false;
      break;
    }
    space();
    return descr && order && shape && at_ == text_.size();
  }

 private:
  void space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
  }

  bool accept(const char* word) {
    space();
    const std::size_t n = std::strlen(word);
    if (text_.compare(at_, n, word) != 0) return false;
    at_ += n;
    return true;
  }

  bool quoted(std::string* found) {
    space();
    if (at_ >= text_.size() || (text_[at_] != '\'' && text_[at_] != '"')) return false;
    const std::size_t end = text_.find(text_[at_], at_ + 1);
    if (end == std::string::npos) return false;
    *found = text_.substr(at_ + 1, end - at_ - 1);
    at_ = end + 1;
    return true;
  }

  bool tuple(std::vector<std::uint64_t>* shape) {
    if (!accept("(")) return false;
    while (!accept(")")) {
      std::uint64_t size = 0;
      const std::size_t first = at_;
      while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9' && at_ - first < 18) {
        size = 10 * size + static_cast<std::uint64_t>(text_[at_++] - '0');
      }
      if (at_ == first || shape->size() == max_rank) return false;
      shape->push_back(size);
      if (accept(",")) continue;
      if (!accept(")")) return false;
      break;
    }
    return true;
  }

  const std::string& text_;
  std::size_t at_ = 0;
};

double half(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  double value = std::ldexp(fraction, -24);
  if (exponent == 31) value = fraction == 0 ? INFINITY : NAN;
  else if (exponent > 0) value = std::ldexp(1024 + fraction, exponent - 25);
  return (bits & 0x8000) != 0 ? -value : value;
}

double read_number(const unsigned char* bytes, std::size_t width, bool big_endian) {
  unsigned char ordered[8] = {};
  for (std::size_t k = 0; k < width; ++k) ordered[k] = bytes[big_endian ? width - 1 - k : k];
  if (width == 2) return half(read_le<std::uint16_t>(ordered));
  if (width == 4) return static_cast<double>(read_f32_le(ordered));
  return read_f64_le(ordered);
}

// Where value k in row-major order stands in column-major order.
std::uint64_t fortran_place(std::uint64_t k, const std::vector<std::uint64_t>& shape) {
  std::uint64_t place = 0, count = 1;
  for (std::uint64_t size : shape) count *= size;
  std::uint64_t stride = 1;
  for (std::uint64_t size : shape) {
    count /= size;
    place += k / count % size * stride;
    stride *= size;
  }
  return place;
}

}  // namespace

std::map<std::string, Tensor> parse_safetensors(const Bytes& data) {
  if (data.size() < 8) damaged("cut off");
  const std::uint64_t header_size = read_le<std::uint64_t>(data.data());
  if (header_size > data.size() - 8) damaged("cut off");
  const auto n_header = static_cast<std::size_t>(header_size);
  const Json header = parse_json(data.data() + 8, n_header);
  if (header.kind != Json::Kind::object) damaged("the header is not an object");
  const std::uint64_t n_bytes = data.size() - 8 - n_header;
  std::vector<Entry> entries;
  for (const auto& [name, entry] : header.fields) {
    if (name != "__metadata__") entries.push_back(parse_entry(name, entry, n_bytes));
  }
  check_tiling(entries, n_bytes);
  std::map<std::string, Tensor> tensors;
  for (const Entry& entry : entries) {
    tensors[entry.name] = read_values(entry, data.data() + 8 + n_header);
  }
  return tensors;
}

Tensor parse_npy(const Bytes& data, const std::string& name) {
  const auto refuse = [&name](const std::string& reason) {
    throw Error(EDGEQDM_INPUT, printable(name) + " " + reason);
  };
  const auto damaged_npy = [&refuse](const char* reason) {
    refuse(std::string("is not a .npy file: ") + reason);
  };
  if (data.size() < 10 || std::memcmp(data.data(), npy_magic, sizeof npy_magic) != 0) {
    damaged_npy("no magic number");
  }
  const unsigned version = data[6];
  if (version < 1 || version > 3 || data[7] != 0) damaged_npy("an unknown version");
  const std::size_t start = version == 1 ? 10 : 12;
  if (data.size() < start) damaged_npy("cut off");
  const std::size_t length =
      version == 1 ? read_le<std::uint16_t>(&data[8]) : read_le<std::uint32_t>(&data[8]);
  if (length > data.size() - start) damaged_npy("cut off");
  NpyHeader header;
  const unsigned char* text = data.data() + start;
  const std::string header_text(text, text + length);
  if (!NpyParser(header_text).parse(&header)) damaged_npy("a wrong header");
  const std::string& descr = header.descr;
  if (descr.size() != 3 || (descr[0] != '<' && descr[0] != '>') || descr[1] != 'f' ||
      (descr[2] != '2' && descr[2] != '4' && descr[2] != '8')) {
    refuse("holds " + printable(descr.substr(0, 40)) + ", embeddings are floats");
  }
  const auto width = static_cast<std::size_t>(descr[2] - '0');
  const std::uint64_t n_bytes = data.size() - start - length;
  std::uint64_t count = 0;
  if (!count_values(header.shape, n_bytes / width, &count)) damaged_npy("cut off");
  if (count * width != n_bytes) damaged_npy("bytes after its end");
  if (header.shape.empty() || header.shape[0] == 0) refuse("does not hold one embedding per image");
  Tensor tensor;
  tensor.shape = header.shape;
  tensor.floats.reserve(static_cast<std::size_t>(count));
  for (std::uint64_t k = 0; k < count; ++k) {
    const std::uint64_t place = header.fortran_order ? fortran_place(k, header.shape) : k;
    const double value =
        read_number(text + length + place * width, width, descr[0] == '>');
    // Rounding up to infinity starts half a unit in the last place beyond the largest float.
    if (!(std::fabs(value) < 0x1.ffffffp127)) refuse("holds NaN or a value beyond float32");
    tensor.floats.push_back(static_cast<float>(value));
  }
  return tensor;
}

Bytes npy_of(const float* values, const std::vector<std::uint64_t>& shape) {
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (";
  std::size_t count = 1;
  for (std::uint64_t size : shape) {
    header += std::to_string(size) + ", ";
    count *= static_cast<std::size_t>(size);
  }
  header.erase(header.size() - (shape.size() > 1 ? 2 : 1));
  header += "), }";
  // The values start at a multiple of 64 bytes; the header ends with a line break.
  while ((10 + header.size() + 1) % 64 != 0) header += ' ';
  header += '\n';
  Bytes data;
  for (unsigned char byte : npy_magic) data.push_back(byte);
  const std::size_t length = header.size();
  for (std::size_t byte : {std::size_t{1}, std::size_t{0}, length & 0xFF, length >> 8}) {
    data.push_back(static_cast<unsigned char>(byte));
  }
  data.insert(data.end(), header.begin(), header.end());
  data.reserve(data.size() + 4 * count);
  for (std::size_t k = 0; k < count; ++k) {
    std::uint32_t bits;
    std::memcpy(&bits, &values[k], sizeof bits);
    for (int shift = 0; shift < 32; shift += 8) {
      data.push_back(static_cast<unsigned char>(bits >> shift));
    }
  }
  return data;
}

}  // namespace edgeqdm
