// What libllama throws, or would end the process for, becomes a value that a C function returns.
#ifndef MINERVA_FAILURE_H
#define MINERVA_FAILURE_H

#include "hooks.h"

#include <ggml-cpu.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include <cxxabi.h>
#include <pthread.h>

namespace minerva {

struct Assertion : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A worker, on another machine, that cannot be reached (see rpc.cpp).
struct Lost : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// ggml calls this instead of ending the process. If it returns, ggml ends it.
void on_abort(const char * message);

// What is called of the CPU's backend, which need not be in this module. Throws if there is none.
struct Cpu {
    decltype(&ggml_threadpool_new) threadpool_new;
    decltype(&ggml_threadpool_free) threadpool_free;
    decltype(&ggml_backend_cpu_set_threadpool) set_threadpool;
};
const Cpu & cpu();

// The worker threads of a context. They fail together: if one throws, all of them end, and so does the computation.
class Team {
  public:
    // Throws if the system does not grant that many threads. Owns the smaller team that it replaces, whose pool ggml
    // still pauses when it first computes with this one.
    Team(int n_threads, Team * smaller);
    ~Team();
    Team(const Team &) = delete;
    Team & operator=(const Team &) = delete;

    int size() const { return size_; }
    ggml_threadpool * pool() const { return pool_; }
    bool has_failed() const { return failed_.load(std::memory_order_relaxed); }
    bool is_inherited() const;  // by the child of a fork, which has none of the threads

    // Between two computations ggml's workers turn in a loop for a while, which a team that computes next would feel. While
    // a team rests they sleep there; `wake` comes before it computes again.
    void rest();
    void wake();
    void sleep();  // for a worker, if the team rests
    bool is_resting() const { return is_resting_.load(std::memory_order_relaxed); }

    // For the thread that computes. No worker runs any more when it returns, so the stack may be unwound.
    void stop();
    [[noreturn]] void rethrow();  // what a worker has thrown

    void start(pthread_t * thread, const pthread_attr_t * attributes, void * (*run)(void *), void * data);

  private:
    struct Worker;
    static void * work(void * worker);
    bool wait_for_the_others();
    void begin(bool failed);

    int size_;
    std::unique_ptr<Team> smaller_;
    ggml_threadpool * pool_ = nullptr;
    std::atomic<bool> failed_{false};
    int generation_;
    std::mutex mutex_;
    std::condition_variable begun_;
    bool has_begun_ = false;
    std::atomic<bool> is_resting_{false};
    std::condition_variable woken_;
    std::vector<pthread_t> started_;
    std::exception_ptr cause_;
};

// Have the threads of a decoder rest, or wake them.
void rest(minerva_decoder * decoder);
void wake(minerva_decoder * decoder);

// A guarded call, on this thread. The context of a computation that fails is unusable afterwards: its graph, its memory
// and its threads may be in any state.
class Call {
  public:
    Call(minerva_decoder * decoder, bool computes);
    ~Call();
    Call(const Call &) = delete;
    Call & operator=(const Call &) = delete;

    const Call * outer() const { return outer_; }
    bool is_refused() const { return is_refused_; }
    bool has_failed() const { return computes_ && decoder_->failed; }
    void fail();     // called before anything is unwound, if possible
    void explain();  // in a handler: notes for `minerva_thrown` what was caught
    [[noreturn]] void lose(const std::string & why);

    bool wants_to_stop();  // asks Python, and remembers
    const minerva_connections * connections() const { return decoder_ != nullptr ? decoder_->connections : nullptr; }

  private:
    Call * outer_;
    Team * outer_team_;
    minerva_decoder * decoder_;
    bool computes_;
    bool is_refused_ = false;
    bool is_stopped_ = false;
};

Call * current_call();  // of this thread, or a null pointer

template <class Result, class Work>
Result guarded(Result if_thrown, minerva_decoder * decoder, bool computes, Work work) {
    Call call(decoder, computes);
    if (call.is_refused()) {
        return if_thrown;
    }
    try {
        const Result result = work();
        return call.has_failed() ? if_thrown : result;  // libllama may have caught it itself
    } catch (abi::__forced_unwind &) {
        throw;  // the thread is being ended: nobody may stop that
    } catch (...) {
        call.fail();
        call.explain();
        return if_thrown;
    }
}

// Whether something that libllama also does where nothing may be thrown can be done; also true for an RPC worker that was
// lost, about which rpc.cpp throws nothing there, and if the interpreter is shutting down. Leaves `minerva_thrown` alone.
bool can_be_done(const std::function<void()> & work);

// A call about no context.
template <class Result, class Work> Result guarded(Result if_thrown, Work work) {
    return guarded(if_thrown, nullptr, false, work);
}

namespace rpc {

// Notes which connections this thread uses.
class Taking {
  public:
    explicit Taking(const minerva_connections * wanted = nullptr);
    ~Taking();
    Taking(const Taking &) = delete;
    Taking & operator=(const Taking &) = delete;

    minerva_connections * taken() const;  // to be freed by the caller, or a null pointer if there are none
    void check() const;                   // throws if there are others than those that were wanted
};

}  // namespace rpc

}  // namespace minerva

#endif
