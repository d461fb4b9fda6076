// RPC: how a worker is reached, and what happens when it is not.
//
// This is the transport of ggml's RPC backend, in place of upstream's: connections that have time limits, and that can
// be given up. A connection is lost once: from then on every call that needs it fails, and the next load makes another.
#include "failure.h"

#include <string>

#if !defined(MINERVA_RPC)

bool minerva_has_rpc(void) {
    return false;
}

int32_t minerva_rpc_add(const char *, int64_t, ggml_backend_dev_t *, int32_t) {
    return minerva::guarded<int32_t>(MINERVA_THREW, []() -> int32_t {
        throw std::runtime_error("this build has no RPC (GGML_RPC=OFF): build it without that option");
    });
}

int32_t minerva_rpc_serve(int, const char *, int32_t, int32_t, ggml_backend_dev_t *) {
    return minerva_rpc_add(nullptr, 0, nullptr, 0);
}

void minerva_connections_free(struct minerva_connections *) {}

namespace minerva::rpc {
Taking::Taking(const minerva_connections *) {}
Taking::~Taking() = default;
minerva_connections * Taking::taken() const {
    return nullptr;
}
void Taking::check() const {}
}  // namespace minerva::rpc

#else

#include <ggml-backend-impl.h>
#include <ggml-rpc.h>
#include <ggml-rpc/transport.h>

#include "ggml_rpc.h"
#undef promise
#undef shared_future
#undef weak_ptr
#undef ggml_abort
#undef printf
#undef fprintf

#include <cerrno>
#include <chrono>
#include <cstdarg>
#include <map>

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

static_assert(RPC_PROTO_MAJOR_VERSION == 7, "compare the commands below with those in ggml-rpc.cpp");

namespace {

// What this file knows of the commands, by their numbers in the protocol.
constexpr uint8_t FREE_BUFFER = 4;
constexpr uint8_t GRAPH_COMPUTE = 10;
constexpr uint8_t GRAPH_RECOMPUTE = 16;
constexpr uint8_t NO_COMMAND = 255;
constexpr size_t HEADER = 9;  // the command, and the size of what follows

constexpr size_t SMALL = 4096;        // what is put together to one packet
constexpr int SLICE_MS = 100;         // how often a thread that waits looks around
constexpr int64_t GREETING_US = 10'000'000;  // a worker that is there answers its first message in this time,
constexpr int64_t GRACE_US = 2'000'000;      // and one that works, any message in this time after a request to stop
constexpr int64_t DEFAULT_TIMEOUT_US = 300'000'000;

// A machine that vanishes says nothing: TCP asks for it.
constexpr int KEEP_ALIVE_IDLE_S = 20, KEEP_ALIVE_INTERVAL_S = 10, KEEP_ALIVE_COUNT = 3;

void set_option(int fd, int level, int name, int value) {
    setsockopt(fd, level, name, &value, sizeof value);
}

void prepare(int fd) {
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
#if defined(TCP_KEEPIDLE)
    set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, KEEP_ALIVE_IDLE_S);
#elif defined(TCP_KEEPALIVE)
    set_option(fd, IPPROTO_TCP, TCP_KEEPALIVE, KEEP_ALIVE_IDLE_S);
#endif
    set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, KEEP_ALIVE_INTERVAL_S);
    set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, KEEP_ALIVE_COUNT);
    // No TCP_USER_TIMEOUT: it also ends connections to one that computes for long, and reads nothing meanwhile.
#if defined(SO_NOSIGPIPE)
    set_option(fd, SOL_SOCKET, SO_NOSIGPIPE, 1);
#endif
}

#if defined(MSG_NOSIGNAL)
constexpr int QUIETLY = MSG_NOSIGNAL;
#else
constexpr int QUIETLY = 0;
#endif

std::string formatted(const char * format, va_list arguments) {
    char text[1024];
    std::vsnprintf(text, sizeof text, format, arguments);
    std::string line = text;
    while (!line.empty() && line.back() == '\n') {
        line.pop_back();
    }
    return line;
}

}  // namespace

struct minerva_connections {
    std::vector<std::shared_ptr<minerva::rpc::Connection>> all;
};

namespace minerva::rpc {

static bool is_to_stop() {  // this thread's call
    return current_call() != nullptr && current_call()->wants_to_stop();
}

// ---- Connections ----------------------------------------------------------------------------------------------------

// To a worker. A dispatcher's thread sends and receives; others may give it up, and ask how it is.
class Connection {
  public:
    Connection(std::string endpoint, int fd, int64_t timeout_us)
        : timeout_us(timeout_us), endpoint_(std::move(endpoint)), fd_(fd), maker_(std::this_thread::get_id()) {}

