// Included before ggml's RPC client and server, by the compiler's -include: how they wait, fail and print is in
// rpc.cpp.
//
// Upstream ends the process when a worker is lost. Its thread that talks to the worker must not: it marks what was
// asked as done and lost, and whoever waits for that throws. So the promises, and what ends the process, are ours.
#ifndef MINERVA_GGML_RPC_H
#define MINERVA_GGML_RPC_H

// All that the file includes: the names below are not to be replaced in there.
#include <algorithm>
#include <array>
#include <atomic>
#include <cinttypes>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <queue>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "ggml-rpc.h"

#include "ggml-backend-impl.h"
#include "ggml-cpp.h"
#include "ggml-impl.h"

namespace minerva::rpc {

class Connection;
struct Outcome;

class Reply {
  public:
    Reply() = default;
    explicit Reply(std::shared_ptr<Outcome> outcome) : outcome_(std::move(outcome)) {}
    void wait() const;  // throws if the connection was lost
    Reply share() const { return *this; }

  private:
    std::shared_ptr<Outcome> outcome_;
};

class Promise {
  public:
    Promise();
    Reply get_future() const { return Reply(outcome_); }
    void set_value();

  private:
    std::shared_ptr<Outcome> outcome_;
};

std::shared_ptr<Connection> made_last();  // by this thread
bool take(const std::shared_ptr<Connection> & connection);  // for this thread's call; false if it is of no use any more

// One dispatcher a worker, which those share that use it at the same time: until the connection is lost.
template <class Dispatcher> class Shared {
  public:
    Shared & operator=(const std::shared_ptr<Dispatcher> & dispatcher) {
        dispatcher_ = dispatcher;
        connection_ = made_last();
        take(connection_);
        return *this;
    }
    std::shared_ptr<Dispatcher> lock() const {
        auto dispatcher = dispatcher_.lock();
        return dispatcher != nullptr && take(connection_) ? dispatcher : nullptr;
    }

  private:
    std::weak_ptr<Dispatcher> dispatcher_;
    std::shared_ptr<Connection> connection_;
};

void print(const char * format, ...);
void print(FILE * file, const char * format, ...);
void abort(const char * file, int line, const char * format, ...);  // returns on the thread of a dispatcher

}  // namespace minerva::rpc

namespace std {
template <class> using minerva_promise = minerva::rpc::Promise;
template <class> using minerva_reply = minerva::rpc::Reply;
template <class Type> using minerva_shared = minerva::rpc::Shared<Type>;
}  // namespace std

#define promise minerva_promise
#define shared_future minerva_reply
#define weak_ptr minerva_shared
#define ggml_abort minerva::rpc::abort
#define printf minerva::rpc::print
#define fprintf minerva::rpc::print

#endif
