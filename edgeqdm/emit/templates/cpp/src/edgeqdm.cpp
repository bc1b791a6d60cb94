// The C ABI: every call turns an exception into a status and a message.
#include "edgeqdm.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "bytes.h"
#include "error.h"
#include "files.h"
#include "image.h"
#include "manifest.h"
#include "network.h"
#include "sampler.h"
#include "self_test.h"
#include "table.h"
#include "tensors.h"

using edgeqdm::Bytes;
using edgeqdm::Error;

struct edgeqdm_session {
  std::string folder;  // absolute; "" for a package in memory
  edgeqdm::Manifest manifest;
  Bytes table_bytes;
  edgeqdm::Table table{};
  std::vector<float> null_embedding;
  std::unique_ptr<edgeqdm::Network> network;
  std::unique_ptr<edgeqdm::Sampler> sampler;
  std::string message;
  // The progress callback is being called: what it may not do is everything but reading.
  bool telling = false;
  bool closing = false;
};

namespace {

namespace layout = edgeqdm::layout;

constexpr std::uint64_t max_table_bytes = std::uint64_t{1} << 28;
constexpr std::uint64_t max_tensors_bytes = std::uint64_t{1} << 32;

constexpr int max_threads = 256;
constexpr const char* golden_name = "golden.safetensors";

// Runs `work`; `tell` gets the message of a failure.
template <typename Work, typename Tell>
edgeqdm_status guarded(const Work& work, const Tell& tell) noexcept {
  try {
    try {
      work();
      return EDGEQDM_OK;
    } catch (const Error& error) {
      tell(edgeqdm::printable(error.what()));
      return error.status();
    } catch (const std::bad_alloc&) {
      tell("out of memory - draw fewer images at once");
      return EDGEQDM_RESOURCE;
    } catch (const std::length_error&) {
      tell("out of memory - draw fewer images at once");
      return EDGEQDM_RESOURCE;
    } catch (const std::exception& error) {
      tell(std::string("internal: ") + edgeqdm::printable(error.what()));
      return EDGEQDM_INTERNAL;
    } catch (...) {
      tell("internal: the progress callback threw an exception");
      return EDGEQDM_INTERNAL;
    }
  } catch (...) {
    // Not even the message could be kept.
    return EDGEQDM_RESOURCE;
  }
}

void require(bool good, const char* message) {
  if (!good) throw Error(EDGEQDM_INPUT, message);
}

template <typename Work>
edgeqdm_status in_session(edgeqdm_session* session, const Work& work) noexcept {
  if (session == nullptr) return EDGEQDM_INPUT;
  return guarded(
      [&] {
        session->message.clear();
        work();
      },
      [&](std::string message) { session->message = std::move(message); });
}

// A call that changes what edgeqdm_sample is at work on.
template <typename Work>
edgeqdm_status in_idle_session(edgeqdm_session* session, const Work& work) noexcept {
  return in_session(session, [&] {
    require(!session->telling, "the progress callback may read the samples, and nothing else");
    work();
  });
}

void open_table(edgeqdm_session& session) {
  const edgeqdm::TableStatus status = edgeqdm::table_open(
      session.table_bytes.data(), session.table_bytes.size(), &session.table);
  if (status == edgeqdm::TableStatus::ok) return;
  throw Error(EDGEQDM_VERIFY, std::string("schedule.bin: ") + edgeqdm::table_status_text(status));
}

void open_model(edgeqdm_session& session, const edgeqdm::ModelSource& source,
                const edgeqdm_options& options) {
  const std::vector<float>& null_embedding = session.null_embedding;
  const bool embedding = session.table.conditioning == layout::conditioning_embedding;
  if (!null_embedding.empty() &&
      (!embedding || null_embedding.size() != edgeqdm::conditioning_size(session.table) ||
       !edgeqdm::all_finite(null_embedding.data(), null_embedding.size()))) {
    throw Error(EDGEQDM_VERIFY, "the null embedding does not fit schedule.bin");
  }
  edgeqdm::NetworkOptions asked;
  require(options.threads >= 0, "threads must be at least 1");
  // Where more cannot be started, ONNX Runtime waits for them for ever.
  require(options.threads <= max_threads, "threads must be at most 256");
  asked.threads = std::max(1, options.threads);
  if (options.provider != nullptr && std::strcmp(options.provider, "cpu") != 0) {
    asked.provider = options.provider;
  }
  if (options.library != nullptr) asked.library = options.library;
  session.network = edgeqdm::open_network(source, session.table, asked);
  session.sampler = std::make_unique<edgeqdm::Sampler>(session.table, session.null_embedding,
                                                       *session.network);
}

std::vector<float> read_null_embedding(const std::string& path) {
  try {
    auto tensors =
        edgeqdm::parse_safetensors(edgeqdm::read_file(path, max_tensors_bytes, EDGEQDM_VERIFY));
    if (tensors["null"].floats.empty()) throw Error(EDGEQDM_VERIFY, "no tensor null");
    return std::move(tensors["null"].floats);
  } catch (const Error& error) {
    throw Error(EDGEQDM_VERIFY, std::string("conditioning.safetensors: ") + error.what());
  }
}

edgeqdm::ModelSource find_model(const std::string& folder, const edgeqdm::Manifest& manifest) {
  edgeqdm::ModelSource source;
  for (const auto& [start, name] : edgeqdm::find_graphs(manifest)) {
    source.paths[start] = folder + "/" + name;
  }
  if (source.paths.empty()) throw Error(EDGEQDM_VERIFY, "model.onnx: not in the manifest");
  return source;
}

// The working directory may be another one when the golden run is read.
std::string absolute(const std::string& folder) {
  char* found = ::realpath(folder.c_str(), nullptr);
  const std::string path = found == nullptr ? folder : found;
  std::free(found);
  return path;
}

std::unique_ptr<edgeqdm_session> open_folder(const std::string& given,
                                             const edgeqdm_options& options) {
  auto session = std::make_unique<edgeqdm_session>();
  const std::string folder = absolute(given);
  session->folder = folder;
  session->manifest = edgeqdm::check_package(folder);
  const edgeqdm::Manifest& manifest = session->manifest;
  if (manifest.files.count("schedule.bin") == 0) {
    throw Error(EDGEQDM_VERIFY, "schedule.bin: not in the manifest");
  }
  const edgeqdm::ModelSource source = find_model(folder, manifest);
  session->table_bytes =
      edgeqdm::read_file(folder + "/schedule.bin", max_table_bytes, EDGEQDM_VERIFY);
  open_table(*session);
  if (manifest.files.count("conditioning.safetensors") != 0) {
    session->null_embedding = read_null_embedding(folder + "/conditioning.safetensors");
  }
  open_model(*session, source, options);
  edgeqdm::require_unchanged(folder, manifest);
  return session;
}

Bytes read_golden(const edgeqdm_session& session) {
  if (session.manifest.files.count(golden_name) == 0) {
    throw Error(EDGEQDM_VERIFY, std::string(golden_name) + ": not in the manifest");
  }
  Bytes data = edgeqdm::read_file(session.folder + "/" + golden_name, max_tensors_bytes,
                                  EDGEQDM_VERIFY);
  edgeqdm::require_unchanged(session.folder, session.manifest);
  return data;
}

template <typename Open>
edgeqdm_status open_session(const edgeqdm_options* given, edgeqdm_session** session,
                            const Open& open) noexcept {
  const edgeqdm_options options = given != nullptr ? *given : edgeqdm_options{};
  return guarded(
      [&] {
        require(session != nullptr, "the session's place is NULL");
        *session = open(options).release();
      },
      [&](const std::string& message) {
        if (options.message == nullptr || options.message_size == 0) return;
        std::size_t n = std::min(message.size(), options.message_size - 1);
        // Not in the middle of a character.
        while (n < message.size() && n > 0 && (message[n] & 0xC0) == 0x80) --n;
        message.copy(options.message, n);
        options.message[n] = '\0';
      });
}

edgeqdm::Sampler& begun(edgeqdm_session& session) {
  require(session.sampler->begun(), "nothing has been begun");
  return *session.sampler;
}

edgeqdm::Sampler& finished(edgeqdm_session& session) {
  edgeqdm::Sampler& sampler = begun(session);
  require(sampler.steps_done() == session.table.steps, "there are steps left");
  return sampler;
}

// Not 0: stop.
int tell(edgeqdm_session& session, edgeqdm_progress progress, void* context) {
  struct Telling {
    bool& flag;
    ~Telling() { flag = false; }
  } telling{session.telling};
  telling.flag = true;
  const int stop = progress(session.sampler->steps_done(), session.table.steps, context);
  return session.closing ? 1 : stop;
}

std::size_t pixels_size(const edgeqdm_session& session) {
  return session.sampler->n_images() * edgeqdm::pixel_shape(session.table).size();
}

}  // namespace