    int fd() const { return fd_; }
    const std::string & endpoint() const { return endpoint_; }
    bool is_lost() const { return is_lost_; }
    bool is_at_work() const { return std::this_thread::get_id() != maker_; }  // or is the one that made it, greeting
    void give_up() { is_given_up_ = true; }

    void lose(const std::string & why) {
        std::lock_guard lock(mutex_);
        if (!is_lost_) {
            why_ = why;
            is_lost_ = true;
        }
    }

    std::string why() const {
        std::lock_guard lock(mutex_);
        return "the RPC worker at " + endpoint_ + " " + why_;
    }

    // Whether there is still somebody at the other end, as far as the system knows.
    bool is_usable() {
        std::lock_guard lock(mutex_);
        if (is_lost_ || is_given_up_ || fd_ < 0 || process_ != getpid()) {
            return false;
        }
        char byte;
        const ssize_t n = recv(fd_, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
        return n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR));
    }

    void close() {
        std::lock_guard lock(mutex_);
        ::close(fd_);
        fd_ = -1;
    }

    // Waits until the socket is ready. False, with the reason noted, if it is not to be waited for any longer.
    bool wait(short events) {
        const int64_t began = llama_time_us();
        const int64_t limit = is_at_work() ? timeout_us.load() : std::min<int64_t>(timeout_us, GREETING_US);
        for (;;) {
            pollfd ready = {fd_, events, 0};
            const int n = poll(&ready, 1, SLICE_MS);
            if (n > 0) {
                return true;
            }
            const int64_t silence = llama_time_us() - began;
            if (minerva_is_ending()) {
                lose("was left: the interpreter is shutting down");
            } else if (is_given_up_ || (!is_at_work() && is_to_stop())) {
                lose("did not answer when the call was to be stopped");
            } else if (silence > limit) {
                lose(is_at_work() ? "has been silent for " + std::to_string(silence / 1'000'000) + " s"
                                  : "accepts connections, but does not answer: it serves somebody else, or hangs");
            }
            if (is_lost_) {
                return false;
            }
        }
    }

    std::atomic<int64_t> timeout_us;

    // ---- Of the thread that sends.
    uint8_t command = NO_COMMAND;
    // The graph that a worker has computed last on each device; it forgets them when it frees a buffer.
    struct Graph {
        std::vector<uint8_t> message;
        bool is_forgotten = false;
    };
    std::map<uint32_t, Graph> graphs;

  private:
    mutable std::mutex mutex_;
    std::string endpoint_;
    std::string why_;
    int fd_;
    std::atomic<bool> is_lost_{false};
    std::atomic<bool> is_given_up_{false};
    std::thread::id maker_;
    pid_t process_ = getpid();
};

namespace {

thread_local std::shared_ptr<Connection> served;  // by this thread, a dispatcher's
thread_local std::shared_ptr<Connection> made;
thread_local std::vector<std::shared_ptr<Connection>> used;  // since it has a `Taking`
thread_local const minerva_connections * expected = nullptr;  // by this thread's call, which wants no others
thread_local std::string failure;  // why this thread's last connection could not be had
thread_local int listening = -1;   // the socket of a worker on this thread

// Never freed: dispatchers' threads may outlive the objects that are destroyed when the process ends.
struct Endpoints {
    std::mutex mutex;
    std::map<std::string, int64_t> timeouts;
    std::map<std::string, std::weak_ptr<Connection>> current;
};

Endpoints & endpoints() {
    static auto * all = new Endpoints;
    return *all;
}

int64_t timeout_of(const std::string & endpoint) {
    std::lock_guard lock(endpoints().mutex);
    const auto found = endpoints().timeouts.find(endpoint);
    return found != endpoints().timeouts.end() ? found->second : DEFAULT_TIMEOUT_US;
}

}  // namespace

std::shared_ptr<Connection> made_last() {
    return made;
}

static bool has(const minerva_connections * connections, const std::shared_ptr<Connection> & wanted) {
    return connections != nullptr &&
           std::find(connections->all.begin(), connections->all.end(), wanted) != connections->all.end();
}

