// The whole journey of a host, in C++17 with the owners of locum.hpp: record scripted episodes of a small made-up world,
// distil them, let the student answer, take it back, close, open again.
//
//     c++ -std=c++17 -I plugin-api/include host-examples/cpp/journey.cpp -L target/release -llocum -o journey
//     LD_LIBRARY_PATH=target/release ./journey STORE-DIRECTORY MODEL-DIRECTORY
//
// MODEL-DIRECTORY is a Hugging Face folder that the student starts from; without one everything up to the distillation is
// shown, and the teacher plays. Ends with 0 if everything was as expected, and with a sentence and 1 otherwise.
#include <poll.h>

#include <chrono>
#include <iostream>
#include <string>
#include <thread>

#include "locum.hpp"

namespace {

constexpr int kEpisodes = 32;
constexpr int kMaxMoves = 12;

struct Surprise : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A light in one of three colours; the agent presses the button of its colour until all lights of the episode are out.
constexpr const char *kColours[] = {"red", "green", "blue"};
constexpr const char *kMeta = R"({"domain":"lights","tools":[{"type":"function","function":{"name":"press",
  "description":"Press a button.","parameters":{"type":"object","properties":
  {"colour":{"type":"string","enum":["red","green","blue"]}},"required":["colour"]}}}]})";

struct World {
  int seed;
  int lights = 3;
  std::string colour() const { return kColours[(seed + lights) % 3]; }
  std::string look() const { return lights ? "See: a " + colour() + " light is on." : "See: all lights are out."; }
  void press(const std::string &button) {
    if (lights && button == colour()) lights--;
  }
};

// The text after "key": up to the next comma, brace or quote. Enough for an example.
std::string field(const std::string &json, const std::string &key) {
  const std::string pattern = "\"" + key + "\":";
  auto at = json.find(pattern);
  if (at == std::string::npos) return {};
  at += pattern.size();
  if (at < json.size() && json[at] == '"') at++;
  return json.substr(at, json.find_first_of(",}\"", at) - at);
}

locumpp::Episode begin(locumpp::Locum &l, const World &w) {
  auto e = l.begin("lights-" + std::to_string(w.seed), kMeta);
  e.step(R"({"role":"user","content":"Goal: put out the lights.\n)" + w.look() + "\"}");
  return e;
}

void result(locumpp::Episode &e, const std::string &id, const World &w) {
  e.step(R"({"role":"tool","tool_call_id":")" + id + R"(","content":")" + w.look() + "\"}");
}

void teacher_step(locumpp::Episode &e, World &w, int n, const std::string &button) {
  const std::string id = "c" + std::to_string(n);
  e.step(R"({"role":"assistant","content":null,"tool_calls":[{"id":")" + id +
             R"(","type":"function","function":{"name":"press","arguments":"{\"colour\":\")" + button + R"(\"}"}}]})",
         LOCUM_ACTOR_TEACHER);
  w.press(button);
  result(e, id, w);
}

// Returns the id of the episode that was judged later.
std::array<std::uint8_t, 16> record_teacher(locumpp::Locum &l) {
  std::array<std::uint8_t, 16> late{};
  for (int seed = 0; seed < kEpisodes; seed++) {
    World w{seed};
    auto e = begin(l, w);
    const bool confused = seed % 4 == 3;
    for (int n = 1; n <= kMaxMoves && w.lights; n++) teacher_step(e, w, n, confused ? "red" : w.colour());
    if (seed == 0) {
      late = e.id();
      e.end(LOCUM_OUTCOME_UNKNOWN);
    } else {
      e.end(w.lights ? LOCUM_OUTCOME_FAILURE : LOCUM_OUTCOME_SUCCESS);
    }
  }
  auto outcome = locumpp::make<locum_outcome>();
  outcome.status = LOCUM_OUTCOME_SUCCESS;
  outcome.reason = locumpp::str("somebody looked the next day");
  l.outcome_later(late, outcome);
  l.flush();
  std::cout << "recorded " << kEpisodes << " episodes of the teacher, one judged later\n";
  return late;
}

