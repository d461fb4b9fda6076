#include "failure.h"

#include "ggml_workers.h"
#include "head.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <system_error>
#include <thread>

#include <sched.h>
#include <unistd.h>

// How often a thread that waits lets others have its core: after some tens of microseconds.
static constexpr unsigned TURNS_PER_YIELD = 1024;

// ---- State ----------------------------------------------------------------------------------------------------------

namespace minerva {
namespace {

std::atomic<bool> is_ending{false};
std::atomic<int> n_calls{0};     // in libllama now, on all threads
std::atomic<int> generation{0};  // how many forks lead to this process

struct Stopped {};  // unwinds a worker

thread_local Call * this_call = nullptr;
thread_local Team * this_team = nullptr;
thread_local bool is_worker = false;

// Of fixed size: there may be no memory left to describe that there is none.
thread_local minerva_cause thrown_cause = MINERVA_NOTHING;
thread_local char thrown_text[2048];

// A thread's first exception takes a little memory, without which libstdc++ cannot throw even that there is none: the
// loader ends the process then.
void touch_exceptions() {
    [[maybe_unused]] const volatile int count = std::uncaught_exceptions();  // or the call is left out
}

void note(minerva_cause cause, const char * text) {
    thrown_cause = cause;
    std::snprintf(thrown_text, sizeof thrown_text, "%s", text);
}

// What an error of Vulkan's means. Its headers are not needed for this, and may not be there.
minerva_cause cause_of(const std::error_code & code) {
    constexpr int out_of_host_memory = -1, out_of_device_memory = -2, device_lost = -4;
    if (std::strcmp(code.category().name(), "vk::Result") != 0) {
        return MINERVA_EXCEPTION;
    }
    switch (code.value()) {
        case out_of_host_memory:
        case out_of_device_memory:
            return MINERVA_NO_MEMORY;
        case device_lost:
            return MINERVA_GPU_LOST;
        default:
            return MINERVA_EXCEPTION;
    }
}

}  // namespace

void on_abort(const char * message) {
    if (is_worker) {
        throw Assertion(message);
    }
    if (this_call == nullptr) {
        std::fprintf(stderr, "%s\n", message);
        return;
    }
    note(MINERVA_ASSERTION, message);
    this_call->fail();
    throw Assertion(message);
}

namespace {

void after_fork() {
    ++generation;
    n_calls = 0;
    for (const Call * call = this_call; call != nullptr; call = call->outer()) {
        ++n_calls;  // a callback has forked: the calls that it is in go on in both processes
    }
    is_ending = false;
}

const bool is_installed = [] {
    ggml_set_abort_callback(on_abort);
    pthread_atfork(nullptr, nullptr, after_fork);
    return true;
}();

}  // namespace

// ---- Workers --------------------------------------------------------------------------------------------------------

struct Team::Worker {
    Team * team;
    void * (*run)(void *);
    void * data;
};

Team::Team(int n_threads, Team * smaller) : size_(n_threads), generation_(generation) {
    ggml_threadpool_params parameters;
    ggml_threadpool_params_init(&parameters, n_threads);
    Team * outer = this_team;
    this_team = this;
    try {
        pool_ = cpu().threadpool_new(&parameters);
    } catch (...) {  // the pool's own memory is lost, some hundred bytes a thread
        this_team = outer;
        begin(true);
        for (pthread_t thread : started_) {
            pthread_join(thread, nullptr);
        }
        throw;
    }
    this_team = outer;
    begin(false);
    smaller_.reset(smaller);
}

Team::~Team() {
    stop();
}

bool Team::is_inherited() const {
    return generation_ != generation.load(std::memory_order_relaxed);
}

void Team::stop() {
    failed_ = true;  // releases those that wait for others
    wake();
    if (ggml_threadpool * pool = is_inherited() ? nullptr : pool_) {
        pool_ = nullptr;
        cpu().threadpool_free(pool);  // joins them
    }
}

void Team::rest() {
    is_resting_ = size_ > 1;
}

void Team::wake() {
    if (is_resting()) {
        {
            std::lock_guard lock(mutex_);
            is_resting_ = false;
        }
        woken_.notify_all();
    }
}

void Team::sleep() {
    std::unique_lock lock(mutex_);
    woken_.wait(lock, [this] { return !is_resting_; });
}

void Team::rethrow() {
    std::rethrow_exception(cause_);
}

void Team::start(pthread_t * thread, const pthread_attr_t * attributes, void * (*run)(void *), void * data) {
    auto worker = std::make_unique<Worker>(Worker{this, run, data});
    started_.reserve(started_.size() + 1);
    const int code = pthread_create(thread, attributes, work, worker.get());
    if (code != 0) {
        throw std::runtime_error("the system grants no more threads than the " + std::to_string(started_.size() + 1) +
                                 " there are (" + std::strerror(code) + ")");
    }
    worker.release();
    started_.push_back(*thread);
}

void Team::begin(bool failed) {
    {
        std::lock_guard lock(mutex_);
        has_begun_ = true;
        failed_ = failed;
    }
    begun_.notify_all();
}

bool Team::wait_for_the_others() {
    std::unique_lock lock(mutex_);
    begun_.wait(lock, [this] { return has_begun_; });
    return !failed_;
}

void * Team::work(void * data) {
    const std::unique_ptr<Worker> worker(static_cast<Worker *>(data));
    Team & team = *worker->team;
    is_worker = true;
    this_team = &team;
    touch_exceptions();
    void * result = nullptr;
    try {
        if (team.wait_for_the_others()) {
            result = worker->run(worker->data);
        }
    } catch (abi::__forced_unwind &) {
        throw;
    } catch (const Stopped &) {
    } catch (...) {
        std::lock_guard lock(team.mutex_);
        if (!team.cause_) {
            team.cause_ = std::current_exception();
        }
        team.failed_ = true;
    }
    return result;
}

void rest(minerva_decoder * decoder) {
    if (auto * team = static_cast<Team *>(decoder->threads)) {
        team->rest();
    }
}

void wake(minerva_decoder * decoder) {
    if (auto * team = static_cast<Team *>(decoder->threads)) {
        team->wake();
    }
}

// ---- Calls ----------------------------------------------------------------------------------------------------------

Call::Call(minerva_decoder * decoder, bool computes)
    : outer_(this_call), outer_team_(this_team), decoder_(decoder), computes_(computes) {
    touch_exceptions();
    ++n_calls;
    this_call = this;
    this_team = nullptr;
    thrown_cause = MINERVA_NOTHING;
    Team * team = decoder != nullptr ? static_cast<Team *>(decoder->threads) : nullptr;
    if (is_ending) {
        note(MINERVA_ENDING, "the interpreter is shutting down");
    } else if (team != nullptr && team->is_inherited()) {
        note(MINERVA_INHERITED, "this process was forked from the one that made it, and has none of its threads");
    } else if (decoder != nullptr && decoder->failed) {
        note(MINERVA_FAILED, decoder->why);
    } else if (computes) {
        this_team = team;
    }
    is_refused_ = thrown_cause != MINERVA_NOTHING;
}

Call::~Call() {
    if (computes_ && decoder_->failed && decoder_->why[0] == 0) {
        std::snprintf(decoder_->why, sizeof decoder_->why, "%s", thrown_text);
    }
    this_call = outer_;
    this_team = outer_team_;
    --n_calls;
}

void Call::fail() {
    if (computes_) {
        decoder_->failed = 1;
        if (this_team != nullptr) {
            this_team->stop();
        }
    }
}

void Call::lose(const std::string & why) {
    note(MINERVA_LOST, why.c_str());
    fail();
    throw Lost(why);
}

bool Call::wants_to_stop() {
    const minerva_abort_state * state = decoder_ != nullptr ? decoder_->abort : nullptr;
    is_stopped_ = is_stopped_ || is_ending || (state != nullptr && state->cancelled) ||
                  minerva_on_poll(state != nullptr ? state->data : nullptr);
    return is_stopped_;
}

Call * current_call() {
    return this_call;
}

void Call::explain() {
    try {
        throw;
    } catch (const Lost & error) {
        note(MINERVA_LOST, error.what());
    } catch (const Assertion & error) {
        note(MINERVA_ASSERTION, error.what());
    } catch (const std::length_error &) {  // a vector of more than it can ever hold
        note(MINERVA_NO_MEMORY, "there is not enough memory");
    } catch (const std::bad_alloc &) {
        note(MINERVA_NO_MEMORY, "there is not enough memory");
    } catch (const std::system_error & error) {
        note(cause_of(error.code()), error.what());
    } catch (const std::exception & error) {
        note(MINERVA_EXCEPTION, error.what());
    } catch (...) {
        note(MINERVA_EXCEPTION, "an unknown exception");
    }
}

bool can_be_done(const std::function<void()> & work) {
    const minerva_cause cause = thrown_cause;
    char text[sizeof thrown_text];
    std::memcpy(text, thrown_text, sizeof text);
    bool is_done = true;
    {
        Call call(nullptr, false);
        try {
            if (!call.is_refused()) {
                work();
            }
        } catch (abi::__forced_unwind &) {
            throw;
        } catch (const Lost &) {
        } catch (...) {
            is_done = false;
        }
    }
    note(cause, text);
    return is_done;
}

}  // namespace minerva