bool take(const std::shared_ptr<Connection> & connection) {
    if (connection == nullptr) {
        return false;
    }
    if (!connection->is_usable()) {
        Call * call = current_call();
        if (call != nullptr && (has(call->connections(), connection) || has(expected, connection))) {
            connection->lose("has closed the connection");  // another would be of no use: what it had is gone
            call->lose(connection->why());
        }
        return false;
    }
    connection->timeout_us = timeout_of(connection->endpoint());
    if (std::find(used.begin(), used.end(), connection) == used.end()) {
        used.push_back(connection);
    }
    return true;
}

// ---- Waiting --------------------------------------------------------------------------------------------------------

struct Outcome {
    std::mutex mutex;
    std::condition_variable changed;
    bool is_done = false;
    bool is_free = false;             // nothing may be thrown where memory is freed
    std::shared_ptr<Connection> lost;  // through which nothing has come
};

Promise::Promise() : outcome_(std::make_shared<Outcome>()) {}

void Promise::set_value() {
    {
        std::lock_guard lock(outcome_->mutex);
        outcome_->is_done = true;
        if (served != nullptr) {
            outcome_->is_free = served->command == FREE_BUFFER;
            outcome_->lost = served->is_lost() ? served : nullptr;
            served->command = NO_COMMAND;
        }
    }
    outcome_->changed.notify_all();
}

void Reply::wait() const {
    Outcome & outcome = *outcome_;
    std::unique_lock lock(outcome.mutex);
    Call * call = current_call();
    int64_t asked_to_stop_us = 0;
    while (!outcome.changed.wait_for(lock, std::chrono::milliseconds(SLICE_MS / 2), [&] { return outcome.is_done; })) {
        if (call == nullptr || outcome.is_done) {
            continue;
        }
        lock.unlock();  // Python runs, and the answer may come
        if (asked_to_stop_us == 0 && call->wants_to_stop()) {
            asked_to_stop_us = llama_time_us();
        } else if (asked_to_stop_us != 0 && llama_time_us() - asked_to_stop_us > GRACE_US) {
            const auto * connections = call->connections();
            for (const auto & connection : connections != nullptr ? connections->all : used) {
                connection->give_up();
            }
        }
        lock.lock();
    }
    if (outcome.lost == nullptr || call == nullptr || outcome.is_free) {
        return;
    }
    const std::string why = outcome.lost->why();
    lock.unlock();
    call->lose(why);
}

// ---- What upstream says and gives up --------------------------------------------------------------------------------

void abort(const char * file, int line, const char * format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const std::string message = formatted(format, arguments);
    va_end(arguments);
    if (served != nullptr) {
        served->lose("gave an answer that is none");
        return;
    }
    if (listening >= 0 || current_call() == nullptr) {
        ggml_abort(file, line, "%s", message.c_str());
    }
    if (failure.empty() && made != nullptr) {
        made->lose("answers, but not as an RPC worker of this version does");  // if that is not known better
        failure = made->why();
    }
    current_call()->lose(failure.empty() ? message : failure);
}

void print(const char * format, ...) {
    va_list arguments;
    va_start(arguments, format);
    minerva_log(GGML_LOG_LEVEL_DEBUG, (formatted(format, arguments) + "\n").c_str(), nullptr);
    va_end(arguments);
}

void print(FILE * /* file */, const char * format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const auto level = is_to_stop() ? GGML_LOG_LEVEL_DEBUG : GGML_LOG_LEVEL_WARN;  // what then fails is no news
    minerva_log(level, (formatted(format, arguments) + "\n").c_str(), nullptr);
    va_end(arguments);
}

Taking::Taking(const minerva_connections * wanted) {
    used.clear();
    expected = wanted;
}

Taking::~Taking() {
    used.clear();
    expected = nullptr;
}

minerva_connections * Taking::taken() const {
    auto open = used;  // one that was closed again has no weights behind it
    open.erase(std::remove_if(open.begin(), open.end(), [](const auto & one) { return one->fd() < 0; }), open.end());
    return open.empty() ? nullptr : new minerva_connections{open};
}

void Taking::check() const {
    const auto has_weights = [](const std::string & endpoint) {
        return expected != nullptr && std::any_of(expected->all.begin(), expected->all.end(),
                                                  [&](const auto & one) { return one->endpoint() == endpoint; });
    };
    for (const auto & connection : used) {
        if (!has(expected, connection) && has_weights(connection->endpoint())) {
            throw Lost("the RPC worker at " + connection->endpoint() +
                       " was started again, and has no weights any more");
        }
    }
}

}  // namespace minerva::rpc

