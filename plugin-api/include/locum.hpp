// locum.hpp : C++17 owners for locum.h. Header-only, so that no C++ ABI is shipped; the manual is locum.h.
//
// Each owner is move-only and gives its handle back when it goes. Text goes in as std::string_view and comes out as
// std::string. A negative status becomes a locumpp::Error; a positive one is a value. Threads: as in locum.h.
#ifndef LOCUM_HPP
#define LOCUM_HPP

#include "locum.h"

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace locumpp {

// What went wrong: what() is a sentence for people.
class Error : public std::runtime_error {
 public:
  Error(std::int32_t status, std::int32_t os_code, const std::string &message)
      : std::runtime_error(message), status_(status), os_code_(os_code) {}
  std::int32_t status() const noexcept { return status_; }
  std::int32_t os_code() const noexcept { return os_code_; }
  const char *name() const noexcept { return locum_status_name(status_); }

 private:
  std::int32_t status_;
  std::int32_t os_code_;
};

// Borrows text for one call.
inline locum_str str(std::string_view text) noexcept { return locum_str{text.data(), text.size()}; }

// A struct of locum.h with its size set and everything else "default".
template <class T>
T make() noexcept {
  T value{};
  value.struct_size = static_cast<std::uint32_t>(sizeof(T));
  return value;
}

namespace detail {

// Where a function puts its error; freed whatever happens.
class Slot {
 public:
  Slot() = default;
  Slot(const Slot &) = delete;
  Slot &operator=(const Slot &) = delete;
  ~Slot() { locum_error_free(error_); }
  locum_error **out() noexcept { return &error_; }
  // Passes a status that is no error on, and throws what is one.
  std::int32_t check(std::int32_t status) const {
    if (status >= 0) return status;
    const char *message = locum_error_message(error_);
    throw Error(status, locum_error_os_code(error_), *message ? message : locum_status_name(status));
  }

 private:
  locum_error *error_ = nullptr;
};

// Takes bytes over into a string, and frees them.
inline std::string take(locum_bytes &bytes) {
  struct Free {
    locum_bytes *bytes;
    ~Free() { locum_bytes_free(bytes); }
  } free_at_end{&bytes};
  return bytes.len == 0 ? std::string() : std::string(reinterpret_cast<const char *>(bytes.ptr), bytes.len);
}

inline std::int32_t checked(std::int32_t status) { return Slot().check(status); }

}  // namespace detail

// A finished answer of a student.
struct Answer {
  bool from_student = false;  // false: ask the teacher; `json` says why
  std::string json;
};

// What locum_call_poll gave.
struct Polled {
  bool done = false;
  std::string new_text;
};

// A generation in flight, or its answer.
class Call {
 public:
  Call() = default;
  explicit Call(locum_call handle) noexcept : handle_(handle) {}
  Call(Call &&other) noexcept : handle_(std::exchange(other.handle_, locum_call{0})) {}
  Call &operator=(Call &&other) noexcept {
    if (this != &other) {
      locum_call_free(handle_);
      handle_ = std::exchange(other.handle_, locum_call{0});
    }
    return *this;
  }
  ~Call() { locum_call_free(handle_); }

  locum_call get() const noexcept { return handle_; }
  explicit operator bool() const noexcept { return handle_.id != 0; }

  Polled poll() {
    locum_bytes bytes{};
    const std::int32_t status = detail::checked(locum_call_poll(handle_, &bytes));
    return Polled{status == LOCUM_OK, detail::take(bytes)};
  }
  // True when it has ended.
  bool wait(std::uint32_t timeout_ms) { return detail::checked(locum_call_wait(handle_, timeout_ms)) == LOCUM_OK; }
  void cancel() { detail::checked(locum_call_cancel(handle_)); }
  // Nothing while it still runs.
  std::optional<Answer> result() {
    locum_bytes bytes{};
    detail::Slot error;
    const std::int32_t status = error.check(locum_call_result(handle_, &bytes, error.out()));
    if (status == LOCUM_PENDING) return std::nullopt;
    return Answer{status == LOCUM_OK, detail::take(bytes)};
  }

 private:
  locum_call handle_{0};
};

// An episode being recorded. One that is destroyed without end() or drop() stays in the store as open and never trains.
class Episode {
 public:
  Episode() = default;
  explicit Episode(locum_episode handle) noexcept : handle_(handle) {}
  Episode(Episode &&other) noexcept : handle_(std::exchange(other.handle_, locum_episode{0})) {}
  Episode &operator=(Episode &&other) noexcept {
    handle_ = std::exchange(other.handle_, locum_episode{0});
    return *this;
  }

  locum_episode get() const noexcept { return handle_; }

  std::array<std::uint8_t, 16> id() const {
    std::array<std::uint8_t, 16> id{};
    detail::checked(locum_episode_id(handle_, id.data()));
    return id;
  }
  void step(const locum_step &step) {
    detail::Slot error;
    error.check(locum_episode_step(handle_, &step, error.out()));
  }
  void step(std::string_view message_json, std::int32_t actor = LOCUM_ACTOR_UNKNOWN) {
    locum_step value = make<locum_step>();
    value.actor = actor;
    value.content_json = str(message_json);
    step(value);
  }
  void end(const locum_outcome &outcome) {
    detail::Slot error;
    error.check(locum_episode_end(handle_, &outcome, error.out()));
    handle_ = locum_episode{0};
  }
  void end(std::int32_t status) {
    locum_outcome outcome = make<locum_outcome>();
    outcome.status = status;
    end(outcome);
  }
  void drop() {
    detail::checked(locum_episode_drop(handle_));
    handle_ = locum_episode{0};
  }
  std::string fast_weights() const {
    locum_bytes json{};
    detail::Slot error;
    error.check(locum_fast_weights(handle_, &json, error.out()));
    return detail::take(json);
  }
  void switch_fast_weights(bool on) {
    detail::Slot error;
    error.check(locum_fast_weights_switch(handle_, on ? 1 : 0, error.out()));
  }
  void reset_fast_weights() {
    detail::Slot error;
    error.check(locum_fast_weights_reset(handle_, error.out()));
  }
  std::uint64_t snapshot_fast_weights() {
    std::uint64_t snapshot = 0;
    detail::Slot error;
    error.check(locum_fast_weights_snapshot(handle_, &snapshot, error.out()));
    return snapshot;
  }
  void restore_fast_weights(std::uint64_t snapshot) {
    detail::Slot error;
    error.check(locum_fast_weights_restore(handle_, snapshot, error.out()));
  }
  void forget_fast_weights(std::uint64_t snapshot = 0) {
    detail::Slot error;
    error.check(locum_fast_weights_forget(handle_, snapshot, error.out()));
  }

  // Never throws: whatever fails, the teacher is asked, and `reason` says why.
  locum_decision decide(const locum_request &request) noexcept {
    locum_decision decision = make<locum_decision>();
    locum_decide(handle_, &request, &decision, nullptr);
    return decision;
  }
  // An empty call: ask the teacher.
  Call generate(const locum_request &request) {
    locum_call call{0};
    detail::Slot error;
    error.check(locum_generate(handle_, &request, &call, error.out()));
    return Call(call);
  }

 private:
  locum_episode handle_{0};
};

// An event, its detail as JSON.
struct Event {
  std::int32_t kind = 0;
  std::uint64_t subject = 0;
  std::int64_t number = 0;
  std::string detail;
};

// An open store. Destroying it closes it, with the default time to drain; close() also tells what went wrong.
class Locum {
 public:
  Locum() = default;
  explicit Locum(const locum_options &options) {
    detail::Slot error;
    error.check(locum_open(&options, &handle_, error.out()));
  }
  Locum(Locum &&other) noexcept : handle_(std::exchange(other.handle_, locum{0})) {}
  Locum &operator=(Locum &&other) noexcept {
    if (this != &other) {
      locum_close(handle_, 0, nullptr);
      handle_ = std::exchange(other.handle_, locum{0});
    }
    return *this;
  }
  ~Locum() { locum_close(handle_, 0, nullptr); }

  locum get() const noexcept { return handle_; }

  void close(std::uint32_t drain_ms = 0) {
    detail::Slot error;
    error.check(locum_close(std::exchange(handle_, locum{0}), drain_ms, error.out()));
  }
  Episode begin(std::string_view task, std::string_view meta_json = {}) {
    locum_episode episode{0};
    detail::Slot error;
    error.check(locum_episode_begin(handle_, task.data(), task.size(), meta_json.data(), meta_json.size(), &episode,
                                    error.out()));
    return Episode(episode);
  }
  void outcome_later(const std::array<std::uint8_t, 16> &id, const locum_outcome &outcome) {
    detail::Slot error;
    error.check(locum_outcome_later(handle_, id.data(), &outcome, error.out()));
  }
  void flush(std::uint32_t timeout_ms = 0) {
    detail::Slot error;
    error.check(locum_flush(handle_, timeout_ms, error.out()));
  }
  void load_policy(std::string_view source, std::string_view name = {}) {
    detail::Slot error;
    error.check(locum_policy_load(handle_, source.data(), source.size(), name.data(), name.size(), error.out()));
  }

  std::int64_t event_handle() const noexcept { return locum_event_handle(handle_); }
  std::optional<Event> next_event() {
    locum_event event = make<locum_event>();
    if (detail::checked(locum_next_event(handle_, &event)) == LOCUM_EMPTY) return std::nullopt;
    return Event{event.kind, event.subject, event.number, detail::take(event.detail)};
  }

  std::uint64_t distil_start(std::string_view options_json = {}) {
    std::uint64_t job = 0;
    detail::Slot error;
    error.check(locum_distil_start(handle_, options_json.data(), options_json.size(), &job, error.out()));
    return job;
  }
  std::string distil_status(std::uint64_t job = 0) {
    locum_bytes json{};
    detail::Slot error;
    error.check(locum_distil_status(handle_, job, &json, error.out()));
    return detail::take(json);
  }
  void distil_cancel(std::uint64_t job = 0) {
    detail::Slot error;
    error.check(locum_distil_cancel(handle_, job, error.out()));
  }
  void distil_pause(std::uint64_t job = 0) {
    detail::Slot error;
    error.check(locum_distil_pause(handle_, job, error.out()));
  }
  void distil_resume(std::uint64_t job = 0) {
    detail::Slot error;
    error.check(locum_distil_resume(handle_, job, error.out()));
  }
  std::string students() {
    locum_bytes json{};
    detail::Slot error;
    error.check(locum_student_list(handle_, &json, error.out()));
    return detail::take(json);
  }
  void use_student(std::uint64_t version) {
    detail::Slot error;
    error.check(locum_student_use(handle_, version, error.out()));
  }
  void rollback() {
    detail::Slot error;
    error.check(locum_student_rollback(handle_, error.out()));
  }
  std::string forget(const std::array<std::uint8_t, 16> &id, bool retrain = false) {
    locum_bytes json{};
    detail::Slot error;
    error.check(locum_forget_episode(handle_, id.data(), retrain, &json, error.out()));
    return detail::take(json);
  }
  std::string forget_scope(std::string_view scope, bool retrain = false) {
    locum_bytes json{};
    detail::Slot error;
    error.check(locum_forget_scope(handle_, scope.data(), scope.size(), retrain, &json, error.out()));
    return detail::take(json);
  }
  std::string lineage(std::uint64_t version) {
    locum_bytes json{};
    detail::Slot error;
    error.check(locum_student_lineage(handle_, version, &json, error.out()));
    return detail::take(json);
  }
  std::string students_of(const std::array<std::uint8_t, 16> &id) {
    locum_bytes json{};
    detail::Slot error;
    error.check(locum_episode_students(handle_, id.data(), &json, error.out()));
    return detail::take(json);
  }
  std::string stats() {
    locum_bytes json{};
    detail::Slot error;
    error.check(locum_stats(handle_, &json, error.out()));
    return detail::take(json);
  }

 private:
  locum handle_{0};
};

}  // namespace locumpp

#endif
