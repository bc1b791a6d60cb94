#include "manifest.h"

#include <algorithm>

#include "edgeqdm.h"
#include "error.h"
#include "json.h"
#include "sha256.h"

namespace edgeqdm {
namespace {

constexpr const char* manifest_name = "manifest.json";
constexpr std::size_t max_path_bytes = 200;

std::string shown(const Json& value) {
  switch (value.kind) {
    case Json::Kind::number: return value.text;
    case Json::Kind::string: return "'" + printable(value.text.substr(0, 40)) + "'";
    case Json::Kind::boolean: return value.truth ? "true" : "false";
    case Json::Kind::null: return "null";
    default: return "no number";
  }
}

// Whether `seal` is the SHA-256 of the manifest's bytes with its own digits, which stand there
// once, made zeros.
bool is_sealed(const Bytes& data, const std::string& seal) {
  if (seal.size() != 64) return false;
  Bytes blank = data;
  int count = 0;
  auto found = blank.begin();
  while (true) {
    found = std::search(found, blank.end(), seal.begin(), seal.end());
    if (found == blank.end()) break;
    std::fill_n(found, seal.size(), static_cast<unsigned char>('0'));
    found += static_cast<std::ptrdiff_t>(seal.size());
    ++count;
  }
  Sha256 sha256;
  sha256.update(blank.data(), blank.size());
  return count == 1 && sha256.hex() == seal;
}

void check_version(const Json& document) {
  const Json& version = document.field("schema_version");
  if (version.kind == Json::Kind::number &&
      version.text == std::to_string(EDGEQDM_SCHEMA_VERSION)) {
    return;
  }
  throw Error(EDGEQDM_VERIFY, "manifest.json has schema_version " + shown(version) +
                                  ", this runtime reads " +
                                  std::to_string(EDGEQDM_SCHEMA_VERSION) +
                                  " - use the runtime that came with the package");
}

std::string lower(std::string text) {
  for (char& c : text) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return text;
}

// A case-insensitive file system would merge two paths, or folders of theirs.
bool differs_in_case_only(const std::string& path, std::map<std::string, std::string>& spelling) {
  for (std::size_t end = path.find('/');; end = path.find('/', end + 1)) {
    const std::string part = path.substr(0, end);
    if (spelling.emplace(lower(part), part).first->second != part) return true;
    if (end == std::string::npos) return false;
  }
}

std::string fault_of(const std::string& folder, const std::string& name, Artifact& artifact) {
  if (!path_fault(name).empty()) return "not a path inside the package";
  const std::string fault = file_fault(folder, name);
  if (!fault.empty()) return fault;
  const std::string path = folder + "/" + name;
  if (file_size(path) != artifact.size) return "size";
  const Fingerprint found = fingerprint(path);
  artifact.state = found.state;
  return found.size == artifact.size && found.sha256 == artifact.sha256 ? "" : "changed";
}

// Step of a name like model.step12.onnx; -1 if it is none.
std::int64_t step_of(const std::string& name) {
  const std::string before = "model.step", after = ".onnx";
  const std::size_t n = name.size(), around = before.size() + after.size();
  if (n <= around || n > around + 9 || name.compare(0, before.size(), before) != 0 ||
      name.compare(n - after.size(), after.size(), after) != 0) {
    return -1;
  }
  std::int64_t step = 0;
  for (std::size_t k = before.size(); k < n - after.size(); ++k) {
    if (name[k] < '0' || name[k] > '9') return -1;
    step = 10 * step + (name[k] - '0');
  }
  return step;
}

}  // namespace

std::map<std::uint32_t, std::string> find_graphs(const Manifest& manifest) {
  std::map<std::uint32_t, std::string> found;
  for (const char* name : {"model.onnx", "model.ort"}) {
    if (manifest.files.count(name) == 0) continue;
    found[0] = name;
    return found;
  }
  for (const auto& entry : manifest.files) {
    const std::int64_t step = step_of(entry.first);
    if (step >= 0) found[static_cast<std::uint32_t>(step)] = entry.first;
  }
  if (found.count(0) == 0) found.clear();
  return found;
}

std::string path_fault(const std::string& path) {
  const bool plain = std::all_of(path.begin(), path.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           c == '.' || c == '_' || c == '/' || c == '-';
  });
  if (!plain) return "a path may hold A-Z a-z 0-9 . _ / - only";
  if (path.size() > max_path_bytes) return "a path of more than 200 bytes";
  for (std::size_t start = 0;;) {
    const std::size_t end = std::min(path.find('/', start), path.size());
    const std::string part = path.substr(start, end - start);
    if (part.empty() || part == "." || part == "..") return "an empty, `.` or `..` part";
    if (end == path.size()) return "";
    start = end + 1;
  }
}

Manifest parse_manifest(const Bytes& data) {
  const Json document = parse_json(data.data(), data.size());
  if (document.field("format").string("format") != "edgeqdm-package") {
    throw Error(EDGEQDM_VERIFY, "not the manifest of an edgeqdm package");
  }
  check_version(document);
  Manifest manifest;
  manifest.sealed = is_sealed(data, document.field("manifest_sha256").string("manifest_sha256"));
  const Json& files = document.field("files");
  if (files.kind != Json::Kind::object) throw Error(EDGEQDM_VERIFY, "files is not an object");
  for (const auto& [name, entry] : files.fields) {
    manifest.files[name] = {entry.field("sha256").string("sha256"),
                            entry.field("size").natural("size"), FileState{}};
  }
  return manifest;
}

Manifest check_package(const std::string& folder) {
  Manifest manifest;
  try {
    const std::string fault = file_fault(folder, manifest_name);
    if (!fault.empty()) throw Error(EDGEQDM_VERIFY, fault);
    manifest = parse_manifest(
        read_file(folder + "/" + manifest_name, max_json_bytes, EDGEQDM_VERIFY));
  } catch (const Error& error) {
    const std::string reason = error.what();
    if (reason.rfind(manifest_name, 0) == 0) throw;
    throw Error(EDGEQDM_VERIFY, "manifest.json cannot be read: " + reason + ", in " + folder +
                                    " - is that the folder of a package?");
  }
  std::string bad = manifest.sealed ? "" : ", manifest.json (changed)";
  std::map<std::string, std::string> spelling;
  for (auto& [name, artifact] : manifest.files) {
    std::string fault = fault_of(folder, name, artifact);
    if (fault.empty() && differs_in_case_only(name, spelling)) fault = "differs in case only";
    if (fault.empty()) continue;
    bad += ", " + printable(name.substr(0, max_path_bytes)) + " (" + fault + ")";
  }
  if (!bad.empty()) {
    throw Error(EDGEQDM_VERIFY, "package is damaged: " + bad.substr(2) + " - copy it again");
  }
  return manifest;
}

void require_unchanged(const std::string& folder, const Manifest& manifest) {
  for (const auto& [name, artifact] : manifest.files) {
    if (file_state(folder + "/" + name) == artifact.state) continue;
    throw Error(EDGEQDM_VERIFY, name + " was changed while it was read - try again");
  }
}

}  // namespace edgeqdm