// ---- The transport --------------------------------------------------------------------------------------------------

using minerva::rpc::Connection;

struct socket_t::impl {
    explicit impl(int fd) : fd(fd) {}
    explicit impl(std::shared_ptr<Connection> to) : connection(std::move(to)), fd(connection->fd()) {}
    impl(const impl &) = delete;
    impl & operator=(const impl &) = delete;
    ~impl() {
        if (connection != nullptr) {
            connection->close();
        } else if (fd >= 0) {
            ::close(fd);
        }
    }

    // Until the socket is ready. A worker waits for ever, or until it is stopped.
    bool wait(short events) {
        if (connection != nullptr) {
            return connection->wait(events);
        }
        for (;;) {
            pollfd ready = {fd, events, 0};
            if (poll(&ready, 1, SLICE_MS) > 0) {
                return true;
            }
            if (minerva::current_call() == nullptr || minerva::current_call()->wants_to_stop()) {
                return false;
            }
        }
    }

    bool fail(const char * why) {
        if (connection != nullptr) {
            connection->lose(why);
        }
        return false;
    }

    bool is_usable() {
        if (connection == nullptr) {
            return true;
        }
        if (connection->is_at_work()) {
            minerva::rpc::served = connection;
        }
        return !connection->is_lost();
    }

    bool write(const void * head, size_t head_size, const void * body, size_t body_size) {
        size_t done = 0;
        while (done < head_size + body_size) {
            iovec parts[2] = {};
            int n_parts = 0;
            if (done < head_size) {
                parts[n_parts++] = {const_cast<char *>(static_cast<const char *>(head)) + done, head_size - done};
            }
            const size_t skip = done > head_size ? done - head_size : 0;
            if (skip < body_size) {
                parts[n_parts++] = {const_cast<char *>(static_cast<const char *>(body)) + skip, body_size - skip};
            }
            msghdr message = {};
            message.msg_iov = parts;
            message.msg_iovlen = n_parts;
            const ssize_t n = sendmsg(fd, &message, MSG_DONTWAIT | QUIETLY);
            if (n >= 0) {
                done += size_t(n);
            } else if (errno == EAGAIN) {
                if (!wait(POLLOUT)) {
                    return false;
                }
            } else if (errno != EINTR) {
                return fail("has closed the connection");
            }
        }
        return true;
    }

    bool read(void * data, size_t size) {
        size_t done = 0;
        while (done < size) {
            const ssize_t n = recv(fd, static_cast<char *>(data) + done, size - done, MSG_DONTWAIT);
            if (n > 0) {
                done += size_t(n);
            } else if (n == 0) {
                return fail("has closed the connection");
            } else if (errno == EAGAIN) {
                if (!wait(POLLIN)) {
                    return false;
                }
            } else if (errno != EINTR) {
                return fail("has closed the connection");
            }
        }
        return true;
    }

    // A message to a worker begins with its command.
    bool send(const void * data, size_t size) {
        const bool is_client = connection != nullptr;
        if (is_client && pending.empty() && size == 1) {
            connection->command = *static_cast<const uint8_t *>(data);
        }
        if (!is_usable()) {
            pending.clear();
            return false;
        }
        if (is_client && connection->command == GRAPH_COMPUTE && size >= sizeof(uint32_t) && pending.size() == HEADER) {
            keep_graph(static_cast<const uint8_t *>(data), size);
        }
        if (pending.size() + size <= SMALL) {
            const auto * bytes = static_cast<const uint8_t *>(data);
            pending.insert(pending.end(), bytes, bytes + size);
            return true;
        }
        const std::vector<uint8_t> head = std::move(pending);
        pending.clear();
        return write(head.data(), head.size(), data, size);
    }

    bool flush() {
        const std::vector<uint8_t> message = std::move(pending);
        pending.clear();
        if (!is_usable()) {
            return false;
        }
        if (connection != nullptr && connection->command == FREE_BUFFER) {
            for (auto & [device, graph] : connection->graphs) {
                graph.is_forgotten = true;
            }
        }
        if (connection != nullptr && connection->command == GRAPH_RECOMPUTE) {
            uint32_t device = 0;
            std::memcpy(&device, message.data() + HEADER, std::min(sizeof device, message.size() - HEADER));
            Connection::Graph & graph = connection->graphs[device];
            if (graph.is_forgotten) {  // it would hang up
                graph.is_forgotten = false;
                return write(graph.message.data(), graph.message.size(), nullptr, 0);
            }
        }
        return write(message.data(), message.size(), nullptr, 0);
    }