extern "C" {

edgeqdm_status edgeqdm_open(const char* folder, const edgeqdm_options* options,
                            edgeqdm_session** session) {
  return open_session(options, session, [&](const edgeqdm_options& asked) {
    require(folder != nullptr && *folder != '\0', "the folder has no name");
    return open_folder(folder, asked);
  });
}

edgeqdm_status edgeqdm_open_memory(const void* model, size_t model_size, const void* table,
                                   size_t table_size, const float* null_embedding,
                                   size_t null_embedding_size, const edgeqdm_options* options,
                                   edgeqdm_session** session) {
  return open_session(options, session, [&](const edgeqdm_options& asked) {
    require(model != nullptr && model_size > 0, "the model is empty");
    require(table != nullptr, "the table is NULL");
    auto opened = std::make_unique<edgeqdm_session>();
    const auto* bytes = static_cast<const unsigned char*>(table);
    opened->table_bytes.assign(bytes, bytes + table_size);
    open_table(*opened);
    if (null_embedding != nullptr) {
      opened->null_embedding.assign(null_embedding, null_embedding + null_embedding_size);
    }
    edgeqdm::ModelSource source;
    source.bytes = model;
    source.n_bytes = model_size;
    open_model(*opened, source, asked);
    return opened;
  });
}

edgeqdm_status edgeqdm_describe(const edgeqdm_session* session, edgeqdm_info* info) {
  if (session == nullptr || info == nullptr) return EDGEQDM_INPUT;
  const edgeqdm::Table& table = session->table;
  const edgeqdm::PixelShape pixels = edgeqdm::pixel_shape(table);
  edgeqdm_info found{};
  found.steps = table.steps;
  found.channels = table.channels;
  found.height = table.height;
  found.width = table.width;
  found.conditioning = static_cast<edgeqdm_conditioning>(table.conditioning);
  found.labels = table.labels;
  found.label_names = table.label_names;
  if (table.conditioning == layout::conditioning_embedding) {
    found.embedding_size = edgeqdm::conditioning_size(table);
    found.embedding_rank = table.conditioning_rank;
    std::copy_n(table.conditioning_size, layout::max_rank, found.embedding_shape);
  }
  found.pixel_channels = pixels.channels;
  found.pixel_height = pixels.height;
  found.pixel_width = pixels.width;
  *info = found;
  return EDGEQDM_OK;
}

edgeqdm_status edgeqdm_label_name(edgeqdm_session* session, uint32_t label, const char** name,
                                  size_t* length) {
  return in_session(session, [&] {
    require(name != nullptr && length != nullptr, "the name's place is NULL");
    const auto status = edgeqdm::table_label_name(session->table, label, name, length);
    if (status == edgeqdm::TableStatus::ok) return;
    throw Error(EDGEQDM_INPUT, "label " + std::to_string(label) + " has no name");
  });
}

edgeqdm_status edgeqdm_begin(edgeqdm_session* session, uint64_t seed, uint32_t first_image,
                             uint32_t n_images, const int64_t* labels, const float* embeddings) {
  return in_idle_session(session, [&] {
    edgeqdm::Draw draw;
    draw.seed = seed;
    draw.first_image = first_image;
    draw.n_images = n_images;
    draw.labels = labels;
    draw.embeddings = embeddings;
    session->sampler->begin(draw);
  });
}

edgeqdm_status edgeqdm_step(edgeqdm_session* session, uint32_t* steps_left) {
  return in_idle_session(session, [&] {
    edgeqdm::Sampler& sampler = begun(*session);
    require(sampler.steps_done() < session->table.steps, "there are no steps left");
    sampler.step();
    if (steps_left != nullptr) *steps_left = session->table.steps - sampler.steps_done();
  });
}

edgeqdm_status edgeqdm_sample(edgeqdm_session* session, edgeqdm_progress progress, void* context) {
  const edgeqdm_status status = in_idle_session(session, [&] {
    edgeqdm::Sampler& sampler = begun(*session);
    while (sampler.steps_done() < session->table.steps) {
      sampler.step();
      if (progress != nullptr && tell(*session, progress, context) != 0) {
        throw Error(EDGEQDM_CANCELLED, "cancelled");
      }
    }
  });
  if (session != nullptr && session->closing) delete session;
  return status;
}

edgeqdm_status edgeqdm_latents(edgeqdm_session* session, float* samples, size_t size) {
  return in_session(session, [&] {
    const edgeqdm::Sampler& sampler = begun(*session);
    require(samples != nullptr && size == sampler.size(), "wrong size of the samples");
    std::copy_n(sampler.samples(), size, samples);
  });
}

edgeqdm_status edgeqdm_pixels(edgeqdm_session* session, uint8_t* pixels, size_t size) {
  return in_session(session, [&] {
    const edgeqdm::Sampler& sampler = finished(*session);
    require(pixels != nullptr && size == pixels_size(*session), "wrong size of the pixels");
    edgeqdm::decode(session->table, sampler.samples(), sampler.n_images(), pixels);
  });
}

edgeqdm_status edgeqdm_write_image(edgeqdm_session* session, const char* path, uint32_t columns) {
  return in_session(session, [&] {
    require(path != nullptr, "the path is NULL");
    const edgeqdm::Sampler& sampler = finished(*session);
    Bytes pixels(pixels_size(*session));
    edgeqdm::decode(session->table, sampler.samples(), sampler.n_images(), pixels.data());
    const edgeqdm::Image image = edgeqdm::sheet(
        pixels.data(), edgeqdm::pixel_shape(session->table), sampler.n_images(), columns);
    edgeqdm::write_atomically(path, edgeqdm::encode(image, path));
  });
}

edgeqdm_status edgeqdm_write_latents(edgeqdm_session* session, const char* path) {
  return in_session(session, [&] {
    require(path != nullptr, "the path is NULL");
    const edgeqdm::Sampler& sampler = begun(*session);
    const edgeqdm::Table& table = session->table;
    edgeqdm::write_atomically(
        path, edgeqdm::npy_of(sampler.samples(), {sampler.n_images(), table.channels, table.height,
                                                  table.width}));
  });
}

edgeqdm_status edgeqdm_self_test(edgeqdm_session* session, double* deviation, size_t n_steps,
                                 double* sampler, int* passed) {
  return in_idle_session(session, [&] {
    require(deviation != nullptr && sampler != nullptr && passed != nullptr, "a place is NULL");
    require(n_steps == session->table.steps, "wrong number of steps");
    require(!session->folder.empty(), "a package in memory has no golden run");
    edgeqdm::Sampler replayed(session->table, session->null_embedding, *session->network);
    session->sampler->end();
    const edgeqdm::SelfTest result =
        edgeqdm::self_test(session->table, replayed, read_golden(*session));
    std::copy(result.deviation.begin(), result.deviation.end(), deviation);
    *sampler = result.sampler;
    *passed = result.passed ? 1 : 0;
  });
}

const char* edgeqdm_message(const edgeqdm_session* session) {
  return session == nullptr ? "the session is NULL" : session->message.c_str();
}

void edgeqdm_close(edgeqdm_session* session) {
  // In its progress callback: edgeqdm_sample is still at work in it, and closes it at its end.
  if (session != nullptr && session->telling) {
    session->closing = true;
  } else {
    delete session;
  }
}

const char* edgeqdm_version(void) { return EDGEQDM_VERSION; }

}  // extern "C"