// ---- For C ----------------------------------------------------------------------------------------------------------

enum minerva_cause minerva_thrown_cause(void) {
    return minerva::thrown_cause;
}

const char * minerva_thrown(void) {
    return minerva::thrown_text;
}

bool minerva_is_ending(void) {
    return minerva::is_ending;
}

void minerva_end(int64_t timeout_us) {
    minerva::is_ending = true;
    const int64_t deadline = llama_time_us() + timeout_us;
    while (minerva::n_calls > 0 && llama_time_us() < deadline) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
#if defined(__GLIBC__)
    if (minerva::n_calls > 0) {
        // What is registered last is called first.
        on_exit(
            [](int status, void * /* argument */) {
                std::fflush(nullptr);
                _exit(status);
            },
            nullptr);
    }
#endif
}

int32_t minerva_threads_set(minerva_decoder * decoder, int32_t n_threads, int32_t n_threads_batch) {
    const int32_t code = minerva::guarded<int32_t>(MINERVA_THREW, decoder, false, [&] {
        auto * team = static_cast<minerva::Team *>(decoder->threads);
        const int wanted = std::max(n_threads, n_threads_batch);
        if (team == nullptr || team->size() < wanted) {
            team = new minerva::Team(wanted, team);
            decoder->threads = team;
            llama_attach_threadpool(decoder->context, team->pool(), nullptr);
        }
        llama_set_n_threads(decoder->context, n_threads, n_threads_batch);
        return 0;
    });
    if (code != 0 || decoder->head == nullptr || decoder->head->decoder.failed) {
        return code;
    }
    // Threads of its own: if they are ended because something failed there, the decoder's go on.
    return minerva_threads_set(&decoder->head->decoder, n_threads, n_threads_batch);
}