    void keep_graph(const uint8_t * data, size_t size) {
        uint32_t device;
        std::memcpy(&device, data, sizeof device);
        Connection::Graph & graph = connection->graphs[device];
        graph.message = pending;
        graph.message.insert(graph.message.end(), data, data + size);
        graph.is_forgotten = false;
    }

    std::shared_ptr<Connection> connection;  // to a worker; none at a worker's own end
    int fd;
    std::vector<uint8_t> pending;
};

socket_t::socket_t(std::unique_ptr<impl> own) : pimpl(std::move(own)) {}

socket_t::~socket_t() = default;

bool socket_t::send_data(const void * data, size_t size) {
    return size == 0 || pimpl->send(data, size);
}

bool socket_t::recv_data(void * data, size_t size) {
    return pimpl->is_usable() && pimpl->read(data, size);
}

bool socket_t::flush() {
    return pimpl->flush();
}

void socket_t::get_caps(uint8_t * capabilities) {
    std::memset(capabilities, 0, RPC_CONN_CAPS_SIZE);  // TCP alone
}

void socket_t::update_caps(const uint8_t * /* capabilities */) {}

socket_ptr socket_t::accept() {
    if (!pimpl->wait(POLLIN)) {
        return nullptr;
    }
    const int fd = ::accept(pimpl->fd, nullptr, nullptr);
    if (fd < 0) {
        return errno == ECONNABORTED || errno == EINTR ? accept() : nullptr;
    }
    prepare(fd);
    return socket_ptr(new socket_t(std::make_unique<impl>(fd)));
}

// Python has made the socket, so that it knows the port and can explain what is wrong.
socket_ptr socket_t::create_server(const char * /* host */, int /* port */) {
    return socket_ptr(new socket_t(std::make_unique<impl>(dup(minerva::rpc::listening))));
}

socket_ptr socket_t::connect(const char * host, int port) {
    using namespace minerva::rpc;
    const std::string endpoint = std::string(host) + ":" + std::to_string(port);
    const std::string prefix = "the RPC worker at " + endpoint + " ";
    made = nullptr;
    failure.clear();
    addrinfo hints = {}, * addresses = nullptr;
    hints.ai_socktype = SOCK_STREAM;
    const int code = getaddrinfo(host, std::to_string(port).c_str(), &hints, &addresses);
    if (code != 0) {
        failure = prefix + "cannot be found (" + gai_strerror(code) + ")";
        return nullptr;
    }
    const std::unique_ptr<addrinfo, void (*)(addrinfo *)> owned(addresses, freeaddrinfo);
    for (const addrinfo * address = addresses; address != nullptr; address = address->ai_next) {
        const int fd = socket(address->ai_family, SOCK_STREAM, 0);
        if (fd < 0) {
            failure = prefix + "cannot be reached (" + std::strerror(errno) + ")";
            continue;
        }
        prepare(fd);
        auto connection = std::make_shared<Connection>(endpoint, fd, timeout_of(endpoint));
        auto own = std::make_unique<impl>(connection);
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
        int error = ::connect(fd, address->ai_addr, address->ai_addrlen) == 0 ? 0 : errno;
        if (error == EINPROGRESS) {
            socklen_t size = sizeof error;
            if (!connection->wait(POLLOUT)) {
                error = ETIMEDOUT;
            } else if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0) {
                error = errno;
            }
        }
        if (error == 0) {
            made = connection;
            std::lock_guard lock(endpoints().mutex);
            endpoints().current[endpoint] = connection;
            return socket_ptr(new socket_t(std::move(own)));
        }
        failure = prefix + "cannot be reached (" + std::strerror(error) + ")";
    }
    return nullptr;
}

bool rpc_transport_init() {
    return true;
}

void rpc_transport_shutdown() {}

// ---- Devices --------------------------------------------------------------------------------------------------------