void distil(locumpp::Locum &l) {
  const auto job = l.distil_start(R"({"method":"lora","rank":4,"tokens":4000,"max_seconds":30,"seed":1,"promote":"never"})");
  std::string before;
  for (int tries = 0; tries < 3000; tries++) {
    const std::string status = l.distil_status(job);
    const std::string state = field(status, "state");
    if (state != before) std::cout << "  " << state << " (" << field(status, "progress") << ")\n";
    before = state;
    if (state == "failed") throw Surprise("the distillation failed: " + status);
    if (state == "stored") return;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  throw Surprise("the distillation did not come to an end");
}

// Waits for the end of a call the way an event loop would: on the descriptor, never inside the library.
void wait_on_events(locumpp::Locum &l, locumpp::Call &call) {
  pollfd fd{static_cast<int>(l.event_handle()), POLLIN, 0};
  if (fd.fd < 0) throw Surprise("there is no event handle");
  std::string streamed;
  for (int rounds = 0; rounds < 600; rounds++) {
    auto polled = call.poll();
    streamed += polled.new_text;
    if (polled.done) break;
    poll(&fd, 1, 100);
    while (l.next_event()) {
    }
  }
  std::cout << "  streamed: " << streamed << "\n";
}

// Plays one episode and returns the student's steps.
int play(locumpp::Locum &l, int seed) {
  World w{seed};
  auto e = begin(l, w);
  int by_student = 0;
  for (int n = 1; n <= kMaxMoves && w.lights; n++) {
    auto request = locumpp::make<locum_request>();
    request.flags = LOCUM_REQUEST_GREEDY | LOCUM_REQUEST_CALL_REQUIRED;
    request.max_tokens = 32;
    const auto decision = e.decide(request);
    if (n == 1) std::cout << "  " << (decision.who == LOCUM_WHO_STUDENT ? "student: " : "teacher: ") << decision.reason << "\n";
    if (decision.who == LOCUM_WHO_TEACHER) {
      teacher_step(e, w, n, w.colour());
      continue;
    }
    auto call = e.generate(request);
    if (n == 1 && call) wait_on_events(l, call);
    if (!call || !call.wait(60000)) throw Surprise("the student did not answer");
    const auto answer = call.result();
    if (!answer || !answer->from_student) {
      teacher_step(e, w, n, w.colour());
      continue;
    }
    // {"message":{...},"finish_reason":...: the message is recorded as it came.
    const auto from = answer->json.find("\"message\":") + 10;
    const std::string message = answer->json.substr(from, answer->json.find(",\"finish_reason\"") - from);
    e.step(message, LOCUM_ACTOR_STUDENT);
    const auto arguments = message.substr(message.find("\\\"colour\\\""));
    for (const char *colour : kColours) {
      if (arguments.find(colour, 10) != std::string::npos) {
        w.press(colour);
        break;
      }
    }
    result(e, field(message, "id"), w);
    by_student++;
  }
  e.end(w.lights ? LOCUM_OUTCOME_FAILURE : LOCUM_OUTCOME_SUCCESS);
  std::cout << "  episode " << seed << ": " << by_student << " steps by the student\n";
  return by_student;
}

void journey(const std::string &store, const std::string &model) {
  auto options = locumpp::make<locum_options>();
  options.store_dir = locumpp::str(store);
  options.base_model_dir = locumpp::str(model);
  locumpp::Locum l(options);
  try {
    l.load_policy("return 5 +", "broken.lua");
    throw Surprise("a broken policy was taken");
  } catch (const locumpp::Error &e) {
    std::cout << "a broken policy is refused: " << e.name() << ": " << e.what() << "\n";
    if (e.status() != LOCUM_E_POLICY) throw;
  }
  l.load_policy("local M = {}\nfunction M.decide(step) return \"student\", \"journey\" end\nreturn M\n", "journey.lua");
  const auto late = record_teacher(l);
  if (play(l, 100) != 0) throw Surprise("an untrained student played");
  if (!model.empty()) {
    distil(l);
    std::cout << "students: " << l.students() << "\n";
    l.use_student(1);
    if (play(l, 101) == 0) throw Surprise("the pinned student never played");
    {
      World w{200};
      auto e = begin(l, w);
      auto call = e.generate(locumpp::make<locum_request>());
      call.cancel();
      if (!call.wait(60000)) throw Surprise("a cancelled call did not end");
      e.drop();
    }
    l.rollback();
    if (play(l, 102) != 0) throw Surprise("a student that was taken back played");
  }
  const std::string learned = l.students_of(late);
  const std::string forgotten = l.forget(late);
  std::cout << "learned from the first episode: " << learned << "\nerased: " << forgotten << "\n";
  if (!model.empty()) {
    if (field(learned, "version") != "1" || forgotten.find("\"students\":[1]") == std::string::npos)
      throw Surprise("the student did not learn from the first episode");
    if (l.lineage(1).find("\"erased\":true") == std::string::npos) throw Surprise("the lineage does not tell of the erasure");
  }
  std::cout << "stats: " << l.stats().substr(0, 400) << "\n";
  auto moved = std::move(l);  // an owner moves, and the one it came from owns nothing
  if (l.get().id != 0) throw Surprise("two owners of one handle");
  moved.close();

  locumpp::Locum again(options);
  if (!model.empty() && again.students().size() <= 2) throw Surprise("the students are gone");
  again.use_student(LOCUM_STUDENT_AUTOMATIC);
}

}  // namespace

int main(int argc, char **argv) {
  if (argc < 2 || argc > 3) {
    std::cerr << "usage: " << argv[0] << " STORE-DIRECTORY [MODEL-DIRECTORY]\n";
    return 2;
  }
  try {
    journey(argv[1], argc == 3 ? argv[2] : "");
  } catch (const std::exception &e) {
    std::cout << "SURPRISE: " << e.what() << "\n";
    return 1;
  }
  std::cout << "done\n";
  return 0;
}