void minerva_threads_wake(minerva_decoder * decoder) {
    minerva::wake(decoder);
}

void minerva_threads_free(minerva_decoder * decoder) {
    auto * team = static_cast<minerva::Team *>(decoder->threads);
    decoder->threads = nullptr;
    if (team != nullptr && !team->is_inherited()) {  // an inherited one has no threads to join
        delete team;
    }
}

int minerva_start_worker(pthread_t * thread, const pthread_attr_t * attributes, void * (*run)(void *), void * data) {
    if (minerva::this_team == nullptr) {
        return pthread_create(thread, attributes, run, data);
    }
    minerva::this_team->start(thread, attributes, run, data);
    return 0;
}

void minerva_while_waiting(void) {
    // Whom it waits for may need this core.
    thread_local unsigned turns = 0;
    minerva::Team * team = minerva::this_team;
    if (++turns % TURNS_PER_YIELD == 0) {
        sched_yield();
        if (team != nullptr && team->is_inherited()) {
            throw std::runtime_error("a callback has forked this process, which has none of the threads that computed");
        }
    }
    if (team != nullptr && team->is_resting()) {
        if (minerva::is_worker) {
            team->sleep();
        } else {  // somebody has let it compute without having woken it
            team->wake();
        }
    }
    if (team == nullptr || !team->has_failed()) {
        return;
    }
    if (minerva::is_worker) {
        throw minerva::Stopped();
    }
    minerva::this_call->fail();
    team->rethrow();
}