namespace {

using minerva::rpc::endpoints;

// The same for every device and every backend of ggml's RPC.
std::atomic<ggml_backend_t (*)(ggml_backend_dev_t, const char *)> original_make{nullptr};
std::atomic<ggml_status (*)(ggml_backend_t, ggml_cgraph *)> original_compute{nullptr};
std::atomic<void (*)(ggml_backend_dev_t, ggml_backend_event_t)> original_free_event{nullptr};

// Whether a worker can compute its last graph again is decided there, and then asked for: no other context that uses
// the device may come between.
ggml_status compute(ggml_backend_t backend, ggml_cgraph * graph) {
    static auto * one_at_a_time = new std::mutex;
    std::lock_guard lock(*one_at_a_time);
    return original_compute.load()(backend, graph);
}

// Upstream would connect again to free an event, where nothing may fail.
void free_event(ggml_backend_dev_t device, ggml_backend_event_t event) {
    std::shared_ptr<Connection> connection;
    {
        std::lock_guard lock(endpoints().mutex);
        connection = endpoints().current[ggml_backend_dev_description(device)].lock();
    }
    if (connection != nullptr && connection->is_usable()) {
        original_free_event.load()(device, event);
    }  // else its few bytes stay
}

ggml_backend_t make_backend(ggml_backend_dev_t device, const char * parameters) {
    ggml_backend_t backend = original_make.load()(device, parameters);
    original_compute = backend->iface.graph_compute;
    backend->iface.graph_compute = compute;
    return backend;
}

}  // namespace

bool minerva_has_rpc(void) {
    return true;
}

int32_t minerva_rpc_add(const char * endpoint, int64_t timeout_us, ggml_backend_dev_t * devices, int32_t capacity) {
    return minerva::guarded<int32_t>(MINERVA_THREW, [&] {
        {
            std::lock_guard lock(endpoints().mutex);
            endpoints().timeouts[endpoint] = timeout_us;
        }
        ggml_backend_reg_t worker = ggml_backend_rpc_add_server(endpoint);
        if (worker == nullptr) {
            throw minerva::Lost("the RPC worker at " + std::string(endpoint) + " has no devices");
        }
        const auto count = std::min(int32_t(ggml_backend_reg_dev_count(worker)), capacity);
        for (int32_t index = 0; index < count; ++index) {
            devices[index] = ggml_backend_reg_dev_get(worker, size_t(index));
            std::lock_guard lock(endpoints().mutex);
            if (devices[index]->iface.init_backend != make_backend) {
                original_make = devices[index]->iface.init_backend;
                original_free_event = devices[index]->iface.event_free;
                devices[index]->iface.init_backend = make_backend;
                devices[index]->iface.event_free = free_event;
            }
        }
        return count;
    });
}

void minerva_connections_free(struct minerva_connections * connections) {
    delete connections;
}

// ---- Workers --------------------------------------------------------------------------------------------------------

namespace {

thread_local minerva::Team * serving = nullptr;
thread_local std::map<ggml_backend_device *, ggml_backend_dev_t> originals;

// A CPU computes with the threads of the call, which catch what they throw, instead of new ones for every graph.
ggml_backend_t make_serving_backend(ggml_backend_dev_t device, const char * parameters) {
    ggml_backend_dev_t original = originals.at(device);
    ggml_backend_t backend = original->iface.init_backend(original, parameters);
    if (backend != nullptr && ggml_backend_dev_type(original) == GGML_BACKEND_DEVICE_TYPE_CPU) {
        minerva::cpu().set_threadpool(backend, serving->pool());
    }
    return backend;
}

}  // namespace

int32_t minerva_rpc_serve(int fd, const char * endpoint, int32_t n_threads, int32_t n_devices,
                          ggml_backend_dev_t * devices) {
    minerva_decoder decoder = {};
    const int32_t code = minerva::guarded<int32_t>(MINERVA_THREW, [&] {
        decoder.threads = new minerva::Team(n_threads, nullptr);
        return 0;
    });
    if (code != 0) {
        return code;
    }
    const int32_t result = minerva::guarded<int32_t>(MINERVA_THREW, &decoder, true, [&] {
        serving = static_cast<minerva::Team *>(decoder.threads);
        minerva::rpc::listening = fd;
        originals.clear();
        std::vector<ggml_backend_device> copies;
        std::vector<ggml_backend_dev_t> pointers;
        for (int32_t index = 0; index < n_devices; ++index) {
            copies.push_back(*devices[index]);
            copies.back().iface.init_backend = make_serving_backend;
        }
        for (int32_t index = 0; index < n_devices; ++index) {
            originals[&copies[size_t(index)]] = devices[index];
            pointers.push_back(&copies[size_t(index)]);
        }
        ggml_backend_rpc_start_server(endpoint, nullptr, size_t(n_threads), pointers.size(), pointers.data());
        return 0;
    });
    minerva::rpc::listening = -1;
    minerva_threads_free(&decoder);
    return result;
}

#endif
